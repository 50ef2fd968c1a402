"""Sketches of a batch that a trainer already holds: no files, no tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cropi.checked import fits
from cropi.data.rewards import no_gradient_reason
from cropi.errors import CropiError, article
from cropi.gradient.estimators import ESTIMATORS, Estimator, make_estimator
from cropi.gradient.layout import layout_of
from cropi.model.policy import Policy, check_dropout
from cropi.sketching.batch_rows import BatchRows
from cropi_kernels import SketchSpec


@dataclass(frozen=True)
class SketchedBatch:
    """The sketches of :func:`score_batch`.

    Attributes:
        ids: the prompts, in order of their first row.
        sketches: float32 ``[prompts, dim]``; NaN where a gradient is not finite.
        logprobs: float32 ``[batch, length]``: log pi of the scored tokens in their places, 0 elsewhere.
        weights: float32 ``[batch, length]``: their weights, 0 elsewhere.
        spec: what a sketch is; names: the parameters that are in it.
        origin: of which model and by which estimator, for what compares them (:mod:`cropi.ranking.origin`).

    >>> SketchedBatch(["a"], torch.zeros(1, 64), torch.zeros(1, 5), torch.zeros(1, 5), SketchSpec(64), ()).ids
    ['a']
    """

    ids: list[Any]
    sketches: torch.Tensor
    logprobs: torch.Tensor
    weights: torch.Tensor
    spec: SketchSpec
    names: tuple[str, ...]
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"SketchedBatch({len(self)} prompts, sketches of {self.sketches.shape[1]})"


def score_batch(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    response_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    prompt_ids: Sequence[Any] | torch.Tensor | None = None,
    rewards: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    estimator: str | Estimator = "cropi",
    spec: SketchSpec | None = None,
    exclude: Sequence[str] = (),
    temperature: float = 1.0,
    position_ids: torch.Tensor | None = None,
    tokens_per_batch: int = 8192,
) -> SketchedBatch:
    """Sketch the policy gradients of a batch of responses, prompt by prompt.

    The gradient of a prompt is ``sum_{k,t} w_{k,t} grad log pi(x_{k,t})`` over the scored tokens of its rows, with
    ``weights``, or with the estimator's ``rho A / d`` of ``advantages`` (or ``rewards``) and ``old_logprobs``.

    Where a tensor has a value for each token, it is ``[batch, length]``, in the place of the token; or ``[batch, n]``
    with n < length, of the last n columns (the completions of a trainer that keeps prompts and completions apart).

    Args:
        model: the current policy: a module without active dropout, or a :class:`cropi.Policy`.
        input_ids: int64 ``[batch, length]``: a prompt and one response a row, padded on either side.
        attention_mask: ``[batch, length]``, 0 for padding, also between the tokens of a row, which then count as the
            row without it; None: there is no padding.
        response_mask: for each token, whether it is scored. Give this or ``labels``.
        labels: int64 ``[batch, length]``, as Hugging Face models take them: -100 where a token is not scored, else the
            token; what stands in the first column is not read.
        prompt_ids: a string or an integer for each row; rows with one of them are responses to one prompt. None: every
            row is a prompt of its own.
        rewards: ``[batch]``: the estimator computes advantages from them, over each prompt's rows. Give one of
            ``rewards``, ``advantages`` and ``weights``.
        advantages: ``[batch]``, or one for each token.
        weights: ``[batch]``, or one for each token.
        old_logprobs: log beta of each token, under the policy that sampled it; None: the current policy (ratio 1).
        estimator: a name that :func:`cropi.make_estimator` takes, or an :class:`cropi.Estimator`; not used with
            ``weights``.
        spec: what a sketch is; None: ``SketchSpec()``.
        exclude: patterns of parameter names to leave out.
        temperature: log-probs are those of softmax(logits / temperature).
        position_ids: int64 ``[batch, length]``; None: tokens are counted from the first one that is not padding. Where
            they are given, padding between tokens stays, and takes room in a sliding window.
        tokens_per_batch: how many tokens go through the model at once, padding included.

    Raises:
        CropiError: a tensor has a wrong shape, type or device, or the arguments are too few or too many; names the
            argument.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> rows = torch.randint(1, 50, (4, 6))                       # two prompts, two responses of three tokens each
    >>> mask = torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)
    >>> batch = score_batch(model, rows, response_mask=mask, prompt_ids=["a", "a", "b", "b"],
    ...     advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]), spec=SketchSpec(1024))
    >>> batch
    SketchedBatch(2 prompts, sketches of 1024)
    >>> batch.ids, batch.sketches.shape
    (['a', 'b'], torch.Size([2, 1024]))
    """
    if spec is not None and not isinstance(spec, SketchSpec):
        raise CropiError(f"spec is {article(type(spec).__name__)}: give a SketchSpec")
    policy = Policy.of(model)
    check_dropout(policy.model, "model")
    rows = BatchRows(policy, input_ids, attention_mask, position_ids)
    scored = rows.scored(response_mask, labels)
    names, segments = rows.prompts(prompt_ids)
    given = {"rewards": rewards, "advantages": advantages, "weights": weights}
    factors = _factors(rows, scored, segments, _estimator(estimator), given, old_logprobs)
    return _sketched(
        policy, spec or SketchSpec(), tuple(exclude), rows, scored, names, segments, factors, temperature,
        tokens_per_batch,
    )  # fmt: skip


@dataclass(frozen=True)
class _Factors:
    """What the gradient of each log-prob is multiplied by: ``scale`` itself, or the estimator's ``rho A / d``.

    Attributes:
        scale: float ``[batch, length]``: weights, or advantages A.
        estimator: None where ``scale`` holds weights.
        divisors: d ``[batch]``, of the estimator.
        behaviour: float ``[batch, length]``: log beta, from which the ratio rho is computed; None: it is 1.
    """

    scale: torch.Tensor
    estimator: Estimator | None = None
    divisors: torch.Tensor | None = None
    behaviour: torch.Tensor | None = None

    def weigher(
        self, chosen: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
        """The weights of scored tokens: those at ``row`` and ``column`` of the ``chosen`` rows."""
        scale = self.scale[chosen][row, column]
        if self.estimator is None or self.divisors is None:
            return lambda logprobs, start, stop: scale[start:stop]
        behaviour = None if self.behaviour is None else self.behaviour[chosen][row, column]
        return self.estimator.weigher(scale, self.divisors[chosen][row].float(), behaviour, row)


def _factors(
    rows: BatchRows,
    scored: torch.Tensor,
    segments: torch.Tensor,
    kind: Estimator,
    given: Mapping[str, torch.Tensor | None],
    old_logprobs: torch.Tensor | None,
) -> _Factors:
    """The factors of whichever of rewards, advantages and weights was given."""
    present = {name: value for name, value in given.items() if value is not None}
    if len(present) != 1:
        words = "none is" if not present else f"{' and '.join(present)} are"
        raise CropiError(
            f"give one of rewards, advantages and weights (of a supervised loss: weights of ones): {words} given"
        )
    ((name, value),) = present.items()
    if name == "weights":
        if old_logprobs is not None:
            raise CropiError(
                "old_logprobs are for advantages: the ratio is not applied to weights; leave one of both out"
            )
        return _Factors(rows.each_token("weights", value, scored))
    if name == "rewards":
        value = _advantages(kind, rows.each_row("rewards", value), segments)
    scale = rows.each_token("advantages", value, scored)
    behaviour = None if old_logprobs is None else rows.each_logprob("old_logprobs", old_logprobs, scored)
    return _Factors(scale, kind, _divisors(kind, scored, segments).to(rows.device), behaviour)


def _estimator(given: str | Estimator) -> Estimator:
    if isinstance(given, Estimator):
        return given
    if not isinstance(given, str) or given not in ESTIMATORS:
        raise CropiError(f"estimator is {given!r}: give one of {', '.join(ESTIMATORS)}, or a cropi.Estimator")
    return make_estimator(given)


def _members(segments: torch.Tensor) -> Iterator[torch.Tensor]:
    for s in range(int(segments.max()) + 1):
        yield (segments == s).nonzero()[:, 0]


def _advantages(kind: Estimator, rewards: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    made = torch.zeros(len(rewards), dtype=torch.float64, device="cpu")
    if not kind.centred:
        if not bool((rewards == 1).all()):
            raise CropiError(
                f"rewards: the estimator {kind.name!r} takes demonstrations, whose rewards are 1; give 1 for every "
                "row, or what rows count for as advantages"
            )
        return torch.from_numpy(kind.advantages(rewards.tolist())).to(rewards.device)
    for rows in _members(segments):
        if len(rows) < 2:
            raise CropiError(
                "rewards: a prompt has one row alone, and its advantage is taken among its rows: name the rows of one "
                "prompt by prompt_ids, or give advantages"
            )
        own = rewards.cpu()[rows].tolist()
        if no_gradient_reason(own) is None:  # equal but for rounding: their advantages would be noise
            made[rows] = torch.from_numpy(kind.advantages(own))
    return made.to(rewards.device)


def _divisors(kind: Estimator, scored: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    counts, made = scored.sum(1).cpu(), torch.zeros(len(scored), dtype=torch.float64, device="cpu")
    for rows in _members(segments):
        made[rows] = torch.from_numpy(kind.divisors(counts[rows].tolist()))
    return made


def _sketched(
    policy: Policy,
    spec: SketchSpec,
    exclude: tuple[str, ...],
    rows: BatchRows,
    scored: torch.Tensor,
    names: list[Any],
    segments: torch.Tensor,
    factors: _Factors,
    temperature: float,
    budget: int,
) -> SketchedBatch:
    """Rows sorted by prompt go through the model, as many at a time as the budget holds; parts of a prompt add up."""
    if not fits(budget, int) or budget < 1:
        raise CropiError(f"tokens_per_batch must be an integer of at least 1, got {budget!r}")
    sketches = torch.zeros(len(names), spec.dim, device=rows.device, dtype=torch.float32)
    logprobs, weights = (
        torch.zeros(rows.batch, rows.length, device=rows.device, dtype=torch.float32) for _ in range(2)
    )
    kind = factors.estimator
    with policy.sketcher(spec, exclude) as sketcher:
        for chosen in rows.cut(segments, budget, layout_of(policy, "padded").lengths):
            here = chosen.to(rows.device)
            ids, mask, positions, marks = rows.together(here, scored)
            first = int(segments[chosen[0]])
            row, column = scored[here][:, 1:].nonzero(as_tuple=True)
            column = column + 1
            result = sketcher.policy_gradient(
                ids,
                segments=(segments[chosen] - first).to(rows.device),
                labels=torch.where(marks, ids.long(), -100),
                weights=factors.weigher(here, row, column),
                whole=kind is not None and kind.level == "sequence",
                attention_mask=None if bool(mask.all()) else mask.long(),
                position_ids=positions,
                temperature=temperature,
            )
            sketches[first : first + len(result.sketches)] += result.sketches
            logprobs[here[row], column] = result.logprobs.float()
            weights[here[row], column] = result.weights.float()
        covered, origin = sketcher.coverage.names, policy.origin(sketcher)
    if kind is not None:
        origin["estimator"] = kind.to_dict()
    return SketchedBatch(names, sketches, logprobs, weights, spec, covered, origin)
