"""Builds the taps of a model, module by module: which tap a module gets, and with which coordinates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from ...names import module_name
from ...plan import Role, VectorPlan, plan_vector
from ..model.experts import Unsupported, recognise_experts
from ..model.head import base_of, output_embeddings
from ..model.ranks import ranks_of
from ..model.recognise import (
    embedding_scale,
    is_conv1d,
    is_linear,
    is_router,
    norm_of,
    takes_one_tensor,
    uses_weight_once,
)
from ..model.spread import Share
from ..sums.accumulator import Accumulator
from ..sums.engine import Norm
from ..sums.matrix import MatrixSketch, matrix_sketch
from ..taps import exact
from ..taps.experts import ExpertsTap, RouterTap
from ..taps.parts import PartEmbeddingTap, PartLinearTap, PartMatrix, PartNormTap
from ..taps.taps import EmbeddingTap, LinearTap, NormTap, Tap


class TapBuilder:
    """Finds the taps of the wanted parameters. Modules in ``formed`` get none: their gradients are formed instead."""

    def __init__(
        self,
        model: nn.Module,
        acc: Accumulator,
        wanted: dict[nn.Parameter, str],
        formed: Collection[nn.Module] = (),
    ) -> None:
        self.spec, self.acc, self.wanted = acc.spec, acc, wanted
        self.owners, self.head = owners_of(model), base_of(output_embeddings(model))
        self.ranks = ranks_of(model)
        self.taps: dict[nn.Module, Tap] = {}
        self.exact: list[exact.Exact] = []
        self.covered: dict[nn.Parameter, None] = {}
        self.by_kind: dict[str, int] = {}
        self.reasons: dict[nn.Module, str] = {}  # why a module's parameters are not sketched
        self._matrices: dict[nn.Parameter, MatrixSketch] = {}
        modules = dict(model.named_modules())
        for path, module in modules.items():
            if module not in formed:
                self._visit(module_name(path), module)
        users = _users_of(modules.values())
        for module in modules.values():
            self._form(module, users)

    def missing(self) -> list[tuple[nn.Parameter, nn.Module]]:
        """Wanted parameters and modules that use them without a tap."""
        formed = {one.parameter for one in self.exact}
        return [
            (p, m)
            for p in self.wanted
            for m in self.owners[p]
            if p not in formed and (p not in self.covered or m not in self.taps)
        ]

    def _visit(self, path: str, module: nn.Module) -> None:
        own = {n: p for n, p in module.named_parameters(recurse=False) if p in self.wanted}
        if not own:
            return
        if is_linear(module) or is_conv1d(module):
            self._linear(path, module, own, transposed=not isinstance(module, nn.Linear))
        elif isinstance(module, nn.Embedding):
            self._embedding(path, module, own)
        elif not self._experts(path, module, own) and own.keys() <= {"weight", "bias"}:
            self._norm(path, module, own)
            if module not in self.taps and is_router(module) and uses_weight_once(module):
                self._router(path, module, own)

    def _linear(self, path: str, module: nn.Module, own: dict[str, nn.Parameter], transposed: bool) -> None:
        if not own.keys() <= {"weight", "bias"}:
            return
        matrix, bias = self._weight_and_bias(own, "head" if module is self.head else "linear", transposed)
        if self.ranks is None:
            self.taps[module] = LinearTap(self.acc, path, matrix, bias, transposed)
            return
        tap = PartLinearTap(self.acc, path, matrix, bias, transposed, shares=self._shares(own))
        if tap.splits_outputs and "bias" in own and tap.shares["bias"].axis is None:
            self.reasons[module] = "its outputs are split over ranks, and its bias is not"
            return
        self.taps[module] = tap

    def _embedding(self, path: str, module: nn.Embedding, own: dict[str, nn.Parameter]) -> None:
        if module.scale_grad_by_freq:
            self.reasons[module] = (
                "scale_grad_by_freq divides its gradient by how often a token occurs in the batch, so that no "
                "prompt has a gradient of its own"
            )
            return
        scale = embedding_scale(module)
        if scale is None or own.keys() != {"weight"}:
            return
        matrix, padding = self._matrix(own["weight"]), module.padding_idx
        if self.ranks is None:
            self.taps[module] = EmbeddingTap(self.acc, path, matrix, padding, scale)
        else:
            shares = self._shares(own)
            tap = self.taps[module] = PartEmbeddingTap(self.acc, path, matrix, padding, scale, shares=shares)
            tap.adds = shares["weight"].adds
        self._cover(own["weight"], "embedding")

    def _norm(self, path: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        if not takes_one_tensor(module) or (kind := norm_of(module)) is None:
            return
        shares = self._shares(own)
        if any(share.axis is not None for share in shares.values()):
            return
        plans = {}
        for which, p in own.items():
            plans[which] = plan_vector(self.spec, self.wanted[p], p.numel())
            self._cover(p, "norm")
        centered, eps = kind
        norm = Norm(centered, eps, plans.get("weight"), plans.get("bias"))
        if self.ranks is None:
            self.taps[module] = NormTap(self.acc, path, norm)
        else:
            self.taps[module] = PartNormTap(self.acc, path, norm, shares=shares)

    def _experts(self, path: str, module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
        try:
            layout = recognise_experts(module)
            if layout is not None and (layout.repeated or layout.biases()) and self._is_split(own):
                raise Unsupported(
                    "experts with biases, or of Llama 4, that are split over ranks (tensor parallel)"
                )
            if layout is not None and self.spec.kind != "slab":
                raise Unsupported(f"experts are sketched by kind='slab', not by kind={self.spec.kind!r}")
        except Unsupported as error:
            self.reasons[module] = str(error)
            return True
        if layout is None:
            return False
        matrices, biases = {}, {}
        for name, p in own.items():
            if name in layout.matrices():
                experts, rows, cols = layout.rows_and_cols(p)
                matrices[name] = matrix_sketch(self.spec, self.wanted[p], experts * rows, cols, "linear")
                if (share := self._share(p)).axis is not None:
                    matrices[name] = PartMatrix(matrices[name], share, (share.axis == 1) != layout.transposed)
            else:
                biases[layout.weight_of(name)] = plan_vector(self.spec, self.wanted[p], p.numel())
            self._cover(p, "expert" if name in layout.matrices() else "bias")
        group = self.ranks if self._is_split(own) else None
        tap = self.taps[module] = ExpertsTap(self.acc, path, layout, matrices, biases, group)
        tap.adds = group is not None or self._whole_share(own).adds
        return True

    def _router(self, path: str, module: nn.Module, own: dict[str, nn.Parameter]) -> None:
        if (share := self._whole_share(own)).axis is not None:
            self.reasons[module] = "split over ranks, and no plain linear layer"
            return
        matrix, bias = self._weight_and_bias(own, "router")
        tap = self.taps[module] = RouterTap(self.acc, path, matrix, bias)
        tap.adds = share.adds

    def _weight_and_bias(
        self, own: dict[str, nn.Parameter], kind: str, transposed: bool = False
    ) -> tuple[MatrixSketch | None, VectorPlan | None]:
        """The sketches of a linear layer's parameters, as far as they are wanted."""
        matrix = bias = None
        if (weight := own.get("weight")) is not None:
            matrix = self._matrix(weight, transposed)
            self._cover(weight, kind)
        if (b := own.get("bias")) is not None:
            bias = plan_vector(self.spec, self.wanted[b], b.numel())
            self._cover(b, "bias")
        return matrix, bias

    def _share(self, p: nn.Parameter) -> Share:
        """What of a parameter this rank has, and adds: all of it, where no ranks share the model."""
        return Share(tuple(p.shape)) if self.ranks is None else self.ranks.share(p)

    def _shares(self, own: dict[str, nn.Parameter]) -> dict[str, Share]:
        return {which: self._share(p) for which, p in own.items()}

    def _is_split(self, own: dict[str, nn.Parameter]) -> bool:
        return self._whole_share(own).axis is not None

    def _whole_share(self, own: dict[str, nn.Parameter]) -> Share:
        """The share of the first of a module's parameters that is split over ranks; if none is, of the first."""
        shares = [*self._shares(own).values()]
        return next((share for share in shares if share.axis is not None), shares[0])

    def _form(self, module: nn.Module, users: Mapping[nn.Module, Sequence[nn.Module]]) -> None:
        """Plan to form the gradients of the parameters of ``module`` that no tap covers, if they are small enough.

        ``users`` are the modules that hold each module.
        """
        if module in self.reasons:
            return
        for key, p in module.named_parameters(recurse=False):
            name, alone = self.wanted.get(p), len(self.owners[p]) == 1
            if name is None or p in self.covered or not alone or not 0 < p.numel() <= exact.LARGEST:
                continue
            # Coordinates do not depend on the way to the gradient: a linear layer that is used beside its module has
            # those of any other.
            known = key == "weight" and (isinstance(module, nn.Embedding | nn.Linear) or is_router(module))
            matrix = self._matrix(p) if known else None
            plan = None if known else plan_vector(self.spec, name, p.numel())
            share = None if self.ranks is None else self.ranks.share(p)
            if isinstance(matrix, PartMatrix):  # the gradient is put at its place in the whole before
                matrix = matrix.matrix
            self.exact.append(exact.Exact(name, key, p, _around(module, users), plan, matrix, share=share))
            self._cover(p, "exact")

    def _matrix(self, weight: nn.Parameter, transposed: bool = False) -> MatrixSketch:
        """One sketch per parameter: a tied weight's two modules must agree on every coordinate."""
        if weight not in self._matrices:
            rows, cols = reversed(weight.shape) if transposed else weight.shape
            users = self.owners[weight]
            looked_up = any(isinstance(m, nn.Embedding) for m in users)
            role: Role = "tied" if looked_up and len(users) > 1 else "embedding" if looked_up else "linear"
            matrix = matrix_sketch(self.spec, self.wanted[weight], rows, cols, role)
            if (share := self._share(weight)).axis is not None:
                matrix = PartMatrix(matrix, share, (share.axis == 0) != transposed)
            self._matrices[weight] = matrix
        return self._matrices[weight]

    def _cover(self, p: nn.Parameter, kind: str) -> None:
        if p not in self.covered:
            self.covered[p] = None
            self.by_kind[kind] = self.by_kind.get(kind, 0) + p.numel()


def _users_of(modules: Iterable[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """The modules that hold each module as a part."""
    users: dict[nn.Module, list[nn.Module]] = {}
    for module in modules:
        for part in module.children():
            users.setdefault(part, []).append(module)
    return users


def _around(module: nn.Module, users: Mapping[nn.Module, Sequence[nn.Module]]) -> tuple[nn.Module, ...]:
    """``module``, and every module that it is inside of: on several ways out to the model, where it is shared."""
    found = {module: None}
    ahead = [module]
    for inner in ahead:
        new = [outer for outer in users.get(inner, ()) if outer not in found]
        found |= dict.fromkeys(new)
        ahead += new
    return tuple(found)


def owners_of(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The modules that own each parameter: several, where a weight is tied."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(module)
    return owners
