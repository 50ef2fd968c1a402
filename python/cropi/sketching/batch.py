"""Sketches of a batch that a trainer already holds: no files, no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cropi.checked import absent, is_id
from cropi.data.checks import LOGPROB_SLACK
from cropi.data.rewards import no_gradient_reason
from cropi.errors import CropiError
from cropi.gradient.estimators import ESTIMATORS, Estimator, make_estimator
from cropi.gradient.layout import layout_of
from cropi.model.policy import Policy, check_dropout
from cropi_kernels import SketchSpec
from cropi_kernels.sketcher.lengths import Lengths
from cropi_kernels.sketcher.one_sequence import numbered, restart


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
        attention_mask: ``[batch, length]``, 0 for padding; None: there is no padding.
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
        estimator: a name ("cropi", "ppo", "reinforce", "dr_grpo", "dapo") or an :class:`cropi.Estimator`; not used with
            ``weights``.
        spec: what a sketch is; None: ``SketchSpec()``.
        exclude: patterns of parameter names to leave out.
        temperature: log-probs are those of softmax(logits / temperature).
        position_ids: int64 ``[batch, length]``; None: tokens are counted from the first one that is not padding.
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
        raise CropiError(f"spec is a {type(spec).__name__}: give a SketchSpec")
    policy = Policy.of(model)
    check_dropout(policy.model, "model")
    rows = _Rows(policy, input_ids, attention_mask, position_ids)
    scored = rows.scored(response_mask, labels)
    names, segments = rows.prompts(prompt_ids)
    kind = _estimator(estimator)
    given = {"rewards": rewards, "advantages": advantages, "weights": weights}
    present = [name for name, value in given.items() if value is not None]
    if len(present) != 1:
        words = "none is" if not present else f"{' and '.join(present)} are"
        raise CropiError(f"give one of rewards, advantages and weights: {words} given")
    if old_logprobs is not None and weights is not None:
        raise CropiError(
            "old_logprobs are for advantages: the ratio is not applied to weights; leave one of both out"
        )
    if rewards is not None:
        advantages = _advantages(kind, rows.each_row("rewards", rewards), segments)
    if weights is not None:
        scale = rows.each_token("weights", weights, scored)
        behaviour = None
    else:
        assert advantages is not None
        scale = rows.each_token("advantages", advantages, scored)
        behaviour = None if old_logprobs is None else rows.each_logprob("old_logprobs", old_logprobs, scored)
    divisors = (
        torch.ones(rows.batch, dtype=torch.float32, device="cpu")
        if weights is not None
        else _divisors(kind, scored, segments)
    )
    return _sketched(
        policy, spec or SketchSpec(), tuple(exclude), rows, scored, names, segments, scale, behaviour,
        None if weights is not None else kind, divisors.to(rows.ids.device), temperature, tokens_per_batch,
    )  # fmt: skip


class _Rows:
    """The rows of the batch, and what is said of each, checked and on one device."""

    def __init__(self, policy: Policy, ids: Any, mask: Any, positions: Any) -> None:
        _check_tensor("input_ids", ids)
        if ids.ndim != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
            raise CropiError(
                f"input_ids is {ids.dtype} {list(ids.shape)}: give int64 [batch, length], a row a response"
            )
        self.batch, self.length = ids.shape
        self.device = policy.device
        if ids.device != self.device:
            raise CropiError(
                f"input_ids is on {ids.device} and the model on {self.device}: move the batch there"
            )
        self.ids = ids
        self._pads, self._ends = _padding_of(policy)
        if mask is None:
            self._check_unpadded()
        self.mask = torch.ones_like(ids) if mask is None else self._shaped("attention_mask", mask)
        if not bool(self.mask.any(dim=1).all()):
            row = int((~self.mask.bool().any(dim=1)).nonzero()[0])
            raise CropiError(f"attention_mask: row {row} is all padding; leave the row out")
        self._check_mask("attention_mask", self.mask, "a row holds a prompt and one response")
        counted = (self.mask.long().cumsum(1) - 1).clamp_min(0)
        self.positions = counted if positions is None else self._shaped("position_ids", positions)
        if positions is not None and (at := restart(self.positions, self.mask)) is not None:
            raise CropiError(
                f"position_ids restart in row {at[0]}, column {at[1]}: a row holds a prompt and one response; give "
                "every response a row of its own, or use cropi.GradientSketcher, which takes several in a row"
            )

    def cut(self, segments: torch.Tensor, budget: int, lengths: Lengths) -> Iterator[torch.Tensor]:
        """Numbers of rows that go through the model together: sorted by prompt, within the budget."""
        order, step = torch.argsort(segments, stable=True), max(1, budget // self.length)
        if lengths.switch is None:
            yield from order.split(step)
            return
        reach = ((self.positions * self.mask.bool()).amax(dim=1) + 1).tolist()
        chosen: list[int] = []
        # Rows of one prompt that may be in one batch follow each other.
        for row in sorted(order.tolist(), key=lambda row: (int(segments[row]), reach[row])):
            together = [reach[other] for other in (*chosen, row)]
            if chosen and (len(chosen) == step or not lengths.together(min(together), max(together))):
                yield torch.tensor(chosen, device="cpu")
                chosen = []
            chosen.append(row)
        yield torch.tensor(chosen, device="cpu")

    def _check_mask(self, name: str, mask: torch.Tensor, why: str) -> None:
        if (at := numbered(mask)) is not None:
            raise CropiError(
                f"{name} is {mask[at].item():g} in row {at[0]}, column {at[1]}: give 0 and 1 ({why})"
            )

    def _is_one_of(self, ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))

    def _check_unpadded(self) -> None:
        """Padding in front, which all tokens behind it would see, is one token of its own, or an end token twice."""
        first, second = self.ids[:, 0], self.ids[:, min(1, self.length - 1)]
        alone = [token for token in self._pads if token not in self._ends]
        twice = self._is_one_of(first, [*self._pads, *self._ends]) & (first == second)
        padded = self._is_one_of(first, alone) | twice
        if bool(padded.any()):
            row = int(padded.nonzero()[0])
            raise CropiError(
                f"attention_mask is not given, and row {row} begins with the padding token {int(first[row])}, which "
                "its tokens would see: give the mask (of ones, if this is no padding)"
            )

    def _check_end(self, scored: torch.Tensor) -> None:
        last = self.ids[:, -2:]
        padded = (
            scored[:, -2:].all(dim=1) & (last[:, 0] == last[:, -1])
            if self.length > 1
            else scored[:, 0] & False
        )
        padded = padded & self._is_one_of(last[:, -1], [*self._pads, *self._ends])
        if bool(padded.any()):
            row = int(padded.nonzero()[0])
            raise CropiError(
                f"row {row} ends with the padding token {int(last[row, -1])}, and it is scored: a response is scored "
                "up to its first end token; mend response_mask (labels)"
            )

    def _shaped(self, name: str, value: Any) -> torch.Tensor:
        _check_tensor(name, value)
        if tuple(value.shape) != (self.batch, self.length):
            raise CropiError(
                f"{name} has shape {list(value.shape)}: give [{self.batch}, {self.length}], as input_ids"
            )
        return self._here(name, value)

    def _here(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if value.device != self.device:
            raise CropiError(f"{name} is on {value.device} and the model on {self.device}: move it there")
        return value.detach()

    def each_row(self, name: str, value: Any) -> torch.Tensor:
        """A number for each row."""
        _check_tensor(name, value)
        if tuple(value.shape) != (self.batch,):
            raise CropiError(f"{name} has shape {list(value.shape)}: give [{self.batch}], one for each row")
        value = self._here(name, value)
        if not bool(torch.isfinite(value).all()):
            raise CropiError(
                f"{name} holds NaN or infinity in row {int((~torch.isfinite(value)).nonzero()[0])}"
            )
        return value

    def each_token(
        self, name: str, value: Any, scored: torch.Tensor | None = None, *, per_row: bool = True
    ) -> torch.Tensor:
        """A number for each token, in its place: float ``[batch, length]``; 0 where none was given, which may not be
        where a token is ``scored``."""
        _check_tensor(name, value)
        if per_row and tuple(value.shape) == (self.batch,):
            return self.each_row(name, value).float()[:, None].expand(self.batch, self.length)
        if value.ndim != 2 or value.shape[0] != self.batch or not 1 <= value.shape[1] <= self.length:
            row = f"[{self.batch}] (a row), " if per_row else ""
            raise CropiError(
                f"{name} has shape {list(value.shape)}: give {row}[{self.batch}, {self.length}] (a token in its "
                f"place) or [{self.batch}, n] of the last n columns"
            )
        value, first = self._here(name, value), self.length - value.shape[1]
        if scored is not None and bool(scored[:, :first].any()):
            row, column = scored[:, :first].nonzero()[0].tolist()
            raise CropiError(
                f"{name} has shape {list(value.shape)}, so that it begins at column {first}, and the token in row "
                f"{row}, column {column} is scored: give a value for every scored token"
            )
        out = torch.zeros(self.batch, self.length, dtype=torch.float32, device=self.device)
        out[:, first:] = value.float()
        if scored is not None and bool((wrong := scored & ~torch.isfinite(out)).any()):
            row, column = wrong.nonzero()[0].tolist()
            raise CropiError(
                f"{name} is {float(out[row, column])} at the token in row {row}, column {column}, which is scored: "
                "give a finite number, or leave the token out of the mask"
            )
        return out

    def each_logprob(self, name: str, value: Any, scored: torch.Tensor) -> torch.Tensor:
        """A log-prob for each scored token, in its place: float ``[batch, length]``."""
        made = self.each_token(name, value, scored, per_row=False)
        above = scored & (made > LOGPROB_SLACK)
        if bool(above.any()):
            row, column = above.nonzero()[0].tolist()
            raise CropiError(
                f"{name} is {float(made[row, column]):g} at the token in row {row}, column {column}: a log-prob is at "
                "most 0; give log-probs, and neither probabilities nor negative log-probs"
            )
        return made

    def scored(self, response_mask: Any, labels: Any) -> torch.Tensor:
        """bool ``[batch, length]``: which tokens are scored."""
        if (response_mask is None) == (labels is None):
            raise CropiError("give response_mask or labels, which say what is scored; one of both")
        if labels is not None:
            labels = self._shaped("labels", labels)
            wrong = (labels != -100) & (labels != self.ids)
            wrong[:, 0] = False
            if bool(wrong.any()):
                row, column = wrong.nonzero()[0].tolist()
                raise CropiError(
                    f"labels[{row}, {column}] is {int(labels[row, column])}, and the token there "
                    f"{int(self.ids[row, column])}: labels are the tokens in their own places (not shifted), or -100"
                )
            scored = labels != -100
            scored[:, 0] = False  # as Hugging Face models shift labels
        else:
            marks = self.each_token("response_mask", response_mask, per_row=False)
            self._check_mask("response_mask", marks, "weights of tokens go into weights or advantages")
            scored = marks != 0
        before = torch.nn.functional.pad(self.mask[:, :-1], (1, 0)).bool()
        scored = scored & self.mask.bool()
        if bool((scored & ~before).any()):
            row, column = (scored & ~before).nonzero()[0].tolist()
            raise CropiError(
                f"the token in row {row}, column {column} is scored, but nothing stands before it: a row needs a prompt"
            )
        if not bool(scored.any(dim=1).all()):
            row = int((~scored.any(dim=1)).nonzero()[0])
            raise CropiError(f"row {row} has no scored token: leave the row out, or mend its response_mask")
        self._check_end(scored)
        return scored

    def prompts(self, names: Any) -> tuple[list[Any], torch.Tensor]:
        """The prompts in order of their first row, and for each row the number of its prompt: int64 ``[batch]``."""
        if names is None:
            return list(range(self.batch)), torch.arange(self.batch, device="cpu")
        names = names.tolist() if hasattr(names, "tolist") else names
        if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != self.batch:
            got = f"{len(names)} names" if isinstance(names, Sequence) else f"a {type(names).__name__}"
            raise CropiError(f"prompt_ids is {got}: give a list of {self.batch}, one for each row")
        for row, name in enumerate(names):
            if not is_id(name):
                why = "has no id" if absent(name) else f"is {name!r:.100}"
                raise CropiError(
                    f"prompt_ids: the prompt of row {row} {why}: give a string or an integer; rows with one are "
                    "responses to one prompt"
                )
        places: dict[Any, int] = {}
        segments = [places.setdefault(name, len(places)) for name in names]
        return list(places), torch.tensor(segments, device="cpu")


def _padding_of(policy: Policy) -> tuple[list[int], list[int]]:
    """The tokens that pad, as far as model and tokenizer say; and those that begin or end a text, which may pad too."""
    sources = [
        policy.config.get_text_config(),
        getattr(policy.model, "generation_config", None),
        policy.tokenizer,
    ]
    pads, ends = (
        {int(token) for source in sources for name in names for token in _listed(getattr(source, name, None))}
        for names in (("pad_token_id",), ("bos_token_id", "eos_token_id"))
    )
    return sorted(pads), sorted(ends)


def _listed(value: Any) -> Sequence[int]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise CropiError(f"{name} is of type {type(value).__name__}: give a tensor (torch.as_tensor({name}))")


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
    rows: _Rows,
    scored: torch.Tensor,
    names: list[Any],
    segments: torch.Tensor,
    scale: torch.Tensor,
    behaviour: torch.Tensor | None,
    kind: Estimator | None,
    divisors: torch.Tensor,
    temperature: float,
    budget: int,
) -> SketchedBatch:
    """Rows sorted by prompt go through the model, as many at a time as the budget holds; parts of a prompt add up."""
    if not isinstance(budget, int) or budget < 1:
        raise CropiError(f"tokens_per_batch must be an integer of at least 1, got {budget!r}")
    sketches = torch.zeros(len(names), spec.dim, device=rows.device, dtype=torch.float32)
    logprobs, weights = (
        torch.zeros(rows.batch, rows.length, device=rows.device, dtype=torch.float32) for _ in range(2)
    )
    with policy.sketcher(spec, exclude) as sketcher:
        for chosen in rows.cut(segments, budget, layout_of(policy, "padded").lengths):
            here = chosen.to(rows.device)
            ids, marks = rows.ids[here], scored[here]
            first = int(segments[chosen[0]])
            row, column = marks[:, 1:].nonzero(as_tuple=True)
            column = column + 1
            token_scale, token_divisor = scale[here][row, column], divisors[here][row].float()
            old = None if behaviour is None else behaviour[here][row, column]

            def given(
                _: torch.Tensor, start: int, stop: int, scale: torch.Tensor = token_scale
            ) -> torch.Tensor:
                return scale[start:stop]

            result = sketcher.policy_gradient(
                ids,
                segments=(segments[chosen] - first).to(rows.device),
                labels=torch.where(marks, ids.long(), -100),
                weights=given if kind is None else kind.weigher(token_scale, token_divisor, old, row),
                whole=kind is not None and kind.level == "sequence",
                attention_mask=None if bool(rows.mask[here].all()) else rows.mask[here].long(),
                position_ids=rows.positions[here],
                temperature=temperature,
            )
            sketches[first : first + len(result.sketches)] += result.sketches
            logprobs[here[row], column] = result.logprobs.float()
            weights[here[row], column] = result.weights.float()
        covered, origin = sketcher.coverage.names, policy.origin(sketcher)
    if kind is not None:
        origin["estimator"] = kind.to_dict()
    return SketchedBatch(names, sketches, logprobs, weights, spec, covered, origin)
