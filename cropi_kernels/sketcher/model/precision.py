"""In which precision a scoring pass runs: that of the weights, whatever autocast a trainer has put around the model;
and how exact its products are.

A fused pass calls the decoder and the head apart. A trainer with mixed precision wraps the whole model's forward in
autocast, which neither part sees: the parts would run in one precision, and the model that they are compared with in
another. So autocast applies to neither: it is switched off around every scoring pass, and the trainer's wrapper is
taken off for as long as the whole model is asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import CellType, MethodType
from typing import Any

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `DistributedDataParallel`, `DataParallel` and `torch.compile`'s module, in any order.

    Their parameters are the model's own, whole on this rank. Sharding wrappers (FSDP, DeepSpeed) are left: theirs are
    not.
    """
    while True:
        inside: Any = None
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inside = model.module
        elif "_orig_mod" in model._modules:
            inside = model._modules["_orig_mod"]
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def check_adapters(model: nn.Module) -> None:
    """Adapters that are merged into their base weights (PEFT) take no part in a forward.

    Raises:
        ValueError: some are, and are to be sketched: all their gradients would be zero.
    """
    for name, module in model.named_modules():
        if getattr(module, "merged_adapters", None) and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"{name}: the adapter {module.merged_adapters[0]!r} is merged into its base weights and has no "
                "gradient: call model.unmerge_adapter() first, or sketch the base (merge_and_unload)"
            )


def invocation_tokens(model: nn.Module) -> list[int]:
    """The tokens behind which a PEFT model's adapters are active (aLoRA); none for all other adapters."""
    configs = getattr(model, "peft_config", None)
    named = (getattr(one, "alora_invocation_tokens", None) for one in dict(configs or {}).values())
    return next((list(tokens) for tokens in named if tokens), [])


def trained_tokens(model: nn.Module) -> list[int]:
    """The tokens whose rows of an embedding are trained alone (PEFT's trainable tokens), in order."""
    held = (getattr(module, "token_indices", None) for module in model.modules())
    return sorted({i for one in held if isinstance(one, dict) for tokens in one.values() for i in tokens})


def product_eps(x: torch.Tensor) -> float:
    """eps of the arithmetic that makes products like ``x`` on its device: of tf32 or bfloat16 where products of float32
    matrices may be rounded to these, else of ``x``'s own dtype.

    transformers' `TrainingArguments` turn tf32 on by default, on every GPU that has it.
    """
    own = torch.finfo(x.dtype).eps
    if x.dtype != torch.float32:
        return own
    matmul = torch.backends.cuda.matmul if x.is_cuda else getattr(torch.backends.mkldnn, "matmul", None)
    # An older torch has the older switch alone. It cannot be read where the newer one was set: RuntimeError.
    chosen = getattr(matmul, "fp32_precision", None)
    if chosen is None and x.is_cuda:
        chosen = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    elif chosen is None:  # oneDNN rounds at "medium", and nothing at "high"
        chosen = "bf16" if torch.get_float32_matmul_precision() == "medium" else "ieee"
    return {"tf32": 2.0**-10, "bf16": 2.0**-7}.get(chosen, own)


def unit_roundoff(x: torch.Tensor) -> float:
    """The unit roundoff of sums of ``x``. Sketches are float32, so it is at least that of float32."""
    return max(product_eps(x) / 2, 2.0**-24)


def smallest(x: torch.Tensor) -> float:
    """Half the distance of two subnormal numbers of ``x``'s dtype: the most that a smaller number loses."""
    info = torch.finfo(x.dtype)
    return float(info.tiny * info.eps / 2)


def autocast_eps(device: torch.device) -> float:
    """eps of the dtype to which autocast rounds the operands of products now; 0 without autocast."""
    kind = device.type
    return torch.finfo(torch.get_autocast_dtype(kind)).eps if torch.is_autocast_enabled(kind) else 0.0


@contextlib.contextmanager
def own_precision(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Everything inside runs in the dtypes of the weights: no autocast of the caller's, and none around ``model``.

    ``device``: of the weights; None: it is looked up.
    """
    # Not of every parameter: a walk takes a millisecond in which a GPU has nothing to do.
    device = device or next((p.device for p in model.parameters()), None)
    kinds = {"cpu", "cuda", "xpu"} | ({device.type} if device else set()) - {"meta"}
    with contextlib.ExitStack() as stack:
        for kind in sorted(kinds):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for part in _called(model):
            stack.enter_context(_bare_forward(part))
        yield


def _called(model: nn.Module) -> list[nn.Module]:
    """The model, and the ones inside of a PEFT model, whose own forward an earlier trainer may have wrapped."""
    parts = [model]
    for name in ("base_model", "model"):
        if isinstance(inside := parts[-1]._modules.get(name), nn.Module):
            parts.append(inside)
        else:
            break
    return parts


@contextlib.contextmanager
def _bare_forward(model: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        here = model.forward
        if (bare := _bound(without_autocast(here), model)) is not None:
            before = model.__dict__.get("forward")
            model.forward = here = bare
            stack.callback(_put_back, model, before)
        # What a trainer put there may call what an earlier one had put there: TRL's, of a model that TRL has trained.
        seen: list[CellType] = []
        while (cell := _holding(here, model)) is not None and cell not in seen:
            seen.append(cell)
            here = inside = cell.cell_contents
            if (bare := _bound(without_autocast(inside), model)) is not None:
                cell.cell_contents = here = bare
                stack.callback(setattr, cell, "cell_contents", inside)
        yield


def _put_back(model: nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        del model.forward
    else:
        model.forward = before


def _bound(forward: Callable[..., Any] | None, model: nn.Module) -> Callable[..., Any] | None:
    return forward if forward is None or hasattr(forward, "__self__") else MethodType(forward, model)


def _holding(forward: Callable[..., Any], model: nn.Module) -> CellType | None:
    """The variable of a function's, if there is one, that holds another method of the model: what it calls."""
    for cell in getattr(getattr(forward, "__func__", forward), "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a variable without a value
            held = cell.cell_contents
            if isinstance(held, MethodType) and held.__self__ is model:
                found: CellType = cell
                return found
    return None


def without_autocast(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that ``forward`` calls under autocast; None where no autocast wrapper is around it.

    The wrappers of ``torch.autocast(...)(function)`` and of accelerate (autocast, and outputs turned to float32) are
    taken off. Another wrapper around them may change what the model computes: then nothing is taken off.
    """
    bare, here = None, getattr(forward, "__func__", forward)
    while hasattr(here, "__wrapped__") and (_is_autocast(here) or _is_accelerate(here)):
        bare = here.__wrapped__ if _is_autocast(here) else bare
        here = here.__wrapped__
    return bare


def _is_autocast(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_name == "decorate_autocast" and "amp" in code.co_filename


def _is_accelerate(function: Any) -> bool:
    # By where it was written: wrappers take over the name and module of what they wrap.
    code = getattr(function, "__code__", None)
    module = type(function).__module__ if code is None else code.co_filename.replace("\\", "/")
    return module.startswith("accelerate.") or "/accelerate/" in module
