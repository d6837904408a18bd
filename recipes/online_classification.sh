#!/usr/bin/env bash
# Online classification with all its set-up; options go through to recipes/online_classification.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash .ci/venv.sh .venv recipes
.venv/bin/python recipes/online_classification.py "$@"
