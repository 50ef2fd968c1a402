"""The probe of a policy: properties of a causal LM, measured on a few tokens before any work.

A wrong assumption about one of them would give wrong results without an error: whether the model is causal; whether a
row's logits depend on other rows (experts that drop tokens, positions that are scaled by the longest row); what padded
rows need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...memory import is_out_of_memory
from ..batch.host import values
from ..batch.labels import Batch
from ..batch.one_sequence import check_apart, restart
from ..batch.trial import few_rows
from ..model.precision import own_precision
from ..model.sharded import device_of, largest
from ..model.untouched import untouched
from .lengths import Lengths, check_lengths, lengths_of, same
from .split import SplitModel

Run = Callable[[torch.Tensor], torch.Tensor]
GENERATES = (
    ", so its log-probs are not those of a policy that generates from left to right; use `with sketcher.batch(...)` "
    "around your own loss"
)


class PolicyProbeError(ValueError):
    """The model does something that `GradientSketcher.policy_gradient` cannot take; says what was seen."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """The measured properties of a model; printed, a line each.

    Attributes:
        scale, softcap: ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``, measured; None: no cap.
        switch: longest row up to which no other row changes what a row gives (positions scaled by the longest row
            of a batch: longrope, dynamic NTK); None: however long.
        by_length: beyond ``switch`` every length gives its own positions (dynamic NTK), not one more set of them.
        left_padding: "as it is"; "position_ids" (rows padded on the left are right with positions that count their
            own tokens alone, which are filled in); "wrong" (not even then: an error).
        packing: several sequences in a row, with positions that begin anew: "as it is" (the model keeps them apart);
            "without a mask" (it does unless it is given a mask [batch, length], as most of transformers' do); "wrong"
            (an error).
        padded, packed: the longest rows on which these two were measured. Longer ones are measured on before they are
            used: Llama 4 scales the queries of long rows by the column, and not by the position.
    """

    scale: float
    softcap: float | None
    switch: int | None
    by_length: bool
    left_padding: str
    packing: str
    padded: int = dataclasses.field(repr=False, compare=False)
    packed: int = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        lines = [
            f"logits = {self.scale:g} * (h W^T + b)"
            + (f", capped at {self.softcap:g}" if self.softcap else "")
        ]
        if self.switch is not None:
            lines.append(f"rows beyond {self.switch} tokens change the positions of all rows of their batch")
        lines.append(f"rows padded on the left: {self.left_padding}")
        lines.append(f"several sequences in a row, kept apart by position_ids: {self.packing}")
        return "\n".join(lines)


def probe_policy(model: nn.Module, split: SplitModel) -> Probe:
    """Measure; leaves no trace in the model. About eight short forward passes.

    Raises:
        PolicyProbeError: the model is not causal, or a row's logits depend on what other rows hold.
    """
    ids = few_rows(model, split.head.weight.shape[0], device_of(model))
    name = type(model).__name__
    with untouched(model), torch.no_grad():
        model.eval()  # dropout would make two forwards differ
        plain = split.hidden(ids)
        if not is_causal(split.hidden, ids, plain):
            raise PolicyProbeError(
                f"{name} is not causal: a change of later tokens changes what it gives for earlier ones{GENERATES}"
            )
        _check_alone(split.hidden, ids, plain, name)
        return _measured(model, split, ids, plain)


def probe_rows(model: nn.Module, split: SplitModel) -> Probe:
    """Measure alone; nothing is refused. Leaves no trace in the model."""
    ids = few_rows(model, split.head.weight.shape[0], device_of(model))
    with untouched(model), torch.no_grad():
        model.eval()
        return _measured(model, split, ids, split.hidden(ids))


def _measured(model: nn.Module, split: SplitModel, ids: torch.Tensor, plain: torch.Tensor) -> Probe:
    lengths = lengths_of(model, split, ids)
    padding, packing = _left_padding(split, ids, plain), _packing(split, ids[:2], plain[:2])
    length = ids.shape[1]
    known = split.scale, split.softcap, lengths.switch, lengths.by_length, padding, packing
    return Probe(*known, padded=length + PAD, packed=2 * length)


def probe_longer(probe: Probe, model: nn.Module, split: SplitModel, here: Batch) -> Probe:
    """The probe, measured again on made-up rows as long as those of a batch, where it was measured on shorter ones
    alone and the batch needs it. Leaves no trace in the model.

    Not measured again is a batch with a mask of pairs, which says itself what a token attends to. The ranks of a
    sharded model measure together, on rows as long as the longest that one of them has.

    Args:
        probe: what was measured so far.
        model, split: whose.
        here: the batch, on the host; its mask is None where there is a 4-D one.
    """
    left, own, packed, each = largest(model, *_longer(probe, here))
    if not left + packed:
        return probe
    vocabulary, device = split.head.weight.shape[0], device_of(model)
    with own_precision(model), untouched(model), torch.no_grad():
        model.eval()
        if left:
            ids = few_rows(model, vocabulary, device, (1, own))
            found = _left_padding(split, ids, split.hidden(ids), left - own, probe.left_padding)
            probe = dataclasses.replace(probe, left_padding=found, padded=left)
        if packed:
            ids = few_rows(model, vocabulary, device, (-(-packed // each), each))
            probe = dataclasses.replace(probe, packing=_packing(split, ids, split.hidden(ids)), packed=packed)
    return probe


def _longer(probe: Probe, here: Batch) -> tuple[int, int, int, int]:
    """Of a batch that needs to be measured on: its length where rows are padded on the left, and their own tokens; its
    length where rows hold several sequences, and the tokens of each. Positions go no further than those of the batch: a
    table of them may end there."""
    length, mask, where = here.input_ids.shape[1], here.attention_mask, here.position_ids
    left = own = packed = each = 0
    if here.pairs is not None:
        return left, own, packed, each
    if mask is not None and length > probe.padded and probe.left_padding != "wrong":
        if (values(mask)[:, 0] == 0).any() and (where is None or _counts(where, mask)):
            left, own = length, min(length - PAD, int(mask.sum(1).max()))
    if where is not None and length > probe.packed and probe.packing != "wrong":
        where = where.reshape(-1, *where.shape[-2:])[0].expand(here.input_ids.shape)
        if restart(where, mask) is not None:
            packed, each = length, min(length - 1, int(where.max()) + 1)
    return left, own, packed, each


def is_causal(run: Run, ids: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether a change of later tokens leaves what ``run(ids)`` = ``plain`` gives for earlier ones."""
    keep = 2 * ids.shape[1] // 3
    changed = ids.clone()
    changed[:, keep:] = ids.flip(0).roll(1, 1)[:, keep:]
    with torch.no_grad():
        return same(run(changed)[:, :keep], plain[:, :keep])


def _check_alone(run: Run, ids: torch.Tensor, plain: torch.Tensor, name: str) -> None:
    """Refuse a model whose first row changes when the other rows do.

    The other rows repeat one token, which fills experts that have a capacity.
    """
    beside = ids.clone()
    beside[1:] = ids[0, -1]
    half = plain.element_size() < 4
    if not same(run(beside)[:1], plain[:1], most=half):
        raise PolicyProbeError(
            f"what {name} gives for a row depends on the other rows of the batch (experts that drop tokens beyond a "
            "capacity, a norm over the batch?): give one row a call by `with sketcher.batch(...)`, or turn that off"
        )


# ----------------------------------------------------------------------------------------------- padding
PAD, PART = 3, 32  # tokens


def _left_padding(
    split: SplitModel, ids: torch.Tensor, plain: torch.Tensor, pad: int = PAD, known: str = "as it is"
) -> str:
    """What rows with ``pad`` tokens of padding on the left need, to give what they give without; at least ``known``."""
    padded = torch.cat([ids[:, :1].expand(-1, pad), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :pad] = 0
    for answer, options in (("as it is", {}), ("position_ids", {"position_ids": counted(mask)})):
        if known == "position_ids" != answer:
            continue
        try:
            if _alike(split.hidden(padded, attention_mask=mask, **options)[:, pad:], plain):
                return answer
        except (IndexError, TypeError, ValueError, RuntimeError) as error:  # takes no mask, or no positions
            if is_out_of_memory(error):
                raise
            continue
    return "wrong"


def _packing(split: SplitModel, ids: torch.Tensor, plain: torch.Tensor) -> str:
    """Whether rows in one, with positions that begin anew, give what each gives alone."""
    row = ids.reshape(1, -1)
    where = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids))[None]
    answer = "wrong"
    for better, mask in (("without a mask", {}), ("as it is", {"attention_mask": torch.ones_like(row)})):
        try:
            got = split.hidden(row, position_ids=where, **mask)
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            # The model takes no positions, or no mask.
            if is_out_of_memory(error):
                raise
            break
        if not _alike(got, plain):
            break
        answer = better
    return answer


def _alike(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether hidden states of the same tokens are equal up to rounding.

    Of many tokens, most of every part of them: rounding changes the expert of a few.
    """
    got, want = got.reshape(-1, got.shape[-1]), want.reshape(-1, want.shape[-1])
    if len(want) <= 2 * PART:
        return same(got, want, most=want.element_size() < 4)
    parts = min(16, len(want) // PART)
    terms = len(want) / PART
    return all(same(a, b, True, terms) for a, b in zip(got.chunk(parts), want.chunk(parts), strict=True))


def counted(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count the tokens of a 2-D mask alone."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def _counts(where: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether positions are those of :func:`counted` at every token of the mask; on the host."""
    where = where.reshape(-1, *where.shape[-2:])[0].expand(mask.shape)
    return bool((values(where) == values(counted(mask)))[values(mask) != 0].all())


def checked_rows(probe: Probe | None, here: Batch, attention_mask: torch.Tensor | None) -> dict[str, Any]:
    """What `split.hidden` is given beside a batch's own inputs: the positions that rows padded on the left need.

    Args:
        probe: what was measured of the model; None: nothing, so that only what no model takes is refused.
        here: the batch, on the host; its mask is None where there is a 4-D one.
        attention_mask: as it was given.

    Raises:
        ValueError: the model does not give for a row what it gives for it alone, without padding; says why.
    """
    if attention_mask is None or attention_mask.ndim == 2:
        check_apart(here, None if probe is None else probe.packing)
    if probe is None:
        return {}
    lengths = Lengths(probe.switch, probe.by_length)
    check_lengths(lengths, here.input_ids.shape, here.attention_mask, here.position_ids)
    if attention_mask is None or here.attention_mask is None or probe.left_padding == "as it is":
        return {}
    if (values(here.attention_mask)[:, 0] != 0).all():
        return {}
    where = here.position_ids
    if probe.left_padding == "wrong" and (where is None or _counts(where, here.attention_mask)):
        given = (
            "" if where is None else ", also with position_ids that count each row's own tokens, as these do"
        )
        raise ValueError(
            "attention_mask pads rows on the left, and the model gives other results for them than without padding"
            f"{given}: pad on the right{', or give position_ids that make them right' if where is None else ''}"
        )
    return {} if where is not None else {"position_ids": counted(attention_mask)}
