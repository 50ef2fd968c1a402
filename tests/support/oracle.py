"""Log-probs and gradients from their definitions: one response at a time, no padding, no batch, plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cropi_kernels import SketchSpec, canonical_name
from cropi_kernels.testing import sketch_gradients
from support.made_data import make_tokenizer

EPS = 1e-4  # CROPI's, beside the rewards' standard deviation


def response_logprobs(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """log pi of every token of a response behind its prompt, in a row of their own."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[
        0, len(prompt) - 1 : -1
    ]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@torch.no_grad()
def stored_logprobs(model: Any, record: dict[str, Any], temperature: float = 1.0) -> list[list[float]]:
    """Those of a record's responses, as files hold them: rounding may have left one above 0."""
    return [
        response_logprobs(model, record["prompt_ids"], ids, temperature).clamp(max=0.0).tolist()
        for ids in record["response_ids"]
    ]


def with_token_ids(record: dict[str, Any]) -> dict[str, Any]:
    """A record of text, with its token ids; responses end with the end token."""
    tokenizer = make_tokenizer()
    return record | {
        "prompt_ids": tokenizer(record["prompt"])["input_ids"],
        "response_ids": [[*tokenizer(text)["input_ids"], 1] for text in record["responses"]],
    }


# ---------------------------------------------------------------------------------------------------- objectives
def advantages(rewards: Sequence[float], kind: str) -> list[float]:
    """``std``: (R - mean) / (sd + eps); ``mean``: R - mean; ``loo``: R - mean of the others; ``reward``: R."""
    r = np.array(rewards, dtype=np.float64)
    if kind == "loo":
        return [float(r[k] - np.delete(r, k).mean()) for k in range(len(r))]
    centred = r if kind == "reward" else r - r.mean()
    return (centred / (r.std(ddof=1) + EPS) if kind == "std" else centred).tolist()


def clipped(ratio: torch.Tensor, a: float, low: float, high: float) -> torch.Tensor:
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


Term = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
Objective = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[float]], torch.Tensor]


def per_response(term: Term) -> Objective:
    return lambda new, old, a: sum(term(p, q, x) for p, q, x in zip(new, old, a, strict=True)) / len(new)  # type: ignore[return-value]


def per_token(term: Term) -> Objective:
    return lambda new, old, a: (
        sum(term(p, q, x).sum() for p, q, x in zip(new, old, a, strict=True)) / sum(map(len, new))  # type: ignore[return-value]
    )


def ppo(p: torch.Tensor, q: torch.Tensor, a: float) -> torch.Tensor:
    return clipped((p - q).exp(), a, 0.2, 0.2)


def gspo(low: float, high: float) -> Objective:
    return per_response(lambda p, q, a: clipped((p - q).mean().exp(), a, low, high))


# Of every estimator, from the papers: its advantages, and what is maximised over the log-probs of the scored tokens of
# a prompt's responses, by the policy and by the one that sampled them.
OBJECTIVES: dict[str, tuple[str, Objective]] = {
    "cropi": ("std", per_response(lambda p, q, a: ((p - q).exp() * a).mean())),
    "grpo": ("std", per_response(lambda p, q, a: ppo(p, q, a).mean())),
    "ppo": ("std", per_response(lambda p, q, a: ppo(p, q, a).mean())),
    "gspo": ("std", gspo(3e-4, 4e-4)),
    "reinforce": ("mean", per_response(lambda p, q, a: (p * a).sum())),
    "rloo": ("loo", per_response(lambda p, q, a: (p * a).sum())),
    "dr_grpo": ("mean", per_response(lambda p, q, a: ppo(p, q, a).sum())),
    "bnpo": ("std", per_response(lambda p, q, a: ppo(p, q, a).sum())),
    "dapo": ("std", per_token(lambda p, q, a: clipped((p - q).exp(), a, 0.2, 0.28))),
    "cispo": ("std", per_token(lambda p, q, a: (p - q).exp().clamp(max=5.0).detach() * a * p)),
    "sft": ("reward", per_response(lambda p, q, a: (p * a).mean())),
}


def objective(
    model: Any, record: dict[str, Any], estimator: str | tuple[str, Objective] = "cropi"
) -> torch.Tensor:
    """What the gradient of a record with token ids is one of. Without stored log-probs all ratios are 1."""
    kind, value = OBJECTIVES[estimator] if isinstance(estimator, str) else estimator
    new, old = list[torch.Tensor](), list[torch.Tensor]()
    for k, ids in enumerate(record["response_ids"]):
        kept = torch.tensor(record["loss_mask"][k] if record.get("loss_mask") else [1] * len(ids)).bool()
        logprobs = response_logprobs(model, record["prompt_ids"], ids, record.get("temperature", 1.0))[kept]
        stored = record["logprobs"][k] if record.get("logprobs") else None
        new.append(logprobs)
        old.append(
            logprobs.detach()
            if stored is None
            else torch.tensor([p for p, scored in zip(stored, kept) if scored]).to(logprobs)
        )
    return value(new, old, advantages(record["rewards"], kind))


def sketch_of(
    model: Any, record: dict[str, Any], estimator: str | tuple[str, Objective], spec: SketchSpec, **given: Any
) -> torch.Tensor:
    """The sketch of a record's gradient in float64, coordinate by coordinate."""
    gradients = gradients_of(model, objective(model, record, estimator))
    return sketch_gradients(model, {name: g.double() for name, g in gradients.items()}, spec, **given)


def gradients_of(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Its gradient by canonical names; parameters that it does not depend on are left out."""
    named = {canonical_name(name): p for name, p in model.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def flat_gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """Its gradient in one row, parameters in the model's order."""
    return torch.cat([gradient.flatten() for gradient in gradients_of(model, loss).values()])
