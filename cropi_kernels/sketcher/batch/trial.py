"""A few tokens to try a model on: what they are, and where the segments lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..model.precision import invocation_tokens, trained_tokens
from .segments import Segments

ROWS = 3
LENGTHS = (11, 13, 17, 19, 23, 29, 31, 37)


def few_rows(
    model: nn.Module, vocab: int, device: torch.device, shape: tuple[int, int] | None = None
) -> torch.Tensor:
    """Token ids [ROWS, length] to try a model on, or of another shape.

    The length is unlike any size of the model, so that no tensor of another meaning has this shape by accident. Ids
    that the configuration names (padding, images) are left out.
    """
    config = getattr(model, "config", None)
    special = {value for name, value in config_numbers(config) if "token" in name}
    sizes = {n for p in model.parameters() for n in p.shape} | {n for _, n in config_numbers(config)}
    most = min(
        (n for name, n in config_numbers(config) if name in ("max_position_embeddings", "n_positions")),
        default=11,
    )
    fitting = [n for n in LENGTHS if n not in sizes and n * ROWS not in sizes and n <= max(most, LENGTHS[0])]
    rows, length = shape or (ROWS, fitting[0] if fitting else LENGTHS[0])
    plain = [i for i in range(min(vocab, 65536)) if i not in special] or list(range(vocab))
    chosen = [plain[(7919 * (i + 1)) % len(plain)] for i in range(rows * length)]
    ids = torch.tensor(chosen, device=device).view(rows, length)
    # Without these tokens, adapters that depend on them do nothing and have no gradient.
    if wanted := [*invocation_tokens(model), *trained_tokens(model)[:3]][: length - 2]:
        ids[:, 1 : 1 + len(wanted)] = torch.tensor(wanted, device=device)
    return ids


def config_numbers(config: Any, depth: int = 2) -> Iterator[tuple[str, int]]:
    """Names and values of the integers in a configuration, and in the configurations and lists inside it."""
    for name, value in _items(config):
        inner = value if isinstance(value, (list, tuple)) else (value,)
        for item in inner:
            if isinstance(item, int) and not isinstance(item, bool):
                yield name, item
            elif (
                depth and (isinstance(item, dict) or hasattr(item, "__dict__")) and not isinstance(item, type)
            ):
                yield from config_numbers(item, depth - 1)


def _items(config: Any) -> list[tuple[Any, Any]]:
    inner = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    return [(str(name), value) for name, value in inner.items()]


def two_segments(batch: int, length: int, *, causal: bool) -> Segments:
    """Segments of unequal length: with causal attention the first ends within the second row, so that tokens that
    change places in a row show too."""
    ids = torch.ones(batch * length, dtype=torch.int64, device="cpu")
    ids[: length + (length // 3 if causal else 0)] = 0
    return Segments.of(ids.view(batch, length), batch, length, 2)


def scored_rows(segments: Segments) -> list[torch.Tensor]:
    """The positions to score in each of `two_segments`: the gradients of their losses stay in that segment."""
    cut, length = int(segments.offsets[1]), segments.length
    whole = torch.arange(segments.batch * length, device="cpu")
    return [whole[:cut], whole[-(-cut // length) * length :]]


def weights_of(n: int, device: torch.device) -> torch.Tensor:
    return torch.sin(torch.arange(n, device=device, dtype=torch.float32) * 1.7 + 1.0)
