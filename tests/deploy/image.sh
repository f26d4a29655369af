#!/usr/bin/env bash
# Builds the Dockerfile with buildah and unpacks what came out:
#
#   bash tests/deploy/image.sh    builds it, unless these sources were built before
#
# No registry is asked for the base: it is debootstrap's, cut down the way
# Debian's own slim image is, under that image's name. Takes root, and minutes
# the first time. The last line printed is a folder with
#
#   root/      the image's file system
#   size       bytes of its files
#   config     what buildah says of it, JSON
#   seconds    what building took
#
# Folders are $CERTIQ_TOOLS or ${XDG_CACHE_HOME:-$HOME/.cache}/certiq-tools, as
# with tools.sh. Exit status: 0; 1 the build failed; 3 building it is not
# possible here, the last line on stderr says why.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
tools="${CERTIQ_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/certiq-tools}"
cd "$root"

base_name=docker.io/library/debian:bookworm-slim
base_tar="$tools/debian-bookworm-slim.tar"
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
storage=(--root "$tools/containers" --runroot "$tools/containers-run")

# The sources that .dockerignore lets in, by content; names of folders count, dates do not.
key() {
  tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=a=rX \
    --exclude='*.md' Dockerfile .dockerignore CMakeLists.txt LICENSE client/cpp \
    deploy/install_packages.sh deploy/packages.txt proto server | sha256sum | cut -c 1-16
}

# The folders and files that Debian's slim image is without, and lists of packages.
slim() {
  local tree="$1"
  find "$tree/usr/share/doc" -type f ! -name copyright -delete
  find "$tree/usr/share/doc" -type l -delete
  find "$tree/usr/share/doc" -type d -empty -delete
  rm -rf "$tree"/usr/share/{groff,info,linda,lintian,man,locale}/* \
    "$tree"/var/lib/apt/lists/* "$tree"/var/cache/apt/* "$tree"/var/log/* \
    "$tree"/var/cache/ldconfig/aux-cache "$tree"/var/lib/dpkg/*-old
  # And what later packages bring of them.
  {
    printf 'path-exclude /usr/share/%s/*\n' doc groff info linda lintian locale man
    echo 'path-include /usr/share/doc/*/copyright'
  } >"$tree/etc/dpkg/dpkg.cfg.d/docker"
  echo 'APT::Install-Recommends "false";' >"$tree/etc/apt/apt.conf.d/50slim"
}

# A subshell, so that its folder goes whatever happens.
make_base() (
  work="$(mktemp -d "$tools/.base.XXXXXX")"
  trap 'rm -rf "$work"' EXIT
  # It mounts /proc in there; in a namespace of its own that goes with it.
  if ! unshare --mount --propagation private debootstrap --variant=minbase --arch=amd64 \
    bookworm "$work/tree" "$mirror" >"$work/log" 2>&1; then
    tail -n 20 "$work/log" >&2
    if grep -q 'Failed getting release file' "$work/log"; then
      echo "image: the base cannot be had, $mirror does not answer" >&2
      exit 3
    fi
    exit 1
  fi
  slim "$work/tree"
  rm -f "$work/tree/etc/apt/sources.list"
  printf 'deb %s bookworm main\ndeb %s bookworm-updates main\ndeb %s-security bookworm-security main\n' \
    "$mirror" "$mirror" "$mirror" >"$work/tree/etc/apt/sources.list"
  tar --create --directory "$work/tree" --one-file-system --numeric-owner --file "$work/base.tar" .
  mv "$work/base.tar" "$base_tar"
)

image="$tools/image-$(key)"
if [[ -d "$image" ]]; then
  touch "$image"
  echo "$image"
  exit 0
fi
for program in buildah debootstrap; do
  if ! command -v "$program" >/dev/null; then
    echo "image: there is no $program here" >&2
    exit 3
  fi
done
if [[ "$(id -u)" -ne 0 ]]; then
  echo "image: unpacking Debian takes root" >&2
  exit 3
fi
if ! unshare --mount --propagation private true 2>/dev/null; then
  echo "image: root may not mount here (CAP_SYS_ADMIN), and buildah's steps take it" >&2
  exit 3
fi

# The machine's own mirror of Debian.
# Words of apt-get's, not ours.
# shellcheck disable=SC2016
mirror="$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 2>/dev/null |
  grep -m 1 -E '/debian/?$' || echo http://deb.debian.org/debian)"
mirror="${mirror%/}"

mkdir -p "$tools"
# Where copies of files are not shared, each layer takes all of its size.
if [[ "$(df --output=avail --block-size=1G "$tools" | tail -n 1)" -lt 8 ]]; then
  echo "image: building it takes 8 GB, and $tools has less" >&2
  exit 3
fi
exec 8>"$tools/.image.lock"
flock 8
SECONDS=0
# What is kept of earlier sources adds up, where copies of files are not shared.
if [[ -d "$tools/containers" && "$(du --summarize --block-size=1G "$tools/containers" | cut -f 1)" -ge 10 ]]; then
  rm -rf "$tools/containers"
fi
if [[ ! -f "$base_tar" ]]; then
  echo "image: debootstrap" >&2
  make_base
fi
work="$(mktemp -d "$tools/.image.XXXXXX")"
container=""
clean_up() {
  if [[ -n "$container" ]]; then
    buildah "${storage[@]}" rm "$container" >/dev/null || true
  fi
  rm -rf "$work" "$tools/containers-run"
}
trap clean_up EXIT

if ! buildah "${storage[@]}" inspect --type image "$base_name" >/dev/null 2>&1; then
  container="$(buildah "${storage[@]}" from scratch)"
  buildah "${storage[@]}" add --quiet "$container" "$base_tar" / >/dev/null
  buildah "${storage[@]}" config --cmd '["bash"]' "$container"
  buildah "${storage[@]}" commit --quiet --rm --timestamp 0 "$container" "$base_name" >/dev/null
  container=""
fi
container="$(buildah "${storage[@]}" from --pull-never "$base_name")"
if ! buildah "${storage[@]}" run "$container" true >"$work/log" 2>&1; then
  echo "image: buildah runs no commands here: $(tail -n 1 "$work/log")" >&2
  exit 3
fi
buildah "${storage[@]}" rm "$container" >/dev/null
container=""
# Network and names are the host's: chroot isolation has no others. --layers keeps the stage with
# the build's packages for the next time.
buildah "${storage[@]}" build --pull-never --layers --format docker --timestamp 0 \
  --tag localhost/certiq:test . >&2
container="$(buildah "${storage[@]}" from --pull-never localhost/certiq:test)"
mounted="$(buildah "${storage[@]}" mount "$container")"
mkdir "$work/image"
cp -a "$mounted" "$work/image/root"
buildah "${storage[@]}" inspect --type image localhost/certiq:test >"$work/image/config"
# As "docker images" counts: every file's bytes, those of links once.
tar --create --directory "$work/image/root" . | wc -c >"$work/image/size"
echo "$SECONDS" >"$work/image/seconds"
# Other clones may be at work with theirs, but not for days.
find "$tools" -maxdepth 1 -name 'image-*' -mmin +2880 -exec rm -rf {} +
mv "$work/image" "$image"
echo "image: $(basename "$image") took $SECONDS s" >&2
echo "$image"
