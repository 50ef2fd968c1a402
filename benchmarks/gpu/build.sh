# shellcheck shell=bash
# What the GPU suite builds and runs beside its Python parts: `bash benchmarks/gpu/build.sh build|cuda|sanitize TOOL SCRIPT|counters`,
# from the repository's root, with PYTHON naming the interpreter.
set -u
PYTHON=${PYTHON:-python3}
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer, ncu

build() {
  local pybind
  pybind=$("$PYTHON" -m pybind11 --cmakedir) || return 1
  cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -Dpybind11_DIR="$pybind" \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DPYTHON_EXECUTABLE="$(command -v "$PYTHON")" || return 1
  cmake --build build/gpu --parallel "$(nproc)" || return 1
  cp build/gpu/_C*.so cropi_kernels/
  "$PYTHON" -c "import torch, cropi_kernels as c; print(c.explain(torch.zeros(1, device='cuda')))"
}

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

sanitize() { # TOOL SCRIPT: memory errors of whole programs, and races in shared memory
  # Every tensor its own allocation: an access past its end would otherwise land in a neighbour and pass.
  local run=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --print-limit 1000)
  local script=("$PYTHON" "benchmarks/gpu/$2.py" --small "$1")
  if [ "$1" = racecheck ]; then
    "${run[@]}" "${script[@]}" | "$PYTHON" benchmarks/gpu/races.py
    local codes=("${PIPESTATUS[@]}")
    return $((codes[0] > codes[1] ? codes[0] : codes[1]))
  fi
  "${run[@]}" --error-exitcode 9 "${script[@]}"
}

counters() { # the hardware's counters of three kernels; the clocks stay as they are
  local metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,lts__throughput.avg.pct_of_peak_sustained_elapsed,sm__issue_active.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
  ncu --clock-control none --metrics "$metrics" --kernel-name regex:"slab_turns_kernel|slab_kernel|fold_kernel|norm_kernel" \
    --csv "$PYTHON" benchmarks/gpu/counted.py
}

"$@"
