#!/usr/bin/env bash
# The main job with all its set-up; options go through to recipes/llama_math.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash .ci/venv.sh .venv recipes
.venv/bin/accelerate launch --num_processes "${NUM_PROCESSES:-1}" recipes/llama_math.py "$@"
