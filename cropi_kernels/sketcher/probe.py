"""The probe of a policy: what a causal LM is like, measured on a few tokens of its own before any work.

Each answer decides something that would be wrong without a word: is it causal; do a row's logits depend on the rows
beside it (experts that drop tokens, positions that are scaled by the longest row); what do padded rows need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .decoder import SplitModel
from .listener import unit_roundoff
from .trial import config_numbers, few_rows
from .untouched import untouched

Run = Callable[[torch.Tensor], torch.Tensor]
WRONG = 16  # unit roundoffs, relative to the largest logits or hidden states, beyond which two runs are not the same


class PolicyProbeError(ValueError):
    """The model does something that `GradientSketcher.policy_gradient` cannot take; says what was seen."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was seen; printed, a line each.

    Attributes:
        scale, softcap: ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``, measured; None: no cap.
        switch: longest row up to which no other row changes what a row gives (positions scaled by the longest row
            of a batch: longrope, dynamic NTK); None: however long.
        by_length: beyond ``switch`` every length gives its own positions (dynamic NTK), not one more set of them.
        left_padding: "as it is"; "position_ids" (rows padded on the left are right with positions that count their
            own tokens alone, which are filled in); "wrong" (not even then: an error).
    """

    scale: float
    softcap: float | None
    switch: int | None
    by_length: bool
    left_padding: str

    def __str__(self) -> str:
        lines = [
            f"logits = {self.scale:g} * (h W^T + b)"
            + (f", capped at {self.softcap:g}" if self.softcap else "")
        ]
        if self.switch is not None:
            lines.append(f"rows beyond {self.switch} tokens change the positions of all rows of their batch")
        lines.append(f"rows padded on the left: {self.left_padding}")
        return "\n".join(lines)


def probe_policy(model: nn.Module, split: SplitModel) -> Probe:
    """Measure; leaves no trace in the model. About six short forward passes.

    Raises:
        PolicyProbeError: the model is not causal, or a row's logits depend on what other rows hold.
    """
    ids = few_rows(model, split.head.weight.shape[0], split.head.weight.device)
    name = type(model).__name__
    with untouched(model), torch.no_grad():
        model.eval()  # dropout would make two forwards differ
        plain = split.hidden(ids)
        if not is_causal(split.hidden, ids, plain):
            raise PolicyProbeError(
                f"{name} is not causal: a change of later tokens changes what it gives for earlier ones, so its "
                "log-probs are not those of a policy that generates from left to right; use `with sketcher.batch(...)` "
                "around your own loss"
            )
        _check_alone(split.hidden, ids, plain, name)
        switch, by_length = _length_switch(model, split, ids, plain)
        padding = _left_padding(split, ids, plain)
    return Probe(split.scale, split.softcap, switch, by_length, padding)


def is_causal(run: Run, ids: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether a change of later tokens leaves what ``run(ids)`` = ``plain`` gives for earlier ones."""
    keep = 2 * ids.shape[1] // 3
    changed = ids.clone()
    changed[:, keep:] = ids.flip(0).roll(1, 1)[:, keep:]
    with torch.no_grad():
        return same(run(changed)[:, :keep], plain[:, :keep])


def same(got: torch.Tensor, want: torch.Tensor, most: bool = False) -> bool:
    """Equal but for rounding; ``most``: for more than half of the tokens (in half precision an expert may be chosen by
    the rounding of its router). What is not finite is not compared."""
    off = (got - want).float().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    size = want.float().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
    off = off.flatten().median() if most else off.max()
    return bool(off <= WRONG * max(unit_roundoff(want), 2.0**-20) * size.max())


def _check_alone(run: Run, ids: torch.Tensor, plain: torch.Tensor, name: str) -> None:
    """The first row beside others, all of one token: experts with a capacity are full of it then."""
    beside = ids.clone()
    beside[1:] = ids[0, -1]
    half = plain.element_size() < 4
    if not same(run(beside)[:1], plain[:1], most=half):
        raise PolicyProbeError(
            f"what {name} gives for a row depends on the other rows of the batch (experts that drop tokens beyond a "
            "capacity, a norm over the batch?): give one row a call by `with sketcher.batch(...)`, or turn that off"
        )


# ------------------------------------------------------------------------------------------ long positions
def _length_switch(
    model: nn.Module, split: SplitModel, ids: torch.Tensor, plain: torch.Tensor
) -> tuple[int | None, bool]:
    """(`Probe.switch`, `Probe.by_length`). A row of few tokens whose positions are far out makes a batch long."""
    length = ids.shape[1]
    known = [
        n for name, n in config_numbers(getattr(model, "config", None)) if "position" in name and n > length
    ]
    if not known or not _may_go_beyond(model, split):
        return None, False

    def beside(last: int) -> torch.Tensor:
        where = torch.arange(length, device=ids.device).repeat(2, 1)
        where[1] += last + 1 - length
        return split.hidden(ids[:2], position_ids=where)[:1]

    try:
        near = beside(length - 1)
        if same(beside(2 * max(known)), near):
            return None, False
        # Lengths: with `low` tokens nothing changes, with `high` something does.
        low, high = length, 2 * max(known) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if same(beside(middle - 1), near) else (low, middle)
        return low, not same(beside(2 * max(known)), beside(low + 1 + length))
    except (IndexError, TypeError, ValueError, RuntimeError):  # a table of positions ends, or none are taken
        return None, False


def _may_go_beyond(model: nn.Module, split: SplitModel) -> bool:
    """On a CPU a table of positions that ends is an error like any other; on a GPU it would take the process with it,
    so there only a configuration that names a scaling is tried."""
    if split.head.weight.device.type == "cpu":
        return True
    config = getattr(model, "config", None)
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, dict) and {found.get("rope_type"), found.get("type")} & {
            "longrope",
            "dynamic",
            "su",
        }:
            return True
    return False


def check_lengths(
    probe: Probe,
    shape: torch.Size,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    """Raises ValueError: a row of the batch is long enough to change the positions of a shorter one."""
    if probe.switch is None:
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
    if longest <= probe.switch:
        return
    short = own < longest if probe.by_length else own <= probe.switch
    if bool(short.any()):
        raise ValueError(
            f"rows of {int(own[short].min())} and of {longest} tokens (with padding) are in one batch: beyond "
            f"{probe.switch} tokens the model scales the positions of all rows by the longest one. Give "
            + (
                "rows of one length a call there"
                if probe.by_length
                else f"rows up to {probe.switch} in other calls"
            )
        )


# ----------------------------------------------------------------------------------------------- padding
PAD = 3


def _left_padding(split: SplitModel, ids: torch.Tensor, plain: torch.Tensor) -> str:
    """What rows that are padded on the left need to give what they give without."""
    padded = torch.cat([ids[:, :1].expand(-1, PAD), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :PAD] = 0
    for answer, options in (("as it is", {}), ("position_ids", {"position_ids": counted(mask)})):
        try:
            if same(
                split.hidden(padded, attention_mask=mask, **options)[:, PAD:],
                plain,
                most=plain.element_size() < 4,
            ):
                return answer
        except (IndexError, TypeError, ValueError, RuntimeError):  # takes no mask, or no positions
            continue
    return "wrong"


def counted(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count the tokens of a 2-D mask alone."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def pads_left(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> bool:
    """Whether a row begins with padding, and nobody said which position its first token has."""
    if attention_mask is None or attention_mask.ndim != 2 or position_ids is not None:
        return False
    return bool((attention_mask[:, 0] == 0).any())


def positions_for(probe: Probe, attention_mask: torch.Tensor) -> dict[str, Any]:
    """What `split.hidden` needs beside the mask of rows that are padded on the left.

    Raises:
        ValueError: nothing makes them right.
    """
    if probe.left_padding == "wrong":
        raise ValueError(
            "attention_mask pads rows on the left, and the model gives other results for them than without padding: "
            "pad on the right, or give position_ids that make them right"
        )
    return {"position_ids": counted(attention_mask)} if probe.left_padding == "position_ids" else {}
