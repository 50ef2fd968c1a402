"""A model with its taps: which taps it gets, and how they come on and off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ...names import listed
from ...spec import SketchSpec
from ..batch.inputs import embeddings
from ..model import sharded
from ..model.bitsandbytes import keep_gradients
from ..model.hooks import checkpointed, start_graph
from ..model.precision import check_adapters, unwrapped
from ..sums.accumulator import Accumulator
from ..sums.groups import planned
from ..taps.taps import Hook
from .attachment import UNCOVERED, Attachment, plan_model, refused_modules
from .coverage import Coverage, uncovered
from .fused import find_fusion
from .unseen import Run, seen_wrong


class TappedModel:
    """A model whose weights are frozen and whose modules are tapped between `tap` and `untap`.

    Args:
        model: as the caller has it, wrappers included.
        spec, exclude, more, fused, groups: as for `GradientSketcher`.

    Attributes:
        model: the model without its wrappers.
        acc: the sums to which the taps add.
        plan: the taps.
        more: the taps of other specs, each with folded inputs and sums of its own.
        fusion: the modules that fused kernels compute.
        groups: the groups of parameters whose sketches are kept apart; None without groups.
        ranks: the tensor-parallel group that shares the model, if any.

    Raises:
        UncoveredParameterError, ValueError: as `GradientSketcher`.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: SketchSpec | None,
        exclude: Sequence[str] | str,
        more: Sequence[SketchSpec] = (),
        fused: bool = False,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        spec = SketchSpec() if spec is None else spec
        for name, value, wanted in (("model", model, nn.Module), ("spec", spec, SketchSpec)):
            if not isinstance(value, wanted):
                shown = "torch.nn.Module" if wanted is nn.Module else wanted.__name__
                raise ValueError(f"{name} is of type {type(value).__name__}: give a {shown}")
        self.model, self.spec = unwrapped(model), spec
        check_adapters(self.model)
        keep_gradients(self.model)
        sharded.check_parallel(self.model)
        self._patterns = [exclude] if isinstance(exclude, str) else exclude
        self.acc = Accumulator(spec)
        self.plan = plan_model(self.model, self.acc, exclude)
        self.more = [plan_model(self.model, Accumulator(other), exclude) for other in more]
        self._check_more()
        self.fusion = find_fusion(model, self.plan, fused)
        self.groups = planned(groups, self.plan.coverage.names, self.plan.ranks)
        self.ranks = self.acc.ranks = self.plan.ranks
        if self.ranks is not None:
            self.ranks.check_model(_described(spec, self.plan))
        self._handles: list[Hook] = []
        self._thawed: list[nn.Parameter] = []
        self._embeddings: nn.Module | None = None  # where the graph of a checkpointed model has to start

    @property
    def active(self) -> bool:
        """Whether the modules are tapped now."""
        return bool(self._handles)

    @property
    def plans(self) -> list[Attachment]:
        """The taps of all specs, the sketcher's own first."""
        return [self.plan, *self.more]

    def _check_more(self) -> None:
        """Raises ValueError: other specs cannot be sketched in the same pass."""
        if any(plan.ranks is not None for plan in self.more):
            raise ValueError("more: the model is spread over ranks, which add up one sketch: give no more")
        if self.more and self.plan.exact.parameters:
            name = self.plan.exact.parameters[0].name
            raise ValueError(
                f"more: the gradient of {name} is formed, for one sketch: give no more, or exclude it"
            )
        # With exclude="uncovered" each kind leaves out what it has no tap for.
        for plan in self.more:
            if apart := set(self.plan.coverage.names) ^ set(plan.coverage.names):
                kinds = f"{self.spec.kind!r} and {plan.acc.spec.kind!r}"
                raise ValueError(
                    f"more: of the kinds {kinds} one alone sketches {listed(sorted(apart), 3)}: exclude them"
                )

    @property
    def coverage(self) -> Coverage:
        """Which parameters are sketched, and which are left out."""
        return self.fusion.reported(self.plan.coverage)

    def fuse_again(self) -> None:
        """Look again which modules may be fused: the model's code has changed."""
        self.fusion = find_fusion(self.model, self.plan, bool(self.fusion.counts))

    def tap(self) -> None:
        """Freeze all parameters, and hook the taps to their modules."""
        self.plan.check_places()
        keep_gradients(self.model)
        # The model's own code runs before anything is changed: if it fails, nothing has to be undone.
        first = embeddings(self.model)
        sharded.reshard(self.model)
        # Excluded parameters are frozen too: their gradients would cost memory, and nobody reads them.
        self._thawed = _freeze(self.model.parameters())
        # Without checkpointing the graph starts at the first tapped module, and backward ends there.
        self._embeddings = first if checkpointed(self.model) else None
        try:
            self._hook()
        except BaseException:
            self.untap()
            raise

    def untap(self) -> None:
        """Take the taps off, and make the parameters trainable that were so before."""
        self.plan.unhook(self._handles)
        sharded.reshard(self.model)
        _thaw(self._thawed)
        self._thawed, self._embeddings = [], None

    def _hook(self) -> None:
        if self._embeddings is not None:
            self._handles.append(self._embeddings.register_forward_hook(start_graph))
        for plan in self.plans:
            self._handles.extend(plan.hook())
        self._handles += self.fusion.hook(self.plan)

    def mend(
        self, run: Run, ids: torch.Tensor, called: Mapping[nn.Module, int], decoder: nn.Module | None = None
    ) -> None:
        """Replace taps that do not see all that their module does with its parameters.

        Where the gradient is small enough, it is formed in place of the tap. What cannot be sketched at all is left out
        if the caller asked for that (``exclude="uncovered"``).

        Args:
            run, ids, called: as for `unseen.seen_wrong`.
            decoder: the part of the model that runs, if not all of it.

        Raises:
            UncoveredParameterError: names all that cannot be sketched.
        """
        while True:
            wrong = seen_wrong(self.plan, run, ids, called)
            refused = refused_modules(self.plan, decoder, wrong)
            if formed := [module for module in wrong if module not in refused]:
                self.plan.unhook(self._handles)
                self.plan.form(formed)
                self._check_more()
                self._hook()
            elif not refused:
                return
            elif UNCOVERED in self._patterns:
                self._leave_out(refused)
            else:
                share = (
                    sum(p.numel() for m in refused for p in m.parameters(recurse=False)) / self.coverage.total
                )
                lines = [f"{where} ({type(m).__name__}): {why}" for m, (where, why) in refused.items()]
                problem = "no tap sees all that these modules do with their parameters"
                raise uncovered(problem, lines, next(iter(self._names(refused))), share)

    def _names(self, modules: Iterable[nn.Module]) -> dict[str, int]:
        """Names and sizes of the sketched parameters that these modules own."""
        own = {p for m in modules for p in m.parameters(recurse=False)}
        return {name: p.numel() for p, name in self.plan.wanted.items() if p in own}

    def _leave_out(self, modules: Iterable[nn.Module]) -> None:
        """Plan again without the parameters of these modules."""
        names, before = self._names(modules), self.plan
        patterns = [*self._patterns, *names]
        self.plan.unhook(self._handles)
        for p in self._thawed:
            p.requires_grad_(True)
        self.plan = plan_model(self.model, self.acc, patterns)
        self.more = [plan_model(self.model, Accumulator(plan.acc.spec), patterns) for plan in self.more]
        self.plan.form([one.chain[0] for one in before.exact.parameters])
        self.plan.coverage = dataclasses.replace(
            self.plan.coverage,
            excluded=before.coverage.excluded,
            uncovered={**before.coverage.uncovered, **names},
        )
        for p in self._thawed:
            p.requires_grad_(False)
        self._hook()


def check_entered(sketcher: object, method: str, active: bool, acc: Accumulator) -> None:
    """Check that a sketcher is inside of its ``with`` block, and of no batch.

    Raises:
        RuntimeError: it is not; or nothing can be differentiated.
    """
    name = type(sketcher).__name__
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{method} under torch.inference_mode(), where nothing can be differentiated: leave it"
        )
    if not active:
        raise RuntimeError(
            f"{method} outside the `with {name}(...)` block: nothing is tapped; call it inside"
        )
    if acc.segments is not None:
        raise RuntimeError(f"a batch is already open in this {name}: close it first")


def _described(spec: SketchSpec, plan: Attachment) -> str:
    """The spec, and the names and shapes of the sketched parameters: equal on all ranks of a group."""
    return "\n".join([f"{spec}", *(f"{name} {tuple(p.shape)}" for p, name in plan.wanted.items())])


# The last sketcher to leave a model makes its parameters trainable again.
_holders = WeakIdKeyDictionary()  # how many sketchers keep a parameter frozen


def _freeze(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Freeze what is trainable, or would be without other sketchers; gives these parameters, for `_thaw`."""
    held = [p for p in parameters if p.requires_grad or p in _holders]
    for p in held:
        _holders[p] = _holders.get(p, 0) + 1
        p.requires_grad_(False)
    return held


def _thaw(held: Iterable[nn.Parameter]) -> None:
    """Make parameters trainable that no other sketcher keeps frozen."""
    for p in held:
        others = _holders.pop(p, 1) - 1
        if others:
            _holders[p] = others
        else:
            p.requires_grad_(True)
