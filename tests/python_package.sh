#!/usr/bin/env bash
# Makes build/venv-python and installs client/python into it, as it lies here; its modules are
# generated from proto/ anew.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tests/venv.sh" venv-python requirements-python.txt
# What building takes is in the environment already: the network is asked for nothing.
"$root/build/venv-python/bin/python" -m pip install --quiet --disable-pip-version-check \
  --no-deps --no-build-isolation --editable "$root/client/python"
