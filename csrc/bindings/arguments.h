// What the Python side passes: addresses as integers, a matrix as a tuple.
#pragma once
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace cropi {

template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, rows, cols, row stride, dtype code)
inline MatrixView matrix(const pybind11::tuple& t) {
  return MatrixView{ptr<void>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
                    static_cast<DType>(t[4].cast<int>())};
}

// Other Python threads run while a kernel does.
template <class Args>
void call(void (*kernel)(const Args&), const Args& args) {
  pybind11::gil_scoped_release release;
  kernel(args);
}

}  // namespace cropi
