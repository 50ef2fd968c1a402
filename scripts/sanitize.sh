#!/usr/bin/env bash
# The C++ kernels under a sanitizer: builds the module once more, beside the installed one, and runs the kernels' tests on it.
#
#   scripts/sanitize.sh address [VENV] [pytest arguments]    memory errors and undefined behaviour (ASan, UBSan)
#   scripts/sanitize.sh thread  [VENV] [pytest arguments]    data races (TSan)
#
# Python and torch are not instrumented: what is watched is csrc/, and every read and write that it makes of their memory.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?address or thread}
venv=${2:-.venv}
shift $(($# < 2 ? $# : 2))
case $kind in
  address) flags=address,undefined library=libasan.so ;;
  thread) flags=thread library=libtsan.so ;;
  *) echo "$kind: give address or thread" >&2; exit 2 ;;
esac
# Python is not linked with the sanitizer, which must be the first library of the process. After it comes libstdc++: else
# the sanitizer finds no throw of C++ to wrap, and the first test in which something is thrown ends the process.
library=$("${CXX:-c++}" -print-file-name=$library)
[ -e "$library" ] || { echo "the compiler has no $library: install gcc's sanitizer libraries" >&2; exit 1; }
library="$library $("${CXX:-c++}" -print-file-name=libstdc++.so)"

build=build/sanitize-$kind
venv=$(cd "$venv" && pwd)
PATH="$venv/bin:$PATH" cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=None -DCROPI_SANITIZE=$flags \
  -DPython_EXECUTABLE="$venv/bin/python" -Dpybind11_DIR="$("$venv/bin/python" -m pybind11 --cmakedir)" > "$build.log" \
  || { cat "$build.log"; exit 1; }
PATH="$venv/bin:$PATH" cmake --build "$build" --target _C

# Leaks are not asked for: an interpreter frees little at its end. Memory that torch and Python handle among themselves
# is theirs. With thread: addresses as older versions of TSan expect them (setarch -R), and 2 threads, or nothing can race.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:strict_init_order=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:second_deadlock_stack=1
export CROPI_SANITIZED="$PWD/$(ls "$build"/_C*.so)"
export PYTHONPATH="$PWD/tests" OMP_NUM_THREADS=$([ "$kind" = thread ] && echo 2 || echo 1)
# What a compiler makes of a graph, child processes and statistics over many seeds run no other line of csrc.
tests=(tests/kernels -m "not slow" -k "not compile and not graph and not inductor"
  --ignore tests/kernels/test_sketch_statistics.py --ignore tests/kernels/test_project_statistics.py
  --ignore tests/kernels/test_project_faces.py)
# Child processes again: TSan has a thread of its own in every process, and one test counts on there being none.
[ "$kind" = thread ] && tests=(tests/kernels -m "not slow" -k "(thread or callers or bits or same_time) and not child")
[ $# -gt 0 ] && tests=("$@")
exec setarch "$(uname -m)" -R env LD_PRELOAD="$library" "$venv/bin/python" -m pytest -p support.sanitized -p no:cacheprovider \
  -p no:xdist -q "${tests[@]}"
