#!/usr/bin/env bash
# Learning against forgetting as a grid, with all its set-up; options go through to recipes/compare.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/python recipes/compare.py "$@"
