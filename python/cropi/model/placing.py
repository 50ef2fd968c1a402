"""Where a model runs, in which dtype, and how many tokens it takes at once, where the user leaves that open.

Device: the first CUDA device that torch sees, else the CPU. Dtype: float32 on a CPU, whose kernels are made for it; on
a GPU the checkpoint's own. Tokens a batch: 1024 on a CPU, where more gain nothing; on a GPU what fits into the memory
that the weights leave: see :func:`bytes_per_token`. None of them changes a sketch beyond rounding, but for the dtype of
the weights, which the store notes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cropi.errors import CropiError

if TYPE_CHECKING:
    from cropi.model.policy import Policy

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_TOKENS = 1024
# A step of tokens a batch; more than the most of them fill no GPU better.
STEP, MOST_TOKENS = 1024, 32768
# Of the free memory: the rest is for the log-probs of the head, sketches, and what the allocator cannot join.
SHARE = 0.5


def placed_device(device: Any) -> torch.device:
    """A device by its name; "auto": see above."""
    if str(device) != AUTO:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_device(option: str, device: str) -> None:
    """Check that torch can use a device; "auto" can always be.

    Args:
        option: what named it, for messages.
        device: its name.

    Raises:
        CropiError: no such device, none that there are kernels for, or this torch does not see it.
    """
    if device == "auto":
        return
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise CropiError(f"{option} {device!r} is not a torch device: {error}") from error
    if place.type not in ("cpu", "cuda"):
        raise CropiError(f"{option} {device!r}: there are kernels for cpu and cuda only")
    if place.type == "cuda" and not torch.cuda.is_available():
        why = (
            "sees no CUDA device"
            if torch.version.cuda
            else "was built for CPUs alone and sees no CUDA device"
        )
        raise CropiError(
            f"{option} {device!r}: this torch ({torch.__version__}) {why}; `cropi env` shows what is installed; use "
            "'cpu', or 'auto' for a GPU where there is one"
        )
    if place.type == "cuda" and (place.index or 0) >= (count := torch.cuda.device_count()):
        raise CropiError(
            f"{option} {device!r}: this torch sees {count} CUDA devices, cuda:0 to cuda:{count - 1}"
        )


def checked_device(device: torch.device | str) -> torch.device:
    """:func:`placed_device` of one that :func:`check_device` finds no fault with."""
    check_device("device", str(device))
    return placed_device(device)


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A dtype by its name; "auto" as it is.

    Raises:
        ValueError: no dtype of weights.
    """
    if dtype == AUTO:
        return dtype
    named = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if named is None or named not in DTYPES.values():
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return named


def placed_dtype(dtype: Any, device: torch.device, config: Any) -> torch.dtype:
    """A dtype; "auto": see above.

    Args:
        dtype: "auto", or a ``torch.dtype``.
        device: where the model goes.
        config: the checkpoint's configuration, or None.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if device.type == "cpu":
        return torch.float32
    held = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None))
    return DTYPES.get(held.removeprefix("torch."), torch.bfloat16)  # a .gguf file names none


def bytes_per_token(model: Any) -> int:
    """About what a token keeps in memory between forward and backward: inputs and outputs of every matrix in their
    dtype, and 16 bytes for every number that a vector (a norm) scales, which computes in float32.

    A matrix of experts counts once for each expert that a token goes through.
    """
    chosen = experts_of_a_token(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {id(getattr(module, "weight", None)) for module in (head, model.get_input_embeddings())}
    total = 0
    for parameter in model.parameters():
        if id(parameter) in left_out:
            continue
        size = parameter.element_size() if parameter.is_floating_point() else 2
        if parameter.ndim == 1:
            total += 16 * parameter.shape[0]
        elif parameter.ndim == 2 and parameter.is_floating_point():
            total += size * sum(parameter.shape)
        elif parameter.ndim == 3:
            total += size * chosen * sum(parameter.shape[1:])
    for module in model.modules():  # packed weights do not show their shape
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and not getattr(weight, "is_floating_point", lambda: True)():
            total += 2 * (module.in_features + module.out_features)
    return max(total, 1)


def experts_of_a_token(model: Any) -> int:
    """How many of each layer's experts a token goes through; 1 where the model does not say."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    return int(getattr(config, "num_experts_per_tok", None) or 1)


def tokens_that_fit(free: int, per_token: int) -> int:
    """Tokens a batch for so many bytes of free memory: a multiple of :data:`STEP`.

    >>> tokens_that_fit(60 * 2**30, 4_000_000), tokens_that_fit(2**30, 4_000_000), tokens_that_fit(2**40, 1)
    (7168, 1024, 32768)
    """
    return min(max(int(free * SHARE / per_token) // STEP, 1) * STEP, MOST_TOKENS)


def tokens_at_once(policy: Policy, given: int | None) -> int:
    """Tokens a batch: as given, or what suits the device of a policy, whose weights are loaded for it on a GPU."""
    if given is not None:
        return given
    if policy.plan[0].type != "cuda":
        return CPU_TOKENS

    def fits() -> int:
        return tokens_that_fit(torch.cuda.mem_get_info(policy.device)[0], bytes_per_token(policy.model))

    return int(policy.once("tokens at once", fits))
