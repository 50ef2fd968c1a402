"""Responses of a Hugging Face model to a batch of prompts, with the log-prob of every token as it was drawn.

What is the same is computed once: what prompts begin with in common (:mod:`cropi.rollouts.beginnings`), each
prompt, and what responses to one prompt have in common so far. A row of the batch stands for all responses that
have drawn the same tokens; where their next tokens differ, it is split, and the keys and values are copied. Rows whose
responses have ended leave the batch. Prompts are padded on the left, and behind shared beginnings; what a model
takes of that is tried before (:mod:`cropi.rollouts.trial`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cropi.rollouts.beginnings import Level, levels
from cropi.rollouts.cache import keeps_all, make_cache
from cropi.rollouts.draw import draw, uniforms
from cropi.rollouts.engine import Request, Response
from cropi.rollouts.options import Sampling

PIECE = 8192  # tokens of a forward over prompts


@torch.inference_mode()
def generate(
    model: Any,
    requests: Sequence[Request],
    n: int,
    sampling: Sampling,
    ends: frozenset[int],
    *,
    shared: bool,
    stepped: Callable[[int], None] | None = None,
) -> list[list[Response]]:
    """Sample ``n`` responses to each prompt.

    Args:
        model: in ``eval`` mode.
        requests: the prompts of one batch.
        n: responses to each.
        sampling: how.
        ends: tokens that end a response.
        shared: process what prompts begin with in common once, where every layer keeps all tokens.
        stepped: called with the number of tokens drawn so far, after each.

    Returns:
        The responses of each prompt. A log-prob is NaN where the model's output is not a number.
    """
    batch = Decoding(model, [request.prompt for request in requests], shared=shared)
    numbers = np.stack(
        [uniforms(sampling.seed, r.name, k, sampling.max_tokens) for r in requests for k in range(n)]
    )
    made = [Drawn() for _ in numbers]
    rows = np.arange(len(requests)).repeat(n)  # the row of the batch that stands for each live response
    live = np.arange(len(made))
    device = batch.logits.device
    for step in range(sampling.max_tokens):
        uniform = torch.from_numpy(numbers[live, step]).to(device)
        tokens, logprobs = draw(batch.logits, uniform, sampling, torch.from_numpy(rows).to(device))
        drawn = tokens.cpu().numpy()
        ended = np.isin(drawn, list(ends))
        for i, token, value, end in zip(live, drawn.tolist(), logprobs.tolist(), ended):
            made[i].ids.append(token)
            made[i].logprobs.append(value)
            made[i].truncated = not end
        if stepped is not None:
            stepped(step + 1)
        if step + 1 == sampling.max_tokens or ended.all():
            break
        live, rows, drawn = live[~ended], rows[~ended], drawn[~ended]
        source, rows = split_rows(rows, drawn)
        following = np.zeros(len(source), dtype=np.int64)
        following[rows] = drawn
        if len(source) != batch.rows or (source != np.arange(batch.rows)).any():
            batch.select(torch.from_numpy(source).to(device))
        batch.step(torch.from_numpy(following).to(device))
    whole = [Response(one.ids, one.logprobs, one.truncated) for one in made]
    return [whole[i : i + n] for i in range(0, len(whole), n)]


def split_rows(rows: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split and drop rows: one row for all responses of a row that drew the same token, none without a response.

    Args:
        rows, tokens: of every live response, the row that it was drawn from and its token.

    Returns:
        The row of the old batch that each row of the new one goes on from, and the new row of every response. A row
        whose responses go on stays in its place if there is such a place in the new batch, so that few are copied.
    """
    pairs = list(zip(rows.tolist(), tokens.tolist()))
    distinct = list(dict.fromkeys(pairs))
    count = len(distinct)
    places: dict[tuple[int, int], int] = {}
    staying: set[int] = set()
    for pair in distinct:
        if pair[0] < count and pair[0] not in staying:
            places[pair] = pair[0]
            staying.add(pair[0])
    free = (place for place in range(count) if place not in staying)
    source = np.arange(count)
    for pair in distinct:
        if pair not in places:
            places[pair] = next(free)
            source[places[pair]] = pair[0]
    return source, np.array([places[pair] for pair in pairs])


@dataclass
class Drawn:
    """The tokens of one response that are drawn so far."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated: bool = True


class Decoding:
    """A batch of rows with their keys and values; ``logits`` ``[rows, V]`` are those of the next token of each."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], *, shared: bool) -> None:
        self.model, self.cache = model, make_cache(model)
        self.logits: torch.Tensor
        self.device = model.get_input_embeddings().weight.device
        self._positions, self._last_only = takes(model, "position_ids"), last_logits(model, 1)
        self._parts = shared
        alone = [Level([0] * len(prompts), [list(prompt) for prompt in prompts])]
        steps = levels(prompts) if shared else alone
        self._begin(steps[0])
        # Padding behind a beginning would move what a layer with a window sees.
        if len(steps) > 1 and not keeps_all(self.cache):
            self.cache, steps = make_cache(model), alone
            self._begin(steps[0])
        for step in steps[1:]:
            self.select(torch.tensor(step.parents, device=self.device))
            self._extend(step.pieces)
        self.gaps = len(steps) > 1  # padding stands behind a shared beginning

    def _begin(self, step: Level) -> None:
        self.mask = torch.ones(len(step.pieces), 0, dtype=torch.long, device=self.device)
        self._extend(step.pieces)

    def _extend(self, pieces: Sequence[Sequence[int]]) -> None:
        """More tokens to every row, padded on the left."""
        width = max(map(len, pieces))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in pieces], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in pieces], device=self.device)
        # A long prompt in parts: what a layer holds of all its tokens at once is a multiple of the model's width.
        part = max(1, PIECE // len(pieces)) if self._parts and keeps_all(self.cache) else width
        for start in range(0, width, part):
            self._forward(ids[:, start : start + part], mask[:, start : start + part])

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.mask)

    def select(self, index: torch.Tensor) -> None:
        """Row ``index[i]`` in the place of row i; a row may be taken several times."""
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]

    def step(self, tokens: torch.Tensor) -> None:
        """Append one token to every row."""
        self._forward(tokens[:, None])

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        new = ids.new_ones(ids.shape) if mask is None else mask
        self.mask = torch.cat([self.mask, new], 1)
        places = {}
        if self._positions:
            places["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids, attention_mask=self.mask, use_cache=True,
            **past(self.model, self.cache), **places, **self._last_only,
        )  # fmt: skip
        self.logits = out.logits[:, -1]


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has this argument, as far as its signature says."""
    accepted = _parameters(model)
    return name in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())


def past(model: Any, cache: Any) -> dict[str, Any]:
    """The argument that hands the model its keys and values: its name has changed with transformers 5.24."""
    return {"cache" if "cache" in _parameters(model) else "past_key_values": cache}


def last_logits(model: Any, count: int) -> dict[str, int]:
    """The argument that asks for the logits of the last tokens alone, where the model has one."""
    return {"logits_to_keep": count} if "logits_to_keep" in _parameters(model) else {}


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the model's forward; an adapter's wrapper hands all arguments on to the model inside."""
    inside = getattr(model, "get_base_model", None)
    return inspect.signature((inside() if callable(inside) else model).forward).parameters
