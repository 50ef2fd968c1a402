#!/usr/bin/env bash
# Try the verl adapters against one release of verl, in an environment of its own over an existing one.
#
#   test_verl.sh VERSION ENVIRONMENT [PYTEST OPTIONS]
#
# verl's pins (numpy below 2, an older transformers) would tear down the environment that everything else is tested in,
# so its wheel goes in without its dependencies, and what its data and trainer modules import is added. No CUDA.
set -euo pipefail
version=${1:?a version of verl, such as 0.9.1} base=${2:?the environment that make build made: .venv}
shift 2
venv=build/verl-$version
if [ ! -e "$venv/ready" ]; then
  "$base/bin/python" -m venv "$venv"
  # Not the folder's bare path: then the .pth files inside it, the editable install's among them, would not be read.
  "$base/bin/python" -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
    > "$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/base.pth"
  pins=$base/constraints.txt
  [ -e "$pins" ] || pins=constraints.txt
  # hydra-core wants an older antlr4 than math-verify, which nothing here uses.
  grep -v '^antlr4' "$pins" > "$venv/pins.txt"
  pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
  pip --no-deps "verl==$version"
  # pip names the pins of verl that these packages break; the adapters are tried without them.
  pip -c "$venv/pins.txt" ray 'hydra-core>=1.3' codetiming dill torchdata pylatexenc datasets pybind11 pandas cachetools msgspec pyzmq \
    tensorboard orjson importlib_metadata pyvers aiohttp uvicorn fastapi TransferQueue
  # Last, in place of a newer one that TransferQueue takes: both releases of verl want at most 0.10.0.
  pip --no-deps tensordict==0.10.0
  touch "$venv/ready"
fi
"$venv/bin/python" -m pytest tests/trainers/test_verl.py tests/trainers/test_verl_files.py -p no:cacheprovider "$@"
