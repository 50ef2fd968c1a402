#!/usr/bin/env bash
# The short tests on the oldest or the newest packages that pyproject.toml allows, in an environment of their own.
#
#   scripts/test_versions.sh lowest|newest PYTHON [pytest's arguments]
#
# TORCH=2.13.0 takes that torch: not every index has a CPU build of the oldest one, or of one newer than that of
# constraints.txt, with which everything else is tested.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:?lowest or newest} python=${2:?an interpreter, such as python3.12}
shift 2
case $which in
  lowest) pins=constraints-lowest.txt torch=constraints-lowest.txt more= ;;
  newest) pins=/dev/null torch=constraints.txt more=,triton ;;
  *) echo "give lowest or newest, not $which" >&2; exit 2 ;;
esac
env=build/versions/$which
pip="$env/bin/python -m pip install --quiet --disable-pip-version-check"

rm -rf "$env"
"$python" -m venv "$env"
# The pip that an interpreter brings may not know --only-deps yet.
$pip "$(grep '^pip==' constraints.txt)"
version=${TORCH:-$(sed -n 's/^torch==//p' $torch)}
{ echo "torch==$version"; grep -v '^torch==' $pins || true; } > "$env/wanted.txt"
"$env/bin/python" scripts/install_torch.py "$env/wanted.txt" "$env/pins.txt"
$pip -c "$env/pins.txt" scikit-build-core hatch-fancy-pypi-readme pybind11 cmake ninja
$pip -c "$env/pins.txt" --no-build-isolation --only-deps ".[run,trl,sklearn,test$more]"
# Editable: the tests put the repository on the path, where a package without its compiled module would come first.
$pip --no-build-isolation --no-deps --editable .
"$env/bin/python" -m cropi env
export OMP_NUM_THREADS=1
"$env/bin/python" -m pytest -q -m "not slow" -n 2 tests/kernels tests/sketcher tests/cropi tests/trainers "$@"
# Triton is the one dependency with which results are compiled. How well it compiles (tests/gpu/aot) is a fact of one release.
# Where pytest's arguments choose none of these, it ends with 5.
[ "$which" = lowest ] || "$env/bin/python" -m pytest -q -n 2 tests/gpu/test_gpu_kernels.py "$@" || [ $? = 5 ]
