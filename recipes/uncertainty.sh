#!/usr/bin/env bash
# Uncertainty of an adapter by every method, with all its set-up; options go through to recipes/uncertainty.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/python recipes/uncertainty.py "$@"
