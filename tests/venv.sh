#!/usr/bin/env bash
# Makes a folder with Python packages; again when the lists of packages change.
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
if [[ -x "$venv/bin/python" && -f "$venv/made_from" && "$(<"$venv/made_from")" == "$wanted" ]]; then
  exit 0
fi
echo "venv: making $venv"
rm -rf "$venv"
"$python" -m venv "$venv"
options=()
for requirements in "$@"; do
  options+=(--requirement "$requirements")
done
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${options[@]}"
printf '%s\n' "$wanted" >"$venv/made_from"
