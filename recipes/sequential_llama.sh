#!/usr/bin/env bash
# Several domains in a row with all its set-up; options go through to recipes/sequential_llama.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash .ci/venv.sh .venv recipes
.venv/bin/python recipes/sequential_llama.py "$@"
