"""One tap per kind of module: what it keeps in forward, what it adds to the sketch in backward."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from ...ops.sketch_vector import sketch_vector
from ...plan import VectorPlan
from ..batch.inputs import ordinary
from ..batch.segments import NotTokensError, Segments
from ..model.hooks import Sink, capture, widened_input
from ..sums.accumulator import Accumulator
from ..sums.engine import Norm, Site
from ..sums.matrix import MatrixSketch
from .one_row import one_row, widened


def count_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return sum(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values()))


class Hook(Protocol):
    """A tap on a module, until `remove`."""

    def remove(self) -> None: ...


Formed = Callable[[torch.Tensor, torch.Tensor], None]


class Tap(abc.ABC):
    """Forward hook of a module; ``where`` is the module's name, for messages."""

    def __init__(self, accumulator: Accumulator, where: str) -> None:
        self.acc, self.where = accumulator, where
        self._sites = Site(where, False), Site(where, True)
        self.heard: Segments | None = None  # the last batch whose backward pass came by
        self.adds = True  # False: another rank adds what this one has too

    def hook(self, module: nn.Module) -> Hook:
        """Tap the module until the returned handle's `remove`."""
        # Before the hooks of others, which may change the output.
        return module.register_forward_hook(self, prepend=True, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        segments = self.acc.segments
        if segments is None or not self.acc.listens_to(self.where):
            return y
        if (kwargs or len(args) > 1) and count_tensors(args, kwargs) > 1:
            self.refuse(
                f"{self.where} is called with a second tensor (a gate?), of which its tap does not know: exclude its "
                "parameters"
            )
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        if self.acc.listener is not None:
            self.acc.listener.attached(self, y)
        try:
            return self.attach(x, y, self._sites[x.ndim == 4 and segments.heads_first(x)])
        except NotTokensError as error:
            return capture(y, self._refusal(str(error)))

    def silent(self, segments: Segments) -> bool:
        """Whether no gradient came by in the batch ``segments``."""
        return self.heard is not segments

    def refuse(self, message: str) -> None:
        """The module's call cannot be sketched: raise an error or, while a model is tried, note it."""
        if self.acc.refusals is None:
            raise NotTokensError(message)
        self.acc.refusals[self.where] = message

    def _refusal(self, message: str) -> Sink:
        """What to capture a call on something else than the batch's tokens with: an error if a gradient reaches it.

        The call itself is no error: DoRA calls its matrices on a unit matrix, and uses the product without gradient.
        """
        segments = self.acc.segments

        def refuse(dy: torch.Tensor) -> None:
            if self.acc.hears(segments, self.where):
                self.refuse(message)

        return refuse

    @abc.abstractmethod
    def attach(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        """``y`` with the capture in its graph."""

    @abc.abstractmethod
    def backward(self, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        """Add the output's gradient ``dy``, with what `attach` kept, to the sketches."""

    def sink(self, site: Site) -> Sink:
        return self.within(functools.partial(self.backward, site))

    def within(self, add: Sink, segments: Segments | None = None) -> Sink:
        """``add``, guarded: it runs for one batch only (the open one, if none is given), is timed, and is reported to
        the self-test. The graph of a batch that failed may still be run in the next one; that is an error."""
        segments = segments or self.acc.segments

        def guarded(dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
            # A backward pass with create_graph: `hears` takes note of it.
            if torch.is_grad_enabled() and self.acc.hears(segments, self.where):
                with torch.no_grad():
                    return guarded(dy, kept)
            if self.acc.hears(segments, self.where):
                self.heard = segments
                with self.acc.timed():
                    try:
                        if self.adds:
                            add(dy, kept)
                    except NotTokensError as error:
                        self.refuse(str(error))
                if self.acc.listener is not None:
                    self.acc.listener.added(self, dy, kept)

        return guarded

    def formed(self, module: nn.Module) -> list[tuple[nn.Parameter, Formed]]:
        """The parameters of ``module`` that this tap sketches, each with ``add(gradient, out)``: the sketch of a
        gradient that exists (float32, of the parameter's shape) added to ``out`` float32 [1, base_dim]."""

        def adder(name: str, add_whole: Formed) -> Formed:
            def add(gradient: torch.Tensor, out: torch.Tensor) -> None:
                if (whole := self.whole(name, gradient)) is not None:
                    add_whole(whole, out)

            return add

        return [(owned(module, name), adder(name, add)) for name, add in self.adders().items()]

    @abc.abstractmethod
    def adders(self) -> dict[str, Formed]:
        """What `formed` adds of whole gradients, by the parameters' names in the module."""

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor | None:
        """What this rank adds of its part of a parameter's gradient, in the whole's shape; None: nothing."""
        return gradient


class LinearTap(Tap):
    """nn.Linear, Conv1D, an untied or tied head: ``G = D^T A``; bias gradient ``sum D``.

    ``turned``: the weight is stored [in, out].
    """

    def __init__(
        self,
        accumulator: Accumulator,
        where: str,
        matrix: MatrixSketch | None,
        bias: VectorPlan | None,
        turned: bool = False,
    ) -> None:
        super().__init__(accumulator, where)
        self.matrix, self.bias, self.turned = matrix, bias, turned

    def attach(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        matrix = self.matrix
        if matrix is None:
            return capture(y, self.sink(site))
        with self.acc.timed():
            kept = self.acc.folded(matrix.fold_key, x, lambda: self.acc.engine.fold(x, matrix, site))
        return capture(y, self.sink(site), kept)

    def adders(self) -> dict[str, Formed]:
        matrix, own = self.matrix, dict[str, Formed]()
        if matrix is not None:
            own["weight"] = lambda g, out: matrix.add_formed((g.T if self.turned else g).contiguous(), out)
        return own | vector_adders(bias=self.bias)

    def backward(self, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        if self.matrix is not None and kept is not None:
            self.acc.engine_of(self.matrix.name).add_linear(dy, kept, self.matrix, site)
        if self.bias is not None:
            self.acc.engine_of(self.bias.name).add_bias(dy, self.bias, site)


class EmbeddingTap(Tap):
    """nn.Embedding: only the rows that occur; ``scale`` for embeddings that multiply what they look up (Gemma)."""

    def __init__(
        self,
        accumulator: Accumulator,
        where: str,
        matrix: MatrixSketch,
        padding_idx: int | None,
        scale: float,
    ) -> None:
        super().__init__(accumulator, where)
        self.matrix, self.padding_idx, self.scale = matrix, padding_idx, scale

    def attach(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        segments, x = self.acc.segments, ordinary(x)
        assert segments is not None
        rows = segments.batch
        if y.ndim == 3 and y.shape[0] == 1 < rows and x.ndim == 2:

            def wide() -> torch.Tensor:
                return capture(widened(y, rows), self.sink(self._sites[0]), x.expand(rows, -1))

            refused = f"{self.where} is looked up for one row of {rows}, and used otherwise than by adding it to all"
            # If weights are trained, both the narrow and the wide output lead to them; only the narrow one is refused.
            narrow = y.view_as(y) if y.requires_grad else y
            return one_row(capture(narrow, self._refusal(f"{refused}: exclude its parameters")), rows, wide)
        return capture(y, self.sink(self._sites[0]), x)

    def adders(self) -> dict[str, Formed]:
        return {"weight": self.matrix.add_formed}

    def backward(self, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        assert kept is not None
        ids = kept.reshape(-1).long()
        if self.padding_idx is not None:  # torch gives the padding row no gradient
            dy = dy * (ids != self.padding_idx).view(*dy.shape[:-1], 1)
        if self.scale != 1.0:
            dy = dy * self.scale
        self.acc.engine_of(self.matrix.name).add_rows(dy, ids, self.matrix, site)


class NormTap(Tap):
    """LayerNorm and every RMSNorm: the input, which autograd keeps anyway, is normalised again in backward."""

    def __init__(self, accumulator: Accumulator, where: str, norm: Norm) -> None:
        super().__init__(accumulator, where)
        self.norm = norm

    def attach(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        if getattr(y.grad_fn, "tap", None) is self:  # a fused norm, whose backward calls `ride`
            return y
        if self.norm.weight is None:
            return capture(y, self.sink(site))
        widened = widened_input(x, y)
        return capture(y, self.sink(site), x.detach() if widened is None else widened)

    def adders(self) -> dict[str, Formed]:
        return vector_adders(weight=self.norm.weight, bias=self.norm.bias)

    def backward(self, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        weight, bias, engine_of = self.norm.weight, self.norm.bias, self.acc.engine_of
        # The bias goes alone where the weight is not sketched, or is in another group of parameters.
        alone = bias is not None and (weight is None or engine_of(bias.name) is not engine_of(weight.name))
        if weight is not None and kept is not None:
            norm = dataclasses.replace(self.norm, bias=None) if alone else self.norm
            engine_of(weight.name).add_norm(dy, kept, norm, site)
        if bias is not None and alone:
            engine_of(bias.name).add_bias(dy, bias, site)

    def ride(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        segments: Segments,
    ) -> torch.Tensor | None:
        """The gradient of the input ``x`` of an RMSNorm, from the same pass over ``x`` that adds the scale's gradient.

        ``scale`` is that of `rms_norm`. None: nothing is to be added in this backward pass.
        """
        made, plan = list[torch.Tensor](), self.norm.weight
        assert plan is not None
        site = self._sites[segments.heads_first(x)]

        def add(dy: torch.Tensor, x: torch.Tensor) -> None:
            engine = self.acc.engine_of(plan.name)  # there is none before `within` has found the batch open
            made.append(engine.add_rms_norm(dy, x, weight, scale, self.norm, site))

        self.within(add, segments)(dy, x)
        return made[0] if made else None


def owned(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter ``name`` of a module itself."""
    p = getattr(module, name)
    assert isinstance(p, nn.Parameter)
    return p


def vector_adders(**plans: VectorPlan | None) -> dict[str, Formed]:
    """`Tap.adders` for vectors: their plans by their names in the module."""

    def adder(plan: VectorPlan) -> Formed:
        def add(gradient: torch.Tensor, out: torch.Tensor) -> None:
            sketch_vector(gradient.reshape(1, -1), plan, out)

        return add

    return {name: adder(plan) for name, plan in plans.items() if plan is not None}
