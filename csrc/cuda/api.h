// The library's C interface: plain numbers and addresses, no Python and no torch, so that one build serves all of them.
// It is loaded at run time; loading needs no driver. The emulation of tests/ has the same interface.
#pragma once
#include <cstdint>

#include "cuda/project_shape.h"

#define CROPI_API extern "C" __attribute__((visibility("default")))

CROPI_API int cropi_abi();                          // rises with every change of what follows
CROPI_API const char* cropi_error_text(int error);  // of a value that the functions below returned

// Bytes of device memory that cropi_project needs beside its operands.
CROPI_API int64_t cropi_project_workspace(const cropi::gpu::ProjectCall* call, int dense);

// y += scale * S x, or with `adjoint` x = scale * S^T y, on the current device, in the order of `stream`. 0, or an error.
CROPI_API int cropi_project(const cropi::gpu::ProjectCall* call, int dense, int adjoint, void* workspace, void* stream);
