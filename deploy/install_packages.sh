#!/usr/bin/env bash
# Installs the Debian packages of packages.txt that are missing.
#
#   bash deploy/install_packages.sh build         to build the server and the client
#   bash deploy/install_packages.sh build test    to run the tests as well
#
# Nothing is asked of the network when nothing is missing.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
list="$here/packages.txt"

if [[ $# -eq 0 ]]; then
  set -- build
fi

wanted=()
for set_name in "$@"; do
  mapfile -t names < <(awk -v set_name="$set_name" \
    '$1 !~ /^#/ && NF == 2 && $2 == set_name { print $1 }' "$list")
  if [[ ${#names[@]} -eq 0 ]]; then
    echo "install_packages: $list has no packages in the set '$set_name'" >&2
    exit 2
  fi
  wanted+=("${names[@]}")
done

if ! command -v dpkg-query >/dev/null; then
  echo "install_packages: this is not Debian (no dpkg-query). certiq is built on Debian 12;" >&2
  echo "it needs the counterparts of: ${wanted[*]}" >&2
  exit 1
fi

# dpkg-query fails for names it has never heard of; those are missing too.
installed="$(dpkg-query -W -f='${Package} ${db:Status-Status}\n' "${wanted[@]}" 2>/dev/null || true)"
missing=()
for name in "${wanted[@]}"; do
  if ! grep -qxF "$name installed" <<<"$installed"; then
    missing+=("$name")
  fi
done
if [[ ${#missing[@]} -eq 0 ]]; then
  exit 0
fi
echo "install_packages: missing: ${missing[*]}"

# shellcheck source=/dev/null
release="$(. /etc/os-release 2>/dev/null && echo "${ID:-unknown} ${VERSION_ID:-}" || echo unknown)"
if [[ "$release" != "debian 12" ]]; then
  echo "install_packages: this is '$release', and certiq is built and tested on Debian 12 (bookworm)" >&2
  echo "with the versions of its packages. Use Debian 12, or install the packages above yourself." >&2
  exit 1
fi

as_root=()
if [[ "$(id -u)" -ne 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "install_packages: installing takes root and there is no sudo. As root, run:" >&2
    echo "  apt-get update && apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

install() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --no-install-recommends --quiet "${missing[@]}"
}

# Package lists that are already here may do; fetch them only if they do not.
known="$(apt-cache policy "${missing[@]}" 2>/dev/null | grep -c 'Candidate: [0-9]' || true)"
if [[ "$known" -eq ${#missing[@]} ]] && install; then
  exit 0
fi
"${as_root[@]}" apt-get update --quiet
install
