#!/usr/bin/env bash
# Makes a virtual environment with the packages of some requirements files; again when they change.
#
#   bash tests/venv.sh                       build/venv with tests/requirements.txt
#   bash tests/venv.sh NAME FILE...          build/NAME with those of tests/FILE...
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ $# -eq 0 ]]; then
  set -- venv requirements.txt
fi
venv="$root/build/$1"
shift
files=()
options=()
for name in "$@"; do
  files+=("$root/tests/$name")
  options+=(--requirement "$root/tests/$name")
done
# Debian's own, whatever else is first in PATH.
python=/usr/bin/python3

wanted="$(cat "${files[@]}"; "$python" --version; echo "$venv")"
if [[ -x "$venv/bin/python" && -f "$venv/made_from" && "$(<"$venv/made_from")" == "$wanted" ]]; then
  exit 0
fi
echo "venv: making $venv"
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${options[@]}"
printf '%s\n' "$wanted" >"$venv/made_from"
