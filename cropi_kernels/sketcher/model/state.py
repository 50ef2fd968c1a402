"""What state a model is in: whether its weights are loaded, its parts are compiled, and its code is as it was."""

from __future__ import annotations

from torch import nn


def check_loaded(model: nn.Module) -> None:
    """Raise ValueError where a parameter has no values."""
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(
            f"parameters of {type(model).__name__} are on the meta device: they are not loaded, or a device_map has "
            "moved them to the disk or to the host; load the model whole on one device (device_map=None)"
        )


def inside_compiled(model: nn.Module) -> set[nn.Module]:
    """The modules that torch.compile has compiled, and all modules inside them."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        forward = vars(module).get("forward")
        if (
            getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(module, "_orig_mod")
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            inside.update(module.modules())
    return inside


def attention_of(model: nn.Module) -> str | None:
    """The kind of attention that transformers has a model compute; None where it does not say."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def code_shape(model: nn.Module) -> tuple[object, ...]:
    """Equal as long as no module, class, hook, or forward of an instance has come or gone, and attention is of one
    kind."""
    return attention_of(model), *(
        (
            id(module),
            type(module),
            id(vars(module).get("forward")),
            getattr(module, "_compiled_call_impl", None) is not None,
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks),
            tuple(id(p) for p in module._parameters.values()),
            tuple(len(p._backward_hooks or ()) for p in module._parameters.values() if p is not None),
        )
        for module in model.modules()
    )
