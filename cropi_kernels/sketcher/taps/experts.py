"""Taps of a mixture of experts: the fused experts themselves, and the routers that choose among them.

A hook on the output of such a module would not see the products: experts multiply inside, and a router returns scores.
Therefore their ``forward`` is replaced while a sketcher is active, on the module and not in its class.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...plan import VectorPlan
from ..model.experts import Experts, Order, run_experts
from ..model.hooks import capture
from ..model.ranks import Ranks, into_parts, of_parts
from ..model.replaced import Replaced, beneath, forward_beneath
from ..model.spread import local
from ..sums.accumulator import Accumulator
from ..sums.engine import Site
from ..sums.matrix import MatrixSketch
from .parts import PartMatrix
from .taps import Formed, LinearTap, Tap, vector_adders

CASTS = frozenset({"to", "type", "type_as", "float", "double", "bfloat16", "half"})


class ExpertsTap(Tap):
    """Fused experts: the rows of all tokens, sorted by (expert, segment), with their inputs and output gradients."""

    def __init__(
        self,
        accumulator: Accumulator,
        where: str,
        layout: Experts,
        matrices: dict[str, MatrixSketch],
        biases: dict[str, VectorPlan],
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(accumulator, where)
        self.layout, self.experts, self.biases = layout, matrices, biases
        self.ranks = ranks  # that have some outputs of each expert's first product, some inputs of its second

    def hook(self, module: nn.Module) -> Replaced:
        self._signature = inspect.signature(forward_beneath(module))
        return Replaced(module, self._forward)

    def _forward(self, module: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.acc.listens_to(self.where):
            given = tuple(self._signature.bind(*args, **kwargs).arguments.values())
            if self._fits(module, given):
                # The experts run once, for the sketches of further specs of the same pass too.
                below = (getattr(run, "__self__", None) for run in beneath(original))
                others = [
                    tap
                    for tap in below
                    if isinstance(tap, ExpertsTap) and tap.acc.segments is self.acc.segments
                ]
                return self.run(module, given, others)
        return original(*args, **kwargs)

    def _fits(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the call is given every token once; refuses it if not."""
        segments, hidden, repeated = self.acc.segments, args[0], self.layout.repeated
        assert segments is not None
        tokens = segments.batch * segments.length
        rows = tokens * (len(getattr(module, self.layout.up)) if repeated else 1)
        if hidden.ndim == 2 and len(hidden) == rows and len(args) == (1 if repeated else 3):
            return True
        self.refuse(
            f"{self.where} saw an input of shape {tuple(hidden.shape)} in a batch of {segments.batch} x "
            f"{segments.length} tokens: it does not see every token once; exclude its parameters"
        )
        return False

    def run(
        self, module: nn.Module, args: tuple[Any, ...], others: Sequence[ExpertsTap] = ()
    ) -> torch.Tensor:
        segments, layout, hidden = self.acc.segments, self.layout, args[0]
        assert segments is not None
        tokens, n_experts = segments.batch * segments.length, len(getattr(module, layout.up))
        if layout.repeated:
            order = Order.of(torch.arange(len(hidden), device=hidden.device)[:, None] // tokens, n_experts)
        else:
            order = Order.of(args[1], n_experts)
        token = order.token % tokens
        ranges = segments.ranges_of(order.expert, token, n_experts)

        def tapped(name: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            shared = name == layout.up and not layout.repeated
            for tap in (self, *others):
                y = tap._captured(name, y, hidden if shared else x, token if shared else None, ranges)
            return y

        if self.ranks is None:
            return run_experts(module, layout, args, tapped, order)
        part = copy.copy(module)  # shares all but the parameters
        part.__dict__["_parameters"] = {name: local(p) for name, p in module.named_parameters(recurse=False)}
        given = into_parts(hidden, self.ranks), args[1], into_parts(args[2], self.ranks)
        return of_parts(run_experts(part, layout, given, tapped, order), self.ranks)

    def _captured(
        self, name: str, y: torch.Tensor, x: torch.Tensor, token: torch.Tensor | None, ranges: torch.Tensor
    ) -> torch.Tensor:
        """``y`` with a capture in its graph; ``token``: the rows of ``x`` that were multiplied, unless they are all."""
        matrix, bias = self.experts.get(name), self.biases.get(name)
        if matrix is None and bias is None:
            return y

        def add(dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
            if matrix is not None and kept is not None:
                rows = kept if token is None else kept.index_select(0, token)
                self.acc.engine_of(matrix.name).add_grouped(dy, rows, ranges, matrix)
            if bias is not None:
                self.acc.engine_of(bias.name).add_grouped_bias(dy, ranges, bias)

        if matrix is None:
            return capture(y, self.within(add))
        # A token is folded and kept once, not once for every expert that it goes to.
        key = None if token is None else matrix.fold_key
        with self.acc.timed(), torch.no_grad():
            kept = self.acc.folded(key, x, lambda: matrix.fold(x.detach()))
        return capture(y, self.within(add), kept)

    def adders(self) -> dict[str, Formed]:
        def adder(matrix: MatrixSketch) -> Formed:
            return lambda gradient, out: matrix.add_formed(self.layout.stacked(gradient).contiguous(), out)

        weights = {name: adder(matrix) for name, matrix in self.experts.items()}
        named = {self.layout.up: self.layout.up_bias, self.layout.down: self.layout.down_bias}
        return weights | vector_adders(**{str(named[name]): plan for name, plan in self.biases.items()})

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor | None:
        matrix = self.experts.get(name)
        return matrix.share.whole(gradient) if isinstance(matrix, PartMatrix) else gradient

    def attach(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        raise AssertionError(f"{self.where}: experts have no forward hook")

    def backward(self, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        raise AssertionError(f"{self.where}: experts have no forward hook")


class RouterTap(LinearTap):
    """A module that calls ``F.linear(x, weight[, bias])`` with its own weight, and returns anything (scores, indices).

    The product is recognised by the weight's identity, also after casts, whatever is done with the result.
    """

    def hook(self, module: nn.Module) -> Replaced:
        return Replaced(module, self._forward)

    def _forward(self, module: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.acc.listens_to(self.where):
            return original(*args, **kwargs)
        with _Products(self, module) as products:
            out = original(*args, **kwargs)
        if products.seen != 1:
            self.refuse(
                f"{self.where} multiplies by its weight {products.seen} times: exclude its parameters"
            )
        return out

    def product(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert self.acc.segments is not None
        return self.attach(x, y, self._sites[self.acc.segments.heads_first(x)])


class _Products(TorchFunctionMode):
    """Watches every torch function inside, and hands the product with a module's weight to its tap."""

    def __init__(self, tap: RouterTap, module: nn.Module) -> None:
        super().__init__()
        self.tap, self.module, self.seen = tap, module, 0
        self.weight = [module.weight]  # and its casts
        self.own = [module.weight] if tap.bias is None else [module.weight, module.bias]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given = [v for v in (*args, *kwargs.values()) if any(v is w for w in self.own)]
        if not given:
            return out
        name = getattr(function, "__name__", "")
        if function is nn.functional.linear:
            x, weight = (*args, *kwargs.values())[:2]
            if any(weight is w for w in self.weight) and not any(x is w for w in self.own):
                self.seen += 1
                return self.tap.product(x, out)
        if name in CASTS:
            if any(given[0] is w for w in self.weight):
                self.weight.append(out)
            self.own.append(out)
        elif isinstance(out, torch.Tensor):
            self.tap.refuse(
                f"{self.tap.where} uses its weight in {name}, which no tap sees: exclude its parameters"
            )
        return out
