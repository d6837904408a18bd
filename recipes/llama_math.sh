#!/usr/bin/env bash
# The main job with all its set-up; options go through to recipes/llama_math.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/accelerate launch --num_processes "${NUM_PROCESSES:-1}" recipes/llama_math.py "$@"
