"""Which tap for which module of a model."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

from torch import nn

from ..names import canonical_name
from ..plan import Role, VectorPlan, plan_vector
from ..spec import SketchSpec
from .accumulator import Accumulator
from .coverage import Coverage, uncovered
from .decoder import output_embeddings
from .engine import Norm
from .matrix import MatrixSketch, matrix_sketch
from .recognise import embedding_scale, is_conv1d, is_linear, norm_of
from .taps import EmbeddingTap, LinearTap, NormTap, Tap


@dataclasses.dataclass
class Attachment:
    """What to hook where: taps by module, the parameters they cover, the head's own sketches for the fused pass."""

    taps: dict[nn.Module, Tap]
    parameters: list[nn.Parameter]
    coverage: Coverage
    head_matrix: MatrixSketch | None
    head_bias: VectorPlan | None


def plan_model(
    model: nn.Module, spec: SketchSpec, accumulator: Accumulator, exclude: Sequence[str]
) -> Attachment:
    """Find a tap for every trainable parameter.

    Raises:
        UncoveredParameterError: names each parameter that cannot be covered, its module's class and the remedy.
        ValueError: a pattern of ``exclude`` matches no parameter, no parameter is left to sketch, or two share a name
            (their coordinates would be the same).
    """
    names = {id(p): canonical_name(n) for n, p in model.named_parameters()}
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    excluded = _excluded(names, trainable, exclude)
    wanted = {i: names[i] for i in trainable if names[i] not in excluded}
    if not wanted:
        raise ValueError(
            f"nothing to sketch: {len(trainable)} of the model's {len(names)} parameters have requires_grad, and "
            f"exclude leaves out {len(excluded)}; call model.requires_grad_(True), or exclude less"
        )
    if len(set(wanted.values())) < len(wanted):
        twice = next(n for n in wanted.values() if list(wanted.values()).count(n) > 1)
        raise ValueError(f"two parameters are named {twice!r} once wrappers' parts are gone: rename one")
    owners = _owners(model)
    head = output_embeddings(model)
    builder = _Builder(spec, accumulator, wanted, owners, head)
    for path, module in model.named_modules():
        builder.visit(canonical_name(path + ".")[:-1] if path else "", module)
    # Every module that uses a parameter needs its tap: a tied weight has two, and half a gradient is a wrong one.
    missing = [(i, m) for i in wanted for m in owners[i] if i not in builder.covered or m not in builder.taps]
    if missing:
        lines = [f"{wanted[i]} {tuple(trainable[i].shape)} in {type(m).__name__}" for i, m in missing]
        raise uncovered("no tap covers these trainable parameters", lines, wanted[missing[0][0]])
    coverage = Coverage(
        total=sum(p.numel() for p in model.parameters()),
        covered=sum(trainable[i].numel() for i in builder.covered),
        by_kind=builder.by_kind,
        names=tuple(wanted.values()),
        excluded=excluded,
    )
    head_tap = builder.taps.get(head) if head is not None else None
    linear = head_tap if isinstance(head_tap, LinearTap) else None
    return Attachment(
        builder.taps,
        [trainable[i] for i in builder.covered],
        coverage,
        linear.matrix if linear else None,
        linear.bias if linear else None,
    )


class _Builder:
    def __init__(
        self,
        spec: SketchSpec,
        acc: Accumulator,
        wanted: dict[int, str],
        owners: dict[int, list[nn.Module]],
        head: nn.Module | None,
    ) -> None:
        self.spec, self.acc, self.wanted, self.owners, self.head = spec, acc, wanted, owners, head
        self.taps: dict[nn.Module, Tap] = {}
        self.covered: dict[int, None] = {}
        self.by_kind: dict[str, int] = {}
        self._matrices: dict[int, MatrixSketch] = {}

    def visit(self, path: str, module: nn.Module) -> None:
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) in self.wanted}
        if not own:
            return
        if is_linear(module) or is_conv1d(module):
            self._linear(path, module, own, transposed=not isinstance(module, nn.Linear))
        elif isinstance(module, nn.Embedding):
            self._embedding(path, module, own)
        elif own.keys() <= {"weight", "bias"}:
            self._norm(path, module, own)

    def _linear(self, path: str, module: nn.Module, own: dict[str, nn.Parameter], transposed: bool) -> None:
        if not own.keys() <= {"weight", "bias"}:
            return
        matrix = bias = None
        kind = "head" if module is self.head else "linear"
        if (weight := own.get("weight")) is not None:
            matrix = self._matrix(weight, transposed)
            self._cover(weight, kind)
        if (b := own.get("bias")) is not None:
            bias = plan_vector(self.spec, self.wanted[id(b)], b.numel())
            self._cover(b, "bias")
        self.taps[module] = LinearTap(self.acc, path, matrix, bias)

    def _embedding(self, path: str, module: nn.Embedding, own: dict[str, nn.Parameter]) -> None:
        scale = embedding_scale(module)
        if scale is None or own.keys() != {"weight"}:
            return
        self.taps[module] = EmbeddingTap(
            self.acc, path, self._matrix(own["weight"]), module.padding_idx, scale
        )
        self._cover(own["weight"], "embedding")

    def _norm(self, path: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        if (found := norm_of(module)) is None:
            return
        plans = {}
        for which, p in own.items():
            plans[which] = plan_vector(self.spec, self.wanted[id(p)], p.numel())
            self._cover(p, "norm")
        centered, eps = found
        norm = Norm(centered, eps, plans.get("weight"), plans.get("bias"))
        self.taps[module] = NormTap(self.acc, path, norm)

    def _matrix(self, weight: nn.Parameter, transposed: bool = False) -> MatrixSketch:
        """One sketch per parameter: a tied weight's two modules must agree on every coordinate."""
        if id(weight) not in self._matrices:
            rows, cols = reversed(weight.shape) if transposed else weight.shape
            users = self.owners[id(weight)]
            looked_up = any(isinstance(m, nn.Embedding) for m in users)
            role: Role = "tied" if looked_up and len(users) > 1 else "embedding" if looked_up else "linear"
            self._matrices[id(weight)] = matrix_sketch(self.spec, self.wanted[id(weight)], rows, cols, role)
        return self._matrices[id(weight)]

    def _cover(self, p: nn.Parameter, kind: str) -> None:
        if id(p) not in self.covered:
            self.covered[id(p)] = None
            self.by_kind[kind] = self.by_kind.get(kind, 0) + p.numel()


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(module)
    return owners


def _excluded(
    names: dict[int, str], trainable: dict[int, nn.Parameter], patterns: Sequence[str]
) -> dict[str, int]:
    if isinstance(patterns, str):
        raise ValueError(f"exclude={patterns!r}: give a list of patterns, e.g. exclude=[{patterns!r}]")
    excluded: dict[str, int] = {}
    for pattern in patterns:
        matched = [i for i in trainable if fnmatch.fnmatchcase(names[i], pattern)]
        if not matched:
            example = next(iter(names.values()), "none at all")
            raise ValueError(f"exclude pattern {pattern!r} matches no trainable parameter (e.g. {example})")
        excluded.update({names[i]: trainable[i].numel() for i in matched})
    return excluded
