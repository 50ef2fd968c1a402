#!/usr/bin/env bash
# Everything that needs a GPU, in calls of at most nine minutes on a bare machine: builds the package in place, takes a
# first look, measures, holds every op to its oracle, and keeps rows and logs in one archive after every part, a table at the end.
# A part that fails is recorded and the rest still runs; the exit status is 1 if any part failed.
#
# A call takes the parts whose limits fit, and goes on with others while parts leave time of their limits. A second call
# goes on where the first one ended: its parts that are done are not run again, and the rows of one that was stopped are
# kept. The machine may be another one, if the archive is brought along. What no GPU has run yet comes first; it alone, in
# some three minutes: GPU_SUITE_PARTS="build new warm variants counters".
#
#   PYTHON=python3          an interpreter with a CUDA build of torch, triton, transformers, pybind11
#   GPU_SUITE_OUT=folder    for raw rows and logs (default: build/gpu_suite)
#   GPU_SUITE_KEEP=folder   gets gpu_suite.tgz after every part, gpu.md at the end (default: benchmarks/results)
#   GPU_SUITE_FROM=file     the gpu_suite.tgz of an earlier call
#   GPU_SUITE_PARTS="..."   these parts alone, done or not: build warm new variants counters first passes correctness sketch model; logprob new_times jobs model_7b
#                           model_moe cuda project_correctness project sanitizer_memcheck sanitizer_racecheck
#   GPU_SUITE_SECONDS=540   of the whole call
#   GPU_SUITE_COMMIT=sha    where the tree is no git checkout
#   CUDACXX=nvcc            the compiler of the CUDA kernels; without one, `project` is measured in Triton alone
set -u
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" benchmarks/gpu/suite.py
