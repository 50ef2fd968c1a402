"""Exact per-prompt policy gradients by plain autograd, with which sketches are compared.

Nothing of the fused pass is used: one response a row, the model's own forward, all logits, ``torch.log_softmax``, and
``backward`` into the parameters. A gradient is kept in bfloat16: each number is rounded by at most 2^-9 of itself,
independently of the others, so an inner product of P of them is off by about ``2^-9 / sqrt(P)`` of the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cropi.errors import CropiError
from cropi.gradient.batches import MicroBatch, make_batches
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.estimators import Estimator
from cropi.gradient.layout import layout_of
from cropi.gradient.tokenize import TokenGroup
from cropi.model.policy import Policy
from cropi_kernels import canonical_name
from cropi_kernels.sketcher.model.attention import right_backward
from cropi_kernels.sketcher.policy.growing import forget_longest

CHUNK = 1 << 22  # numbers of a parameter that are multiplied at once


@dataclass(frozen=True)
class ExactGradients:
    """Inner products of exact gradients.

    ``gram`` float64 ``[n, n]``; ``squares`` the squared norm of every parameter's gradient, by canonical name, as a
    share of the whole, averaged over the prompts.
    """

    gram: torch.Tensor
    squares: dict[str, float]


def exact_gradients(
    policy: Policy,
    groups: Sequence[TokenGroup],
    names: Sequence[str],
    estimator: Estimator,
    behaviour: Behaviour,
    *,
    tokens_per_batch: int = 1024,
) -> ExactGradients:
    """The inner products of the prompts' gradients with respect to the parameters ``names``.

    Memory: two bytes a number and prompt, and the model's own gradients in its dtype.

    Args:
        policy: the current policy.
        groups: tokenised prompts.
        names: canonical names of the parameters that count.
        estimator, behaviour: as in :func:`cropi.sketching.groups.sketch_groups`.
        tokens_per_batch: rows x longest row of one forward.

    Raises:
        CropiError: a gradient with a NaN or an infinity.
    """
    parameters = _parameters(policy.model, names)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    squares: dict[str, list[float]] = {name: [] for name in parameters}
    scales: list[float] = []
    with _only(policy.model, list(parameters.values())):
        for group in groups:
            scales.append(_backward(policy, group, estimator, behaviour, tokens_per_batch))
            for name, parameter in parameters.items():
                gradient = parameter.grad
                full = torch.zeros_like(parameter) if gradient is None else gradient.detach()
                full = full.float()
                if not bool(full.isfinite().all()):
                    raise CropiError(
                        f"prompt {group.id!r}: its exact gradient has a NaN or an infinity in {name}"
                    )
                squares[name].append(float(full.double().square().sum()) * scales[-1] ** 2)
                kept[name].append(full.flatten().to(torch.bfloat16).cpu())
                parameter.grad = None
    gram = torch.zeros(len(groups), len(groups), dtype=torch.float64, device="cpu")
    for name in list(kept):
        rows = torch.stack(kept.pop(name))
        for start in range(0, rows.shape[1], CHUNK):
            part = rows[:, start : start + CHUNK].float()
            gram += (part @ part.T).double()
    # Not before: rewards may have any size, and products of gradients are then beyond float32.
    sizes = torch.tensor(scales, dtype=torch.float64, device="cpu")
    gram *= sizes[:, None] * sizes
    total = [sum(column) or 1.0 for column in zip(*squares.values(), strict=True)]
    shares = {
        name: sum(value / whole for value, whole in zip(values, total, strict=True)) / len(total)
        for name, values in squares.items()
    }
    return ExactGradients(gram, shares)


def exact_bytes(policy: Policy, names: Sequence[str], prompts: int) -> int:
    """The memory that :func:`exact_gradients` takes beside the model."""
    parameters = _parameters(policy.model, names)
    one = sum(p.numel() for p in parameters.values())
    return one * (2 * prompts + max(p.element_size() for p in parameters.values()) + 4)


def _parameters(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    wanted = set(names)
    parameters = {
        canonical_name(name): p for name, p in model.named_parameters() if canonical_name(name) in wanted
    }
    missing = wanted - set(parameters)
    if missing:
        raise CropiError(f"names: {sorted(missing)[0]!r} is not a parameter of the model")
    return parameters


def _backward(
    policy: Policy, group: TokenGroup, estimator: Estimator, behaviour: Behaviour, budget: int
) -> float:
    """Add up a prompt's gradient in ``.grad``, divided by a power of two that is returned: half precision would lose
    weights far below 1."""
    stored = behaviour.source == "file" and estimator.ratio
    batches = list(
        make_batches([group], estimator, layout_of(policy, "padded"), budget=budget, stored_behaviour=stored)
    )
    largest = max(float((b.advantages / b.divisors).abs().max()) for b in batches)
    scale = 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
    for batch in batches:
        here = batch.to(policy.device)
        old = behaviour.model.logprobs(here) if behaviour.model is not None else here.behaviour
        weigh = estimator.weigher(here.advantages, here.divisors, old, here.responses)
        with right_backward(policy.device, here.input_ids.shape[1]):
            logprobs = _logprobs(policy.model, here)
            weights = weigh(logprobs.detach(), 0, len(logprobs))
            (logprobs * (weights / scale)).sum().backward()
    return scale


def _logprobs(model: Any, batch: MicroBatch) -> torch.Tensor:
    forget_longest(model)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits
    scored = logits.flatten(0, 1)[batch.positions].float() / batch.temperature
    return torch.log_softmax(scored, dim=-1).gather(1, batch.targets[:, None])[:, 0]


@contextmanager
def _only(model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone for a while; then every parameter asks for one as it did before."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(p) for p in parameters}
    try:
        for p, _, _ in before:
            p.requires_grad_(id(p) in wanted)
            p.grad = None
        yield
    finally:
        for p, required, gradient in before:
            p.requires_grad_(required)
            p.grad = gradient


def leave_one_out(gram: torch.Tensor) -> torch.Tensor:
    """The cosine of every prompt's gradient with the mean of all the others', float64 ``[n]``, from ``[n, n]``."""
    products, squares = gram.sum(dim=1) - gram.diagonal(), gram.diagonal()
    # |sum of the others|^2 = |sum|^2 - 2 <g, sum> + |g|^2
    others = gram.sum() - 2 * gram.sum(dim=1) + squares
    return products / (squares * others).sqrt()


def standard_errors(gram: torch.Tensor) -> torch.Tensor:
    """The standard error of every score of :func:`leave_one_out`, float64 ``[n]``, where the others are a sample of
    validation prompts: the formula of :mod:`cropi.ranking.resampling`."""
    count, scores = len(gram) - 1, leave_one_out(gram)[:, None]
    lengths = gram.diagonal().sqrt()
    # Row s: products of each prompt with the mean of all prompts but s, and that mean's length.
    with_mean = (gram.sum(dim=1) - gram) / count
    mean = ((gram.sum() - 2 * gram.sum(dim=1) + gram.diagonal()).sqrt() / count)[:, None]
    moves = gram / lengths[:, None] / mean - scores * with_mean / mean**2
    others = moves[~torch.eye(count + 1, dtype=torch.bool, device="cpu")].view(count + 1, count)
    return others.std(dim=1) / math.sqrt(count)


def by_depth(squares: dict[str, float]) -> Iterator[tuple[str, str, float]]:
    """(layer, type, share) of every parameter: the layer's number or "" outside of the layers, and the name in it."""
    for name, share in squares.items():
        parts = name.split(".")
        number = next((part for part in parts if part.isdecimal()), "")
        kind = ".".join(parts[parts.index(number) + 1 :]) if number else name
        yield number, kind.removesuffix(".weight"), share
