"""The ``cropi`` operator namespace: one library object, to which every op folder adds its schemas and kernels.

A schema takes tensors, numbers and strings: a plan or a spec goes in by its recipe. An op that adds to a
tensor says so (``Tensor(a!) out``) and returns nothing; what other ops return is new memory. Every op is opaque to
autograd: a call from the public functions detaches its operands, the two families that have a gradient
(`linear_logprob`, `project`) register one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import autograd, library
from torch.autograd import forward_ad

from . import _fork, _native, memory
from ._arguments import tensors_of

F = TypeVar("F", bound=Callable[..., Any])
NAMESPACE = "cropi"
LIB = library.Library(NAMESPACE, "DEF")  # kept alive here: its ops vanish with it


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, remedy: str
) -> torch._ops.OpOverload[..., Any]:
    """Define an op, with one kernel for all devices (it chooses the backend itself) and the shapes for tracing.

    ``remedy`` is what its caller can do when the device's memory is full. Returns the op.

    Operands that begin between two elements are copied; what the op writes must not, which is a ValueError.
    """
    name = schema.split("(")[0]
    arguments = schema.split(") -> ")[0].split(", ")
    written = [(i, argument.split()[-1]) for i, argument in enumerate(arguments) if "!)" in argument]

    @functools.wraps(kernel)
    def explained(*args: Any) -> Any:
        _fork.one_thread_after_fork()
        for i, operand in written:
            refuse_misaligned(operand, args[i])
            _refuse_inference(operand, args[i])
        changed = [args[i] for i, _ in written]
        args = tuple(_native.aligned(a) if isinstance(a, torch.Tensor) else a for a in args)
        try:
            with no_autocast(*args):
                return kernel(*args)
        except ValueError:  # the check of the operands, before anything is written
            changed = []
            raise
        except torch.OutOfMemoryError as error:
            raise memory.explain(f"{NAMESPACE}::{name}", error, remedy, args) from error
        finally:
            # Kernels write by address, which autograd does not see: it would differentiate with what is there now.
            for x in changed:
                autograd.graph.increment_version(x)

    LIB.define(schema)
    LIB.impl(name, explained, "CompositeExplicitAutograd")
    library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIB)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def refuse_misaligned(name: str, x: torch.Tensor) -> None:
    if _native.misaligned(x):
        raise ValueError(
            f"{name} is {x.dtype} and begins at an address that is not a multiple of {x.element_size()}: give fresh "
            f"memory ({name}.clone())"
        )


def _refuse_inference(name: str, x: torch.Tensor) -> None:
    """PyTorch refuses it, too, but only once the kernel has written."""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} was made under torch.inference_mode(), outside of which it cannot be changed: give {name}.clone()"
        )


def no_autocast(*args: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round the operands of products in plain torch, and their sums, to bfloat16."""
    device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def without_derivative(function: F) -> F:
    """``function``, whose results are constants to autograd. Where they would lose a tangent, or a derivative of
    `torch.func`, it is an error by name; `backward()` finds by itself that there is nothing to differentiate."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _transformed():
            return function(*args, **kwargs)
        operands = tensors_of((*zip(names, args), *kwargs.items()))
        _refuse(function.__name__, "differentiate the same in plain torch", operands)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            functorch: Any = torch._C._functorch
            for name in (name for name, x in operands.items() if functorch.is_batchedtensor(x)):
                raise RuntimeError(
                    f"{function.__name__} does not run under torch.func.vmap, which hides the numbers of {name}: call "
                    "it once for all rows, without vmap"
                ) from error
            raise

    return call  # type: ignore[return-value]


def refuse_transforms(op: str, **operands: torch.Tensor | None) -> None:
    """PyTorch drops the tangent of an operator's operand without a word: `torch.func.jvp` would give zeros. In the
    reverse modes of `torch.func` it ends in a text about its own classes."""
    if _transformed():
        _refuse(op, "", {name: x for name, x in operands.items() if x is not None})


def _transformed() -> bool:
    """Whether derivatives in forward mode are on, or a transform of `torch.func`."""
    functorch: Any = torch._C._functorch
    on: bool = forward_ad._current_level >= 0
    return on or (not torch.compiler.is_compiling() and functorch.peek_interpreter_stack() is not None)


def _refuse(op: str, instead: str, operands: dict[str, torch.Tensor]) -> None:
    """``instead``: what may be done where the op has no derivative at all."""
    for name, x in operands.items():
        if forward_ad.unpack_dual(x).tangent is not None:
            remedy = instead or "differentiate in reverse, by backward() or torch.autograd.grad"
            raise RuntimeError(
                f"{op} has no derivative in forward mode, and {name} has a tangent (of torch.func.jvp or jacfwd, say): "
                f"{remedy}, or give {name}.detach()"
            )
        if not torch.compiler.is_compiling() and _differentiated(x):
            remedy = instead or "use backward() or torch.autograd.grad outside of torch.func"
            raise RuntimeError(
                f"{op} has no derivative under torch.func (grad, vjp, jacrev), and {name} is differentiated there: "
                f"{remedy}, or give {name}.detach()"
            )


def _differentiated(x: torch.Tensor) -> bool:
    """Whether a transform of `torch.func` takes derivatives with respect to ``x``, be it under others: it wraps what is
    detached, too."""
    functorch: Any = torch._C._functorch
    while torch.is_grad_enabled() and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = functorch.get_unwrapped(x)
    return False


def plain(x: torch.Tensor) -> torch.Tensor:
    """``x`` outside of autograd; ``x`` itself where it has no gradient, which is the rule."""
    return x.detach() if x.requires_grad else x
