"""Models whose weights are spread over ranks: how FSDP2 is followed, and which other ways are refused.

FSDP2 (``fully_shard``) gathers a unit's weights when the unit is called, and hooks its outputs to gather them again in
backward. A scoring pass calls the decoder and the head apart. The decoder's embeddings may belong to the model around
it, so the pass runs as a method of that model, registered as one of its forwards. The head's weight is used directly,
and is gathered for as long as that takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from ... import frozen
from ...frozen import Linears
from .spread import is_spread

T = TypeVar("T")
_METHOD = "_cropi_pass"
_OTHER_AXES = {"pp": "pipeline", "cp": "context", "ep": "expert", "sp": "sequence"}


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 shards the module as a unit."""
    return hasattr(module, "set_reshard_after_backward") and hasattr(module, "unshard")


def units(model: nn.Module) -> list[Any]:
    # Every pass asks, and a walk over all modules takes milliseconds in which a GPU has nothing to do.
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    return [module for module in model.modules() if is_unit(module)]


def check_parallel(model: nn.Module) -> None:
    """Refuse the ways of spreading a model that a pass cannot follow.

    Raises:
        ValueError: FSDP1, FSDP2 of torch 2.6, DeepSpeed's engine or ZeRO-3, pipeline, context or expert parallel, or
            tensor parallel within FSDP2; names the supported way.
    """
    remedy = (
        "shard the model by torch.distributed.fsdp.fully_shard (FSDP2) or by tensor parallel alone, or give every rank "
        "the whole model"
    )
    # An earlier pass may have left a unit whole: then a tied weight is two, and other tensors stand for the parameters.
    reshard(model)
    inside = {type(m).__name__ for m in model.modules()}
    if "FullyShardedDataParallel" in inside:
        raise ValueError(f"{type(model).__name__} is wrapped by FullyShardedDataParallel (FSDP1): {remedy}")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} is sharded by DeepSpeed (ZeRO-3): {remedy}")
    if "DeepSpeedEngine" in inside:
        raise ValueError(
            f"{type(model).__name__} holds DeepSpeed's engine: give the model inside, engine.module, whose weights are "
            "whole on every rank up to ZeRO-2"
        )
    found = units(model)
    # That of torch 2.6 does not run on a CPU, where this is tested.
    if found and not hasattr(found[0], "set_reshard_after_forward"):
        raise ValueError(
            f"{type(model).__name__} is sharded by the FSDP2 of torch {torch.__version__}, which is not followed: "
            "install a newer torch"
        )
    inside_units = {id(p) for unit in found for p in unit.parameters()}
    for name, p in model.named_parameters():
        if not is_spread(p):
            continue
        mesh: Any = p.device_mesh  # type: ignore[attr-defined]
        axes = [kind for axis, kind in _OTHER_AXES.items() if axis in (mesh.mesh_dim_names or ())]
        shards = sum(not placement.is_replicate() for placement in p.placements)  # type: ignore[attr-defined]
        within = id(p) in inside_units
        if axes or mesh.ndim > 1 and (not within or shards > 1 or "tp" in (mesh.mesh_dim_names or ())):
            kind = f"{axes[0]} parallel" if axes else "tensor parallel within another sharding"
            raise ValueError(
                f"{name} is spread over ranks by {kind} (mesh {mesh.mesh_dim_names}, {p.placements}), which is not "  # type: ignore[attr-defined]
                f"followed; {remedy}"
            )
        if not within and inside_units:
            raise ValueError(
                f"{name} is spread over ranks by tensor parallel, and other parameters by FSDP2, which is not followed "
                f"together; {remedy}"
            )
    _check_ties(model)


def _check_ties(model: Any) -> None:
    """Refuse a tied weight whose modules are in different units: FSDP2 makes two weights of it."""
    if not units(model) or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    ends = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    weights = [getattr(end, "weight", None) for end in ends]
    if None not in ends and weights[0] is not weights[1]:
        raise ValueError(
            f"the embeddings and the head of {type(model).__name__} are tied by its configuration, but fully_shard has "
            "taken them apart: shard the whole model as one unit around its layers, fully_shard(model)"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over ranks."""
    return bool(units(model)) or any(is_spread(p) for p in model.parameters())


def largest(model: nn.Module, *numbers: int) -> list[int]:
    """The largest of the ranks' numbers, of each, where FSDP2 shards the model: all of them have to come here. Else the
    numbers themselves."""
    if not units(model):
        return list(numbers)
    p: Any = next(p for p in model.parameters() if is_spread(p))
    most = torch.tensor(numbers, device=device_of(model))
    for axis in range(p.device_mesh.ndim):
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, p.device_mesh.get_group(axis))
    return most.tolist()


def device_of(model: nn.Module) -> torch.device:
    """The device on which the model computes. Offloaded shards lie on another one."""
    p = next(model.parameters())
    if not is_spread(p):
        return p.device
    kind = p.device_mesh.device_type  # type: ignore[attr-defined]
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in their places: freezing and thawing works on those."""
    for unit in units(model):
        unit.reshard()


def through(root: Any, run: Callable[[], T]) -> T:
    """``run()`` as a forward of ``root``, whose own weights are whole meanwhile and again in backward.

    ``root`` None: plainly ``run()``.
    """
    if root is None:
        return run()
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(root, _METHOD, MethodType(lambda self: run(), root))
    try:
        register_fsdp_forward_method(root, _METHOD)
        return getattr(root, _METHOD)()
    finally:
        delattr(root, _METHOD)


def root_around(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    """The outermost unit with ``decoder`` inside; None where no unit is around the decoder."""
    around = [
        unit for unit in units(model) if unit is not decoder and any(m is decoder for m in unit.modules())
    ]
    return around[0] if around else None


@contextlib.contextmanager
def whole(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Inside, the module's own weights are whole without a call of it; a tensor-parallel rank's weights stay parts."""
    if not any(is_spread(p) for p in module.parameters(recurse=False)) or not units(model):
        yield
        return
    owner: Any = next(u for u in reversed(units(model)) if any(m is module for m in _of_unit(u)))
    owner.unshard()
    try:
        yield
    finally:
        owner.reshard()


def _of_unit(unit: Any) -> list[nn.Module]:
    """Modules whose parameters the unit gathers: several where units were made of a list of modules."""
    group = unit._get_fsdp_state()._fsdp_param_group
    own = [] if group is None else [p._module_info.module for p in group.fsdp_params]
    return [*own, *unit.modules()]


@contextlib.contextmanager
def hooked_whole(model: nn.Module, hooks: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """Hooks on the gradients of FSDP2's parameters, by the ids of the sharded parameters.

    Autograd sees the whole parameters, which take the places of the sharded ones while their unit runs: each is hooked
    when a module is called. FSDP2 spreads over the ranks what the hooks return.
    """
    reshard(model)
    places = {
        module: [
            (key, hooks[id(p)]) for key, p in module._parameters.items() if p is not None and id(p) in hooks
        ]
        for module in model.modules()
    }
    seen: list[torch.Tensor] = []
    handles: list[Any] = []

    def look(module: nn.Module, args: Any) -> None:
        for inner in module.modules():
            for key, hook in places.get(inner, ()):
                p: Any = inner._parameters[key]
                # A tap may have put a view in its place.
                p = p if p.is_leaf or p._base is None else p._base
                if is_spread(p) or not p.requires_grad or any(p is other for other in seen):
                    continue
                seen.append(p)
                handles.append(p.register_hook(hook))

    looked: Any = torch.compiler.disable(look)  # a compiled layer's graph ends there and goes on behind
    calls = [module.register_forward_pre_hook(looked) for module in model.modules()]
    # With mixed precision a gradient has the dtype of the computation, which torch would refuse for the parameter.
    spread: list[Any] = [p for p in model.parameters() if is_spread(p) and hasattr(p, "grad_dtype")]
    dtypes = [p.grad_dtype for p in spread]
    try:
        for p in spread:
            p.grad_dtype = None
        yield
    finally:
        for handle in [*calls, *handles]:
            handle.remove()
        reshard(model)
        for p, dtype in zip(spread, dtypes, strict=True):
            p.grad_dtype = dtype


@contextlib.contextmanager
def starting_over(model: nn.Module) -> Iterator[None]:
    """Bring FSDP2's units back to their first state where what runs inside fails: a pass may do so between its forward
    and its backward's end."""
    try:
        yield
    except BaseException:
        if sharded := units(model):
            # Of an older torch; or of a root that never ran.
            with contextlib.suppress(AttributeError, RuntimeError):
                sharded[0].reset_iter_state()
            reshard(model)
        raise


def linears_of(model: nn.Module, linears: Linears | None) -> Linears:
    """Which library multiplies by frozen weights: torch, where they are spread over ranks.

    Raises:
        ValueError: oneDNN is asked for by name, and weights are spread over ranks.
    """
    chosen = frozen.checked(linears)
    if not is_sharded(model):
        return chosen
    if chosen == "onednn":
        said = f"{frozen.VARIABLE}=onednn" if linears is None else "linears='onednn'"
        raise ValueError(
            f"{said} packs whole weights, and this model's are sharded: give linears='torch', or unset "
            f"{frozen.VARIABLE}"
        )
    return "torch"
