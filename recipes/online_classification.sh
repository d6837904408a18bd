#!/usr/bin/env bash
# Online classification with all its set-up; options go through to recipes/online_classification.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/python recipes/online_classification.py "$@"
