"""Small parameters that a model uses in a way of its own: attention sinks, raw scales, gates, state-space parameters.

No formula is known for them. Their gradient is formed, one segment after the other, by autograd itself: of the module
that uses the parameter, from its outputs, whose gradient is set to zero but for one segment's tokens. Whatever the
module computes, that is exact, as long as tokens of different segments do not meet in it (nor do they in any model that
keeps its prompts apart).

The module is the innermost one that is called: the owner, or where nobody calls the owner, the module around it. The
cost is one backward pass of that module for each segment of the batch (where segments are whole rows, one forward and
one backward pass in all: `again`), and the parameter's gradient for one segment.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from ...ops.sketch_vector import sketch_vector
from ...plan import VectorPlan
from ..batch.segments import Segments
from ..model.precision import autocast_eps, product_eps
from ..model.spread import Share, settled
from ..sums.accumulator import Accumulator
from ..sums.matrix import MatrixSketch
from .again import Replay, random_numbers, rows_of, same, view_axis

NO_LAYOUT = "none"  # of an output that does not hold every token once
LARGEST = 1 << 24  # numbers of a parameter: its gradient exists, one segment at a time


@dataclasses.dataclass(eq=False)
class Exact:
    """One parameter whose gradient is formed.

    ``chain`` is the module that owns it (under the name ``key``), and every module around that, out to the model.
    ``plan`` gives the coordinates of a vector, ``matrix`` those of the weight of a linear layer or an embedding.
    """

    name: str
    key: str
    parameter: nn.Parameter
    chain: tuple[nn.Module, ...]
    plan: VectorPlan | None
    matrix: MatrixSketch | None = None
    share: Share | None = None  # what of it this rank adds, in a tensor-parallel group
    heard: Segments | None = None  # the last batch whose backward pass came by
    # The last batch in which a call around it has no use of it: an expert that got no token.
    unused: Segments | None = None

    @property
    def where(self) -> str:
        return self.name

    def silent(self, segments: Segments) -> bool:
        """Whether no gradient came by in the batch ``segments``, although one should have."""
        return self.heard is not segments and self.unused is not segments

    def add(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """Add the sketch of a ``gradient`` that exists, of the parameter's shape, to ``out`` [1, base_dim]."""
        if self.share is not None:
            mine = self.share.whole(settled(gradient.detach(), self.parameter))
            if mine is None:
                return
            gradient = mine
        wide = gradient.detach().float()
        if self.matrix is not None:
            ids = torch.arange(wide.shape[0], device=wide.device)
            offsets = torch.tensor([0, wide.shape[0]], device=wide.device)
            self.matrix.add_rows(wide, ids, offsets, out)
        elif self.plan is not None:
            sketch_vector(wide.reshape(1, -1).contiguous(), self.plan, out)


class _Output(NamedTuple):
    """An output of a call: its place among the leaves, and its view (`Segments.token_views`), which is empty where it
    does not hold every token once."""

    place: int
    y: torch.Tensor
    view: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class _Call:
    """A call of a module that is running.

    Attributes:
        edges: the graph's edge to each parameter's alias, which this call alone uses.
        before: the tensors that the aliases replaced.
        taken: parameters whose gradients a module inside this one forms.
    """

    module: nn.Module
    edges: dict[Exact, GradientEdge] = dataclasses.field(default_factory=dict)
    before: dict[Exact, Any] = dataclasses.field(default_factory=dict)
    taken: set[Exact] = dataclasses.field(default_factory=set)

    def open(self, parameters: Iterable[Exact]) -> None:
        """Put an alias in place of every parameter, which stays frozen itself.

        Every call has an alias of its own. If a module is called twice, the first call lies behind the second one in
        the graph; with one alias it would be counted twice.
        """
        for exact in parameters:
            place = exact.chain[0]._parameters
            before = place[exact.key]
            assert before is not None
            with torch.enable_grad():
                start = before if before.requires_grad else before.detach().requires_grad_(True)
                alias = start.view_as(start)
            self.before[exact], self.edges[exact] = before, get_gradient_edge(alias)
            place[exact.key] = alias  # type: ignore[assignment]

    def close(self) -> None:
        for exact, before in self.before.items():
            exact.chain[0]._parameters[exact.key] = before
        self.before = {}


class _Captures(torch.autograd.Function):
    """``ys -> ys``, the first ``n`` tensors; in backward ``sink(gradients, the other tensors)``.

    A gradient may be None. The others are None where one of them was changed in place in the meantime.
    """

    @staticmethod
    def forward(
        ctx: Any, sink: Callable[..., None], n: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.sink, ctx.others = sink, len(tensors) - n
        ctx.save_for_backward(*tensors[n:])
        ctx.set_materialize_grads(False)
        return tuple(y.detach() for y in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            saved = None
        ctx.sink(grads, saved)
        return (None, None, *grads, *(None,) * ctx.others)


@contextlib.contextmanager
def _checkpoint_named(names: str, module: nn.Module) -> Iterator[None]:
    """Put the parameters' names and a remedy into an error of torch's checkpointing."""
    try:
        yield
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
        # Torch's words for use_reentrant=True; the other way can fail too, where checkpoints lie inside of the module.
        other = " (or use_reentrant=False instead of True)" if "not compatible" in str(error) else ""
        raise RuntimeError(
            f"{names}: formed by a backward pass through {type(module).__name__} inside of the model's own, which the "
            f"gradient checkpointing in it does not take: turn that off{other}, or leave them out (exclude=[...]). "
            f"torch says: {str(error).splitlines()[0]}"
        ) from error


class ExactTaps:
    """Hooks on every module that may be the innermost one that is called around a parameter."""

    def __init__(self, accumulator: Accumulator, parameters: Iterable[Exact]) -> None:
        self.acc, self.parameters = accumulator, list(parameters)
        self.sites: dict[nn.Module, list[Exact]] = {}
        for exact in self.parameters:
            for module in exact.chain:
                mine = self.sites.setdefault(module, [])
                if not any(other.parameter is exact.parameter for other in mine):
                    mine.append(exact)
        self._calls: list[_Call] = []
        self._batch: Segments | None = None
        # How each output of a module holds the tokens. It is known once a batch's sizes leave one way, or none.
        self._layouts: dict[tuple[nn.Module, int], str] = {}

    def register(self) -> Iterator[Any]:
        """Hook the modules; gives the handles one by one."""
        for module in self.sites:
            # Before the hooks of others: one may compute a weight from the parameters.
            yield module.register_forward_pre_hook(self._enter, prepend=True)
            yield module.register_forward_hook(self._leave, prepend=True, with_kwargs=True, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        segments = self.acc.segments
        if segments is not self._batch:
            self.forget()
            self._batch = segments
        if segments is None or self.acc.is_absent:
            return
        self._calls.append(_Call(module))
        if torch.is_grad_enabled():
            self._calls[-1].open(self.sites[module])

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        if self.acc.is_absent:
            return y
        while self._calls and self._calls[-1].module is not module:  # a call that failed before its hooks
            self._calls.pop().close()
        if not self._calls:
            return y
        call = self._calls.pop()
        call.close()
        if not torch.is_grad_enabled():  # reentrant checkpointing: it will be called again
            call.taken.update(self.sites[module])
        elif (
            y is not None
            and self.acc.segments is self._batch
            and not call.taken.issuperset(self.sites[module])
        ):
            y = self._capture(call, args, kwargs, y)
        if self._calls:
            self._calls[-1].taken |= call.taken
        return y

    def forget(self) -> None:
        """Put back every parameter: a forward that failed may have left calls open."""
        while self._calls:
            self._calls.pop().close()

    # ---------------------------------------------------------------------------------------------- a call
    def _capture(self, call: _Call, args: Any, kwargs: Any, y: Any) -> Any:
        """``y`` with a capture in its graph; ``y`` itself, if it does not hold the batch's tokens."""
        segments = self._batch
        assert segments is not None
        leaves, tree = pytree.tree_flatten(y)
        outputs = [
            _Output(i, t, self._view(segments, call.module, i, t))
            for i, t in enumerate(leaves)
            if isinstance(t, torch.Tensor) and t.requires_grad and t.is_floating_point()
        ]
        if not any(output.view for output in outputs):
            return y
        ys = [output.y for output in outputs]
        edges = {exact: edge for exact, edge in call.edges.items() if exact not in call.taken}
        if any(exact.chain[0] is not call.module for exact in edges):
            behind, every = nodes_behind(ys), edges
            edges = {exact: edge for exact, edge in every.items() if edge.node in behind}
            for exact in every.keys() - edges.keys():
                exact.unused = segments
        call.taken.update(edges)
        if not edges:
            return y
        saved: list[torch.Tensor] = []
        if (sink := self._lookup(segments, ys, edges)) is None:
            again = Replay.of(call.module, args, kwargs, segments)
            replay, saved = again if again is not None else (None, [])
            sink = self._products(segments, call.module, outputs, edges, replay)
        for output, t in zip(outputs, _Captures.apply(sink, len(ys), *ys, *saved), strict=True):
            leaves[output.place] = t
        return pytree.tree_unflatten(leaves, tree)

    def _view(self, segments: Segments, module: nn.Module, output: int, y: torch.Tensor) -> tuple[int, ...]:
        if isinstance(module, nn.Conv1d):
            views = segments.convolved_view(y, module.padding)
        else:
            views = segments.token_views(y)
        if not views:
            # Kept for later batches: with as many rows as tokens, [length, batch] would pass for [batch, length].
            self._layouts[module, output] = NO_LAYOUT
        elif len(views) == 1:
            self._layouts.setdefault((module, output), *views)
        return views.get(self._layouts.get((module, output), NO_LAYOUT), ())

    def _products(
        self,
        segments: Segments,
        module: nn.Module,
        outputs: Sequence[_Output],
        edges: dict[Exact, GradientEdge],
        replay: Replay | None,
    ) -> Callable[..., None]:
        """What forms and adds the gradients of one call's parameters, when those of its ``outputs`` arrive."""
        acc, names = self.acc, ", ".join(exact.name for exact in edges)
        cast = autocast_eps(outputs[0].y.device)

        def heard(grads: Sequence[torch.Tensor | None], saved: Sequence[torch.Tensor] | None) -> None:
            if acc.hears(segments, names):
                sink(grads, saved)

        @torch.no_grad()  # a backward pass with create_graph records its operations
        def sink(grads: Sequence[torch.Tensor | None], saved: Sequence[torch.Tensor] | None) -> None:
            given = [(output, g) for output, g in zip(outputs, grads, strict=True) if g is not None]
            for output, g in given:
                if not output.view:
                    self._refuse(edges, module, g.shape, segments)
                    return
            if not given:
                return
            unit = max(cast, *(product_eps(g) for _, g in given)) / 2
            ys = [output.y for output, _ in given]

            def form(s: int, parameters: Sequence[Exact]) -> Sequence[torch.Tensor | None]:
                mine = [segments.only(s, g, output.view) for output, g in given]
                starts = [edges[exact] for exact in parameters]
                with _checkpoint_named(names, module):
                    return torch.autograd.grad(ys, starts, mine, retain_graph=True, allow_unused=True)

            every, seen, repeated = list(edges), set[Exact](), list[int]()
            with acc.timed(), acc.deaf():
                for s, (begin, end) in enumerate(segments.bounds):
                    if begin == end:
                        continue
                    gradients: Sequence[torch.Tensor | None] | None = None
                    if replay is not None and saved is not None:
                        rows = begin // segments.length, end // segments.length
                        with acc.absent():
                            gradients = _again(replay, saved, every, given, *rows)
                    if gradients is None:
                        gradients = form(s, every)
                    else:
                        repeated.append(s)
                        seen.update(exact for exact, g in zip(every, gradients, strict=True) if g is not None)
                    self._add(every, gradients, s, segments, unit)
                # Used by the call, and by none that was repeated: a hook before it made a weight of it (`weight_norm`).
                if left := [exact for exact in every if exact not in seen]:
                    for s in repeated:
                        self._add(left, form(s, left), s, segments, unit)

        return heard

    def _refuse(
        self, edges: Iterable[Exact], module: nn.Module, shape: torch.Size, segments: Segments
    ) -> None:
        """Raise an error, or note it while a model is tried: an output without the batch's tokens has a gradient."""
        why = (
            f"an output of shape {tuple(shape)} of {type(module).__name__} has a gradient, and does not hold the "
            f"{segments.batch} x {segments.length} tokens of the batch"
        )
        names = [exact.name for exact in edges]
        if self.acc.refusals is None:
            raise ValueError(f"{', '.join(names)}: {why}: exclude them")
        self.acc.refusals |= dict.fromkeys(names, why)

    def _add(
        self,
        edges: Iterable[Exact],
        gradients: Sequence[torch.Tensor | None],
        segment: int,
        segments: Segments,
        unit: float,
    ) -> None:
        """Add the gradients of one segment to its sketch; None: the parameter took no part. ``unit``: the unit roundoff
        of the module's arithmetic."""
        rows = slice(segment, segment + 1)
        for exact, gradient in zip(edges, gradients, strict=True):
            exact.heard = segments
            if gradient is not None:
                exact.add(gradient, self.acc.engine_of(exact.name).settle()[rows])
                if self.acc.listener is not None:
                    self.acc.listener.added(exact, gradient, None, unit, rows)

    def _lookup(
        self, segments: Segments, ys: Sequence[torch.Tensor], edges: dict[Exact, GradientEdge]
    ) -> Callable[..., None] | None:
        """What adds the gradient of an embedding that returns its rows as they are (learned positions), without forming
        it; None: the module does something else."""
        (exact, edge), *others = edges.items()
        node = ys[0].grad_fn
        if (
            others
            or len(ys) > 1
            or exact.matrix is None
            or exact.share is not None
            or node is None
            or node.name() != "EmbeddingBackward0"
        ):
            return None
        if node.next_functions[0][0] is not edge.node or node._saved_scale_grad_by_freq:  # type: ignore[attr-defined]
            return None
        ids, padding = node._saved_indices.reshape(-1), node._saved_padding_idx  # type: ignore[attr-defined]
        acc, matrix = self.acc, exact.matrix

        def sink(grads: Sequence[torch.Tensor | None], saved: object) -> None:
            if not acc.hears(segments, exact.name) or grads[0] is None:
                return
            with acc.timed(), torch.no_grad():
                dy, offsets = segments.tokens_first(grads[0], exact.name)
                if 0 <= padding < matrix.rows:  # torch gives the padding row no gradient
                    dy = dy * (ids != padding).unsqueeze(-1)
                matrix.add_rows(dy, ids, offsets, acc.engine_of(exact.name).settle())
            exact.heard = segments
            if acc.listener is not None:
                acc.listener.added(exact, dy, None)

        return sink


def _again(
    replay: Replay,
    saved: Sequence[torch.Tensor],
    parameters: Sequence[Exact],
    given: Sequence[tuple[_Output, torch.Tensor]],
    begin: int,
    end: int,
) -> Sequence[torch.Tensor | None] | None:
    """Gradients of the rows ``begin`` to ``end``, from the module's call on those rows alone; ``given``: outputs of the
    call of all rows, each with its gradient.

    None where that gives other results than the call of all rows did (rows are not where they seem), or draws random
    numbers: dropout has another mask then, although results may be equal but for rounding. The gradient of a parameter
    that has no part in it is None.
    """
    call = _Call(replay.module)
    call.open(parameters)
    aliases = [exact.chain[0]._parameters[exact.key] for exact in parameters]
    try:
        with torch.enable_grad(), random_numbers(given[0][0].y.device) as drawn:
            leaves = replay.run(saved, begin, end)
    except Exception:  # what the module does with fewer rows is its own affair
        return None
    finally:
        call.close()
    if drawn:
        return None
    ys, gradients = [], []
    for output, g in given:
        axis = view_axis(output.view, replay.segments)
        y = leaves[output.place] if output.place < len(leaves) else None
        if not isinstance(y, torch.Tensor) or not same(y, rows_of(output.y, axis, begin, end)):
            return None
        if y.requires_grad:
            ys.append(y)
            gradients.append(rows_of(g, axis, begin, end))
    if not ys:
        return None
    return torch.autograd.grad(ys, aliases, gradients, allow_unused=True)  # type: ignore[arg-type]


def nodes_behind(ys: Sequence[torch.Tensor], cut: Collection[Any] = ()) -> dict[Any, None]:
    """The nodes of the graph behind ``ys``, as they are met; none of ``cut``, nor what lies behind these alone."""
    nodes, seen = [y.grad_fn for y in ys], dict[Any, None]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen and node not in cut:
            seen[node] = None
            nodes += [following for following, _ in node.next_functions]
    return seen
