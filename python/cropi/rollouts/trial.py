"""Whether a model decodes in a padded batch as it does alone: tried once, before any response is sampled.

A model may take the place in the row for the position (padding on the left moves it), see what lies behind a gap in the
mask (a window, a scan), or keep a state that padding changes. Three ways of batching are tried in order, and the first
one is taken in which every row has the logits that it has alone:

1. *shared*: what prompts begin with in common once, padding behind it;
2. *padded*: padding on the left;
3. *alone*: prompts of one length alone share a batch.

Where not even the cache of a single row gives the logits of a pass without one, the model cannot be sampled here.

The comparison is of log-probs in the model's own dtype. The tolerance is measured: the same row alone, with every
module's output moved by one unit in the last place (:mod:`cropi.gradient.layout_trial`).
"""

from __future__ import annotations

from typing import Any

import torch

from cropi.errors import CropiError
from cropi.gradient.layout_trial import one_unit_off
from cropi.rollouts.beginnings import SHORTEST
from cropi.rollouts.generate import Decoding, last_logits
from cropi_kernels.memory import is_out_of_memory
from cropi_kernels.sketcher.policy.lengths import measure_lengths

WAYS = ("shared", "padded", "alone")
MARGIN = 16.0  # times what one unit in the last place does
_LENGTHS, _DECODED = (SHORTEST + 3, SHORTEST + 9, SHORTEST + 16), 3
_LONGEST = 4096  # tokens of a row, but where a window begins further on
_OF_ALL = SHORTEST  # tokens that all rows of the trial begin with, where beginnings are shared
_OF_TWO = SHORTEST + 2  # and two of them


@torch.inference_mode()
def way_of(model: Any, longest: int, more: int = 0, shortest: int = 1) -> str:
    """The first of :data:`WAYS` that is exact for this model.

    Args:
        longest: tokens of the longest prompt; a window or a scale that begins further on shows there alone.
        more: tokens of the longest response, in which a window may begin too: tried where the configuration names one.
        shortest: tokens of the shortest prompt.

    Raises:
        CropiError: none is; the model is named, and what to do.
        torch.OutOfMemoryError: the trial ran out of memory.
    """
    _check_scale(model, shortest, longest, more)
    problem, reach = "", min(longest + more - _DECODED, _behind_windows(model, longest + more))
    longest = max(min(longest, _LONGEST), reach)
    for way in WAYS:
        try:
            off = _excess(model, way, longest)
        except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            continue
        if off <= 1:
            return way
        problem = f"its log-probs differ by {off:.3g} times the tolerance"
    raise CropiError(
        f"engine hf: {type(model).__name__} does not decode with a cache as it does without one ({problem}); sample "
        "with --engine vllm or --engine openai-url"
    )


def _check_scale(model: Any, shortest: int, longest: int, more: int) -> None:
    """Keys in a cache keep the positions with which they came, where a model scales those of all tokens anew."""
    lengths = measure_lengths(model)
    switch = lengths.switch
    if switch is None or longest + more - 1 <= switch or (shortest > switch and not lengths.by_length):
        return
    raise CropiError(
        f"engine hf: {type(model).__name__} scales its positions anew beyond {switch} tokens (longrope, dynamic), "
        f"which a cache does not follow, and a prompt of {longest} with {more} more goes beyond; give a smaller "
        "--max-tokens, leave longer prompts out, or sample with --engine vllm or --engine openai-url"
    )


def _behind_windows(model: Any, longest: int) -> int:
    """Tokens of a row that goes beyond every window of the configuration that is shorter than ``longest``."""
    named = model.config.get_text_config().to_dict().items()
    windows = [size for key, size in named if "window" in key and isinstance(size, int) and size < longest]
    return max(windows, default=0) + _LENGTHS[-1]


def _excess(model: Any, way: str, longest: int) -> float:
    """The largest difference of a log-prob to the row alone, over the tolerance."""
    size = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    longest = max(_LENGTHS[-1], longest)
    lengths = [longest] * len(_LENGTHS) if way == "alone" else [*_LENGTHS[:-1], longest]
    whole = [
        torch.randint(0, size, (n + _DECODED,), generator=generator, device="cpu").tolist() for n in lengths
    ]
    if way == "shared":
        same = (_OF_TWO, _OF_TWO, _OF_ALL)
        whole = [whole[0][:count] + ids[count:] for count, ids in zip(same, whole)]
    batch = Decoding(model, [ids[:-_DECODED] for ids in whole], shared=way == "shared")
    if way == "shared" and not batch.gaps:
        return float("inf")  # nothing was shared: the next way is what runs
    got, device = [batch.logits], batch.logits.device
    # As rows are split and leave: copied behind the others, and then taken in another order, which a state that is kept
    # beside the cache does not follow.
    count = torch.arange(len(whole), device=device)
    order = count.roll(1)
    batch.select(torch.cat([count, count.flip(0)]))
    batch.select(2 * len(whole) - 1 - order)
    for t in range(_DECODED, 1, -1):
        batch.step(torch.tensor([ids[-t] for ids in whole], device=device)[order])
        got.append(batch.logits[order.argsort()])
    worst = 0.0
    for row, ids in enumerate(whole):
        alone = _alone(model, ids[:-1])
        with one_unit_off(model):
            moved = _alone(model, ids[:-1])
        here = _logprobs(torch.stack([step[row] for step in got]))
        noise = (moved - alone).abs().max().clamp_min(torch.finfo(torch.float32).eps)
        worst = max(worst, float(((here - alone).abs().max() / (MARGIN * noise)).nan_to_num(torch.inf)))
    return worst


def _alone(model: Any, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    out = model(input_ids=tokens, use_cache=False, **last_logits(model, _DECODED))
    return _logprobs(out.logits[0, -_DECODED:])


def _logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)
