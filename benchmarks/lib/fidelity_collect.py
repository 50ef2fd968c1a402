"""Exact gradients prompt by prompt, and everything the table needs from them. Resumable: a file per prompt.

Nothing that grows with prompts x parameters is kept: the validation means (one gradient per set) stay in memory, and
each training prompt leaves its exact inner products and its sketches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cropi.atomic import write_atomic
from cropi.errors import CropiError
from cropi.gradient.batches import MicroBatch, make_batches
from cropi.gradient.estimators import Estimator, make_estimator
from cropi.gradient.layout import choose_layout
from cropi.gradient.tokenize import TokenGroup
from cropi.model.fingerprint import model_fingerprint
from cropi_kernels import canonical_name
from cropi_kernels.sketcher.policy.decoder import split_model

from .fidelity_variants import Sketcher, Variant

Gradient = dict[str, torch.Tensor]


def layer_type(name: str) -> str:
    """q_proj, k_proj, ..., embed_tokens (with the tied head) or norm."""
    if "norm" in name:
        return "norm"
    return re.sub(r"\.(weight|bias)$", "", name).rsplit(".", 1)[-1]


@dataclasses.dataclass
class Exact:
    """Exact gradients of a model on token groups by ordinary autograd, weight gradients and all."""

    model: Any
    estimator: Estimator = dataclasses.field(default_factory=lambda: make_estimator("cropi"))

    def __post_init__(self) -> None:
        self.split = split_model(self.model)
        self.layout = choose_layout(self.model)
        self.names = {n: canonical_name(n) for n, _ in self.model.named_parameters()}

    def batches(self, group: TokenGroup) -> Iterator[MicroBatch]:
        return make_batches([group], self.estimator, self.layout, stored_behaviour=group.logprobs is not None)

    def gradient(self, group: TokenGroup) -> Gradient:
        self.model.zero_grad(set_to_none=True)
        for batch in self.batches(group):
            hidden = self.split.hidden(
                batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
            )
            z = self.split.head(hidden.reshape(-1, hidden.shape[-1])[batch.positions]) / batch.temperature
            logprobs = torch.log_softmax(z, -1).gather(1, batch.targets[:, None])[:, 0]
            weights = self.estimator.weights(
                logprobs.detach(), batch.behaviour, batch.advantages, batch.divisors
            )
            (weights * logprobs).sum().backward()
        return {self.names[n]: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


def role_of(name: str, gradient: torch.Tensor, tied: bool) -> str:
    if gradient.ndim == 1:
        return "vector"
    return ("tied" if tied else "embedding") if layer_type(name) == "embed_tokens" else "linear"


def parts_of(variants: list[Variant], shapes: dict[str, tuple[str, str]]) -> list[tuple[int, str]]:
    """(variant, layer type) pairs that have a sketch; ``shapes`` maps parameters to (layer type, role)."""
    found = []
    for v, variant in enumerate(variants):
        kinds = {t for t, role in shapes.values() if applied_role(variant, role)}
        found += [(v, t) for t in sorted(kinds)]
    return found


def applied_role(variant: Variant, role: str) -> str | None:
    """The role under which a variant sketches a parameter, or None if it leaves it to other variants."""
    if role in variant.roles:
        return role
    return "tied-as-linear" if role == "tied" and "tied-as-linear" in variant.roles else None


def sketch_all(
    gradient: Gradient,
    variants: list[Variant],
    shapes: dict[str, tuple[str, str]],
    sketchers: list[Sketcher] | None = None,
) -> np.ndarray:
    """float32 [parts, dim] in the order of `parts_of`."""
    parts = parts_of(variants, shapes)
    index = {part: i for i, part in enumerate(parts)}
    out = np.zeros((len(parts), 32768), np.float32)
    sketchers = sketchers or [Sketcher(variant.spec) for variant in variants]
    for v, (variant, sketcher) in enumerate(zip(variants, sketchers, strict=True)):
        for name, g in gradient.items():
            kind, role = shapes[name]
            applied = applied_role(variant, role)
            if applied is not None:
                sketch = sketcher.vector(name, g) if g.ndim == 1 else sketcher.matrix(name, g, applied)
                out[index[v, kind]] += sketch.numpy()
    return out


def shapes_of(model: Any) -> dict[str, tuple[str, str]]:
    """(layer type, role) of every parameter."""
    tied = model.config.tie_word_embeddings
    named = {canonical_name(n): p for n, p in model.named_parameters()}
    return {name: (layer_type(name), role_of(name, p, tied)) for name, p in named.items()}


def collect(
    model: Any,
    train: list[TokenGroup],
    valid: dict[str, list[TokenGroup]],
    variants: list[Variant],
    work: Path,
) -> None:
    """Fill ``work`` with one .npz per prompt: sketches, and for training prompts the exact products per layer type.

    Raises:
        CropiError: ``work`` holds those of another model, other prompts or other variants.
    """
    work.mkdir(parents=True, exist_ok=True)
    _check_same(work / "made_from.json", model, train, valid, variants)
    paths = [work / f"train-{i:04d}.npz" for i in range(len(train))]
    if all(path.exists() for path in [*paths, *(work / f"valid-{name}.npz" for name in valid)]):
        return
    exact = Exact(model)
    shapes, sketchers = shapes_of(model), [Sketcher(variant.spec) for variant in variants]
    types = sorted({kind for kind, _ in shapes.values()})
    means: dict[str, Gradient] = {}
    for name, groups in valid.items():
        mean: Gradient = {}
        for group in tqdm(groups, desc=f"validation {name}", unit="prompt", mininterval=10):
            g = exact.gradient(group)
            for key, value in g.items():
                mean[key] = (
                    value / len(groups) if key not in mean else mean[key].add_(value, alpha=1 / len(groups))
                )
        means[name] = mean
        path = work / f"valid-{name}.npz"
        if not path.exists():  # the mean's sketch is the mean of the sketches
            _save(
                path,
                sketches=sketch_all(mean, variants, shapes, sketchers),
                squares=_products(mean, mean, types),
            )
    for path, group in zip(paths, tqdm(train, desc="train", unit="prompt", mininterval=10), strict=True):
        if path.exists():
            continue
        g = exact.gradient(group)
        products = np.stack([_products(g, means[name], types) for name in sorted(means)])
        _save(
            path,
            sketches=sketch_all(g, variants, shapes, sketchers),
            squares=_products(g, g, types),
            products=products,
        )
    model.zero_grad(set_to_none=True)


def _check_same(
    path: Path,
    model: Any,
    train: list[TokenGroup],
    valid: dict[str, list[TokenGroup]],
    variants: list[Variant],
) -> None:
    """Numbers of two models or data sets must not mix in one folder; more training prompts may follow."""
    wanted = {
        "model": model_fingerprint(model)["weights"],
        "train": [_digest(group) for group in train],
        "valid": {name: [_digest(group) for group in groups] for name, groups in valid.items()},
        "variants": [[variant.label, variant.spec.to_dict(), list(variant.roles)] for variant in variants],
    }
    if not path.exists() and any(path.parent.glob("*.npz")):
        raise CropiError(
            f"{path.parent} does not say what it was made from; give another --work, or remove that folder"
        )
    made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else wanted | {"train": []}
    both = min(len(made["train"]), len(train))
    for key in wanted:
        same = made[key][:both] == wanted[key][:both] if key == "train" else made[key] == wanted[key]
        if not same:
            raise CropiError(
                f"{path.parent} was made from another {key}; give another --work, or remove that folder"
            )
    if len(train) > both:
        write_atomic(path, json.dumps(wanted) + "\n")


def _digest(group: TokenGroup) -> str:
    content = [
        group.id,
        group.prompt,
        group.responses,
        group.group.rewards,
        group.logprobs,
        group.temperature,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _products(g: Gradient, h: Gradient, types: list[str]) -> np.ndarray:
    """Exact inner products per layer type: float32 products, summed in float64 over blocks."""
    out = np.zeros(len(types))
    for name, value in g.items():
        for a, b in zip(value.reshape(-1).split(1 << 16), h[name].reshape(-1).split(1 << 16), strict=True):
            out[types.index(layer_type(name))] += float(torch.dot(a, b))
    return out


def _save(path: Path, **arrays: np.ndarray) -> None:
    partial = path.with_suffix(".tmp.npz")
    np.savez(partial, **arrays)
    partial.rename(path)
