"""Models that scale the positions of a whole batch by its longest row (longrope, dynamic NTK).

Measures from which length on they do so, which decides which rows may be in one batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ...memory import is_out_of_memory
from ..batch.trial import config_numbers, few_rows
from ..model.precision import own_precision, unit_roundoff, unwrapped
from ..model.sharded import device_of
from ..model.untouched import untouched
from .decoder import split_parts
from .split import SplitModel

WRONG = 16  # unit roundoffs, relative to the largest logits or hidden states, beyond which two runs are not the same
SCALINGS = {"longrope", "dynamic", "su"}  # of positions, as configurations name them


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Which rows may be in one batch.

    Attributes:
        switch: longest row up to which no other row changes what a row gives; None: however long.
        by_length: beyond ``switch`` every length gives its own positions (dynamic NTK), not one more set of them.
    """

    switch: int | None = None
    by_length: bool = False

    def together(self, shortest: int, longest: int) -> bool:
        """Whether rows of these lengths (last position + 1) give in one batch what each gives alone.

        >>> Lengths(24).together(10, 24), Lengths(24).together(10, 25), Lengths(24).together(25, 40)
        (True, False, True)
        >>> Lengths(24, by_length=True).together(25, 40)
        False
        """
        if self.switch is None or longest <= self.switch:
            return True
        return shortest == longest if self.by_length else shortest > self.switch


def measure_lengths(model: nn.Module) -> Lengths:
    """The `Lengths` of a causal LM, from a few short forward passes; leaves no trace in the model."""
    model = unwrapped(model)
    try:
        split = split_parts(model)
    except ValueError:  # not a decoder and a head: nothing is measured, and `policy_gradient` refuses it
        return Lengths()
    with own_precision(model), untouched(model), torch.no_grad():
        model.eval()
        return lengths_of(model, split, few_rows(model, split.head.weight.shape[0], device_of(model)))


def lengths_of(model: nn.Module, split: SplitModel, ids: torch.Tensor) -> Lengths:
    """The `Lengths`, from short rows: a row of few tokens at high positions makes a batch long."""
    length = ids.shape[1]
    known = [
        n for name, n in config_numbers(getattr(model, "config", None)) if "position" in name and n > length
    ]
    if not known or not _may_go_beyond(model):
        return Lengths()

    def beside(last: int) -> torch.Tensor:
        where = torch.arange(length, device=ids.device).repeat(2, 1)
        where[1] += last + 1 - length
        return split.hidden(ids[:2], position_ids=where)[:1]

    try:
        near = beside(length - 1)
        if same(beside(2 * max(known)), near):
            return Lengths()
        # Lengths: with `low` tokens nothing changes, with `high` something does.
        low, high = length, 2 * max(known) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if same(beside(middle - 1), near) else (low, middle)
        return Lengths(low, not same(beside(2 * max(known)), beside(low + 1 + length)))
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return Lengths()  # a table of positions ends, or none are taken


def _may_go_beyond(model: nn.Module) -> bool:
    """Whether positions beyond the context may be tried.

    A table of positions that ends raises an error on a CPU. On a GPU it would end the process, so there only models
    whose configuration names a scaling are tried.
    """
    if device_of(model).type == "cpu":
        return True
    return _names_scaling(getattr(model, "config", None))


def _names_scaling(value: Any, depth: int = 4) -> bool:
    """Also of a configuration inside another (a model's that sees pictures too), or for a kind of layers alone."""
    inner = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    if {kind for kind in (inner.get("rope_type"), inner.get("type")) if isinstance(kind, str)} & SCALINGS:
        return True
    return depth > 0 and any(
        _names_scaling(one, depth - 1) for one in inner.values() if not isinstance(one, type)
    )


def same(got: torch.Tensor, want: torch.Tensor, most: bool = False, terms: float = 1.0) -> bool:
    """Whether two results [..., n] are equal up to rounding; numbers that are not finite are left out.

    ``most``: more than half of the tokens are enough, because in half precision rounding may change a token's expert.
    ``terms``: how many times more terms their sums have than those of a few tokens. Sums are formed in float32, where
    errors add like a random walk; what is rounded to 16 bits afterwards is rounded once, however long they are.
    """
    off = (got - want).float().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    size = want.float().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    off = off.flatten().median() if most else off.max()
    return bool(off <= WRONG * max(unit_roundoff(want), terms**0.5 * 2.0**-20) * size.max())


def check_lengths(
    lengths: Lengths,
    shape: torch.Size,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    """Refuse a batch in which a long row changes the positions of a shorter one.

    Raises:
        ValueError: names both lengths.
    """
    if lengths.switch is None:
        return
    batch, length = shape
    own = torch.full((batch,), length, device="cpu")
    if position_ids is not None:
        where = position_ids.reshape(-1, position_ids.shape[-1])
        if attention_mask is not None and attention_mask.ndim == 2 and where.shape == attention_mask.shape:
            where = where * attention_mask
        own = where.max(dim=1).values.cpu() + 1
        longest = int(position_ids.max()) + 1
    else:
        longest = length
        if attention_mask is not None and attention_mask.ndim == 2:
            own = attention_mask.sum(1).cpu()
    if longest <= lengths.switch:
        return
    short = own < longest if lengths.by_length else own <= lengths.switch
    if bool(short.any()):
        rows = "rows of one length a call there"
        if not lengths.by_length:
            rows = f"rows up to {lengths.switch} in other calls"
        raise ValueError(
            f"rows of {int(own[short].min())} and of {longest} tokens (with padding) are in one batch: beyond "
            f"{lengths.switch} tokens the model scales the positions of all rows by the longest one. Give {rows}"
        )
