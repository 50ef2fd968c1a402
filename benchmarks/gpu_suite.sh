#!/usr/bin/env bash
# Everything that needs a GPU, in one command and below nine minutes on an H100: builds the package in place, holds
# every op to its oracle, runs the sanitizer, measures, and writes benchmarks/results/gpu.md.
# A part that fails is recorded and the rest still runs; the exit status is 1 if any part failed.
#
#   PYTHON=python3          an interpreter with a CUDA build of torch, triton, transformers, pybind11
#   GPU_SUITE_OUT=folder    for raw rows and logs (default: build/gpu_suite)
#   GPU_SUITE_RESULT=file   the table (default: benchmarks/results/gpu.md)
#   GPU_SUITE_PARTS="..."   some of: build cuda correctness project_correctness sketch logprob project model sanitizer
#                           report
#   CUDACXX=nvcc            the compiler of the CUDA kernels; without one, `project` is measured in Triton alone
#   GPU_SUITE_SECONDS=520   after this time no further part starts
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export GPU_SUITE_OUT=${GPU_SUITE_OUT:-$PWD/build/gpu_suite}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PATH=$PATH:/usr/local/cuda/bin  # compute-sanitizer
PARTS=${GPU_SUITE_PARTS:-build cuda correctness project_correctness sketch logprob project model sanitizer report}
LIMIT=${GPU_SUITE_SECONDS:-520}
mkdir -p "$GPU_SUITE_OUT"
rm -f "$GPU_SUITE_OUT"/*.jsonl "$GPU_SUITE_OUT"/*.log "$GPU_SUITE_OUT/status.txt"
failed=0

# part NAME SECONDS COMMAND...: runs it with a limit of its own and of what is left.
part() {
  local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) start=$SECONDS rc
  shift 2
  if ((left < 10)); then
    echo "$name: not run, the time was up" | tee -a "$GPU_SUITE_OUT/status.txt"
    failed=1
    return
  fi
  timeout -k 5 $((seconds < left ? seconds : left)) "$@" > "$GPU_SUITE_OUT/$name.log" 2>&1
  rc=$?
  echo "$name: $( ((rc == 0)) && echo done || echo "failed ($rc)") in $((SECONDS - start)) s" | tee -a "$GPU_SUITE_OUT/status.txt"
  if ((rc != 0)); then
    failed=1
    tail -n 15 "$GPU_SUITE_OUT/$name.log"
  fi
}

build() {
  local pybind
  pybind=$("$PYTHON" -m pybind11 --cmakedir) || return 1
  cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -Dpybind11_DIR="$pybind" \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DPYTHON_EXECUTABLE="$(command -v "$PYTHON")" || return 1
  cmake --build build/gpu --parallel "$(nproc)" || return 1
  cp build/gpu/_C*.so cropi_kernels/
  "$PYTHON" -c "import torch, cropi_kernels as c; print(c.explain(torch.zeros(1, device='cuda')))"
}
export -f build
export PYTHON

find_nvcc() { # CUDACXX, PATH, the usual folders, then the wheels that torch came with
  local site candidate
  site=$("$PYTHON" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
  for candidate in "${CUDACXX:-}" "$(command -v nvcc)" "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" /usr/local/cuda*/bin/nvcc \
    "$site"/nvidia/cu13/bin/nvcc "$site"/nvidia/cuda_nvcc/bin/nvcc; do
    if [ -n "$candidate" ] && "$candidate" --version > /dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
}
export -f find_nvcc

# Apart from `build`: without it everything but backend="cuda" still works.
cuda() {
  local nvcc pybind arch
  nvcc=$(find_nvcc)
  if [ -z "$nvcc" ]; then
    echo "no nvcc (CUDACXX names one): the CUDA kernels are not built, project runs in Triton"
    return 0
  fi
  pybind=$("$PYTHON" -m pybind11 --cmakedir) || return 1
  arch=$("$PYTHON" -c "import torch; print('%d%d-real' % torch.cuda.get_device_capability())") || return 1
  cmake -S . -B build/gpu_cuda -DCMAKE_BUILD_TYPE=Release -DCROPI_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" \
    -DCMAKE_CUDA_ARCHITECTURES="$arch" -Dpybind11_DIR="$pybind" -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -DPYTHON_EXECUTABLE="$(command -v "$PYTHON")" || return 1
  cmake --build build/gpu_cuda --target cropi_cuda --parallel "$(nproc)" || return 1
  cp build/gpu_cuda/libcropi_cuda.so cropi_kernels/
  "$PYTHON" -c "import torch, cropi_kernels as c; print(c.explain(torch.zeros(1, device='cuda')))" | tee /dev/stderr |
    grep -q "^cuda *serves" # what was built must load
}
export -f cuda

sanitize() { # TOOL SCRIPT: memory errors of whole programs, and races in shared memory
  # Every tensor its own allocation: an access past its end would otherwise land in a neighbour and pass.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "$PYTHON" "benchmarks/gpu/$2.py" --small "$1"
}
export -f sanitize

for name in $PARTS; do
  case $name in
    build) part build 120 bash -c build ;;
    cuda) part cuda 120 bash -c cuda ;;
    project_correctness) part project_correctness 60 "$PYTHON" benchmarks/gpu/project_correctness.py ;;
    project) part project 80 "$PYTHON" benchmarks/gpu/project.py ;;
    correctness) part correctness 150 "$PYTHON" benchmarks/gpu/correctness.py ;;
    sketch) part sketch 130 "$PYTHON" benchmarks/gpu/sketch.py ;;
    logprob) part logprob 60 "$PYTHON" benchmarks/gpu/logprob.py ;;
    model) part model 120 "$PYTHON" benchmarks/gpu/model.py ;;
    sanitizer)
      for tool in memcheck racecheck; do
        part "sanitizer_project_$tool" 40 bash -c "sanitize $tool project_correctness"
        part "sanitizer_$tool" 60 bash -c "sanitize $tool correctness"
      done
      ;;
    report) "$PYTHON" benchmarks/gpu/report.py ${GPU_SUITE_RESULT:+"$GPU_SUITE_RESULT"} || failed=1 ;;
    *)
      echo "unknown part: $name" >&2
      failed=1
      ;;
  esac
done
exit $failed
