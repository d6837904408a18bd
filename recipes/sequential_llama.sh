#!/usr/bin/env bash
# Several domains in a row with all its set-up; options go through to recipes/sequential_llama.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/python recipes/sequential_llama.py "$@"
