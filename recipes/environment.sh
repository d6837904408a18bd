# Sourced by the scripts beside it: the repository's folder, and a virtual environment with all that the recipes need.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash .ci/venv.sh .venv recipes
