#!/usr/bin/env bash
# The short tests on the oldest or the newest packages that pyproject.toml allows, in an environment of their own.
#
#   scripts/test_versions.sh lowest|newest PYTHON [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
which=$1 python=$2
shift 2
env=build/versions/$which
pip="$env/bin/python -m pip install --quiet --disable-pip-version-check"

rm -rf "$env"
"$python" -m venv "$env"
case $which in
  lowest) pins=constraints-lowest.txt ;;
  newest) pins=$env/none.txt; grep '^torch==' constraints.txt > "$env/wanted.txt"; : > "$pins" ;;
  *) echo "give lowest or newest, not $which" >&2; exit 2 ;;
esac
"$env/bin/python" scripts/install_torch.py "$([ "$which" = lowest ] && echo "$pins" || echo "$env/wanted.txt")" "$env/pins.txt"
# Of the newest only torch is held, at the CPU build that was found; everything else is what pip takes.
cat "$pins" | grep -v '^torch==' >> "$env/pins.txt" || true
$pip -c "$env/pins.txt" scikit-build-core pybind11 cmake ninja
$pip -c "$env/pins.txt" --no-build-isolation --only-deps '.[run,trl,sklearn,test]'
$pip --no-build-isolation --no-deps .
"$env/bin/python" -m cropi env
OMP_NUM_THREADS=1 "$env/bin/python" -m pytest -q -m "not slow" -n 2 tests/kernels tests/sketcher tests/cropi tests/trainers "$@"
