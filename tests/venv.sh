#!/usr/bin/env bash
# Makes build/venv with the packages of requirements.txt; again when they change.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/build/venv"
requirements="$root/tests/requirements.txt"
# Debian's own, whatever else is first in PATH.
python=/usr/bin/python3

wanted="$(cat "$requirements"; "$python" --version; echo "$venv")"
if [[ -x "$venv/bin/python" && -f "$venv/made_from" && "$(<"$venv/made_from")" == "$wanted" ]]; then
  exit 0
fi
echo "venv: making $venv"
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
printf '%s\n' "$wanted" >"$venv/made_from"
