#!/usr/bin/env bash
# All checks, in a virtual environment of their own: format, lint, types, tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash .ci/venv.sh .venv-test dev
bin=.venv-test/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/pyright --pythonpath $bin/python
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $bin/python -m pytest "$@"
