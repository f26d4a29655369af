#!/usr/bin/env bash
# Makes a folder with Python packages; again when the lists of packages change. Where a list has
# hatchling, client/python is installed too, editable: its modules are generated from proto/, and
# generated anew when that changes.
#
#   bash tests/venv.sh                           build/venv of tests/requirements.txt
#   bash tests/venv.sh FOLDER REQUIREMENTS...    another one
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [[ $# -eq 0 ]]; then
  set -- build/venv tests/requirements.txt
fi
venv="$root/$1"
shift
# Debian's own, whatever else is first in PATH.
python=/usr/bin/python3

wanted="$(cat "$@"; "$python" --version; echo "$venv")"
if [[ ! -x "$venv/bin/python" || ! -f "$venv/made_from" || "$(<"$venv/made_from")" != "$wanted" ]]; then
  echo "venv: making $venv"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  options=()
  for requirements in "$@"; do
    options+=(--requirement "$requirements")
  done
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${options[@]}"
  printf '%s\n' "$wanted" >"$venv/made_from"
fi

if [[ -x "$venv/bin/hatchling" ]]; then
  package=client/python
  contract="$(cat proto/certiq/v1/*.proto "$package/pyproject.toml" "$package/hatch_build.py" | sha256sum)"
  if [[ ! -f "$package/src/certiq/_proto/tensor_pb2.py" || ! -f "$venv/package_made_from" ||
    "$(<"$venv/package_made_from")" != "$contract" ]]; then
    # What building takes is in the environment already: the network is asked for nothing.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --no-deps --no-build-isolation --editable "$package"
    printf '%s\n' "$contract" >"$venv/package_made_from"
  fi
fi
