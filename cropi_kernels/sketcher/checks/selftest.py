"""The self-test: before any work, the sums of a model's taps are compared with plain autograd on a few tokens.

Two runs of the model on the same tokens, cut into two segments of unequal length:

*held*: the covered parameters have ``requires_grad`` while the taps listen. A tap then sees the very numbers from which
autograd forms the parameter's gradient, so the two may differ by the rounding of their sums alone, whatever the model's
depth and dtype; therefore the bound is tight in bfloat16 too. This runs once for each segment, with the loss of that
segment only: a tap must give autograd's gradient to this segment, and nothing to the other.

*frozen*: the weights are frozen, as `GradientSketcher` works. Every tap must give what it gave before, up to the
rounding of the backward pass, and the output must be that of the model without taps.

The test assumes nothing about the modules. Hooks that change an output or a gradient, replaced forwards, weights that
are used elsewhere too, tokens in another order, and graphs that were compiled before the taps came all show as a
difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..attach.attachment import Attachment
from ..attach.coverage import UncoveredParameterError
from ..batch.segments import Segments
from ..model.precision import unit_roundoff
from ..model.ranks import Ranks, add_over_ranks
from ..model.sharded import starting_over
from ..model.spread import local
from ..model.untouched import nothing_kept, thawed, untouched
from ..taps.exact import nodes_behind
from .formed_sums import FormedSums, TapGroups
from .listener import Listener, Source, norm
from .reached import unreached

LISTED = 20  # parameters that an error names
# What a comparison says of a parameter whose gradient autograd formed, and no tap.
UNHEARD = "its tap heard nothing: the weight is used without its module"

Forward = Callable[[], torch.Tensor]


class SelfTestError(UncoveredParameterError):
    """A tap does not give autograd's gradient of its parameter."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The taps of one group of parameters (a module's weight and bias; all that share a weight) beside autograd.

    Attributes:
        names: the parameters.
        what: how the taps differ from autograd, for a message.
        error: norm of the difference of the two sketches.
        allowed: the largest norm that rounding explains.
        size: norm of the sketch of autograd's gradient.
    """

    names: tuple[str, ...]
    what: str
    error: float
    allowed: float
    size: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        size = self.size or self.error or 1.0
        return (
            f"{', '.join(self.names)}: off by {self.error / size:.2g} of its gradient, where rounding allows "
            f"{self.allowed / size:.1g}; {self.what}"
        )


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """The result of the self-test. Printed, it is two lines.

    Attributes:
        tokens: the batch and length that it ran on.
        names: parameters whose taps were compared with autograd.
        untested: parameters that no part of the run used: they have no gradient, and their taps gave none.
        closest: the comparison nearest to its bound.
        heard: the modules whose taps heard the backward pass; one that is not heard in a later batch raises an error.
        seconds: what it took.
    """

    tokens: tuple[int, int]
    names: tuple[str, ...] = dataclasses.field(repr=False)
    untested: tuple[str, ...]
    closest: Comparison | None
    heard: frozenset[str] = dataclasses.field(repr=False)
    seconds: float

    def __str__(self) -> str:
        batch, length = self.tokens
        text = f"taps compared with autograd on {batch} x {length} tokens: {len(self.names)} parameters right"
        if self.untested:
            text += f", {len(self.untested)} without a gradient there ({', '.join(self.untested[:3])})"
        if self.closest is not None:
            text += f"\n  nearest to its bound: {self.closest}"
        return text


@dataclasses.dataclass(frozen=True)
class Trial:
    """What to run: ``forward()`` gives a tensor, ``cotangents`` are gradients of it.

    All that the i-th of them makes belongs to the segments ``owners[i]`` and to no other. They are multiplied by
    ``pattern``: of many that differ by a mask, only one exists in full size.
    """

    forward: Forward
    segments: Segments
    cotangents: tuple[torch.Tensor, ...]
    owners: tuple[tuple[int, ...], ...] = ((0,), (1,))
    remedy: str = ""  # the end of the error's message, before "this test"
    pattern: torch.Tensor | None = None

    def cotangent(self, number: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The one of this number; None: the sum of all."""
        one = torch.stack(self.cotangents).sum(0) if number is None else self.cotangents[number]
        return (one if self.pattern is None else one * self.pattern).to(dtype)


# --------------------------------------------------------------------------------------------------- runs
def self_test(plan: Attachment, trial: Trial, others: Sequence[Comparison] = ()) -> SelfTest:
    """Compare the taps with autograd, inside the ``with`` block of a `GradientSketcher`. The model stays as it is.

    ``others`` were made elsewhere, and are reported with these.

    Extra memory: one parameter's gradient at a time and `PROJECTED` numbers for each.

    Raises:
        SelfTestError: names the parameters whose taps are off, and by how much; or says how the model's output changes
            where taps are.
        ValueError: the model cannot be differentiated by ordinary autograd; says why.
    """
    started, model, groups = time.perf_counter(), plan.model, TapGroups(plan)
    runs = _Runs(groups, trial)
    with untouched(model), starting_over(model):
        try:
            comparisons, tested, frozen = runs.compare()
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise SelfTestError(
                f"ordinary autograd cannot run the model, so its taps cannot be compared with it ({error}); leave "
                "out this test, and take the sketch as it is: verify=False"
            ) from error
    comparisons += others
    held = dict.fromkeys(n for g in groups.taps if g in tested for n in groups.names[g])
    held |= dict.fromkeys(n for one in others for n in one.names)
    unused = [n for g in groups.taps for n in groups.names[g] if n not in held]
    wrong = [one for one in comparisons if not one.right]
    if wrong:
        instead = _instead(wrong, runs.reentry, model.training)
        raise _not_finite(model, wrong) or _error(wrong, trial.remedy, instead)
    reached = {name for one in comparisons if one.size > 0 for name in one.names}
    if problem := unreached(groups.taps, groups.names, frozen, reached):
        raise SelfTestError(problem)
    return SelfTest(
        (trial.segments.batch, trial.segments.length),
        tuple(n for n in held if n in groups.known),
        tuple(unused),
        max(comparisons, key=lambda one: one.error / one.allowed if one.allowed else 0.0, default=None),
        frozenset(tap.where for tap in frozen.sums),
        time.perf_counter() - started,
    )


class _Runs:
    """The runs of one self-test."""

    def __init__(self, groups: TapGroups, trial: Trial) -> None:
        self.acc, self.groups, self.trial = groups.plan.acc, groups, trial
        self.ranks = self.acc.ranks
        self.device = trial.cotangents[0].device
        self.reentry = False  # the model checkpoints by use_reentrant=True
        self.devices = list({p.device for p in groups.plan.model.parameters() if p.device.type == "cuda"})

    def again(self) -> contextlib.AbstractContextManager[None]:
        """Every run draws the same random numbers (for dropout) and uses no weights that autocast keeps from before."""
        torch.clear_autocast_cache()
        return torch.random.fork_rng(devices=self.devices)

    def compare(self) -> tuple[list[Comparison], set[int], Listener]:
        """The comparisons; the groups of parameters that have a gradient; what the taps gave over frozen weights."""
        with self.again(), torch.no_grad():
            plain = self.trial.forward()
        with self.again():
            frozen = self.frozen(plain)
        comparisons: list[Comparison] = []
        held: dict[Source, torch.Tensor] = {}
        sizes: dict[Source, float] = {}
        tested: set[int] = set()
        for s in range(len(self.trial.cotangents)):
            with self.again():
                listener, exact = self.held(s)
            comparisons += compare(self.groups, listener, exact, self.trial.owners[s], self.trial.segments)
            tested |= set(exact.sums)
            for tap, took in listener.sums.items():
                held[tap] = held[tap] + took if tap in held else took
                sizes[tap] = sizes.get(tap, 0.0) + listener.size[tap]
        return comparisons + _compare_frozen(self.groups, frozen, held, sizes), tested, frozen

    def frozen(self, plain: torch.Tensor) -> Listener:
        """The run over frozen weights, whose output is compared with ``plain``, that of the model without taps."""
        listener = Listener(self.acc)
        with listener.batch(self.trial.segments, self.device):
            with torch.enable_grad():
                y = self.trial.forward()
            _check_output(y.detach(), plain, len(self.groups.taps), self.ranks)
            if y.requires_grad:
                y.backward(self.trial.cotangent(None, y.dtype))
        self.over_ranks(listener)
        return listener

    def held(self, s: int) -> tuple[Listener, FormedSums]:
        """The run over trainable weights with the s-th cotangent: what the taps gave, and what autograd formed."""
        listener, exact = Listener(self.acc), FormedSums(self.groups, self.device)
        parameters = self.groups.parameters
        with thawed(parameters), listener.batch(self.trial.segments, self.device), exact.hooked():
            with torch.enable_grad():
                y = self.trial.forward()
            # Gradients of the modules' outputs too, so that a tap is heard where no parameter lies behind it.
            inputs = [*parameters, *{id(t): t for t in listener.outputs}.values()]
            cotangent = self.trial.cotangent(s, y.dtype)
            # Reentrant checkpointing takes no list of inputs: it raises an error, or does not run where no input lies
            # outside of it. FSDP2's whole parameters cannot be listed.
            reentry = _checkpointed_by_reentry(y)
            self.reentry |= reentry
            if y.requires_grad and (exact.units or reentry):
                with nothing_kept(parameters):
                    y.backward(cotangent)
            elif y.requires_grad:
                torch.autograd.grad(y, inputs, cotangent, allow_unused=True)
        self.over_ranks(listener, exact)
        return listener, exact

    def over_ranks(self, listener: Listener, exact: FormedSums | None = None) -> None:
        """Sum over the ranks of a tensor-parallel group, so that all ranks come to the same conclusion."""
        if self.ranks is None:
            return
        for taps in self.groups.taps.values():
            for tap in taps:
                add_over_ranks(
                    self.ranks, tap, listener.sums, [listener.size], [listener.unit, listener.calls]
                )
        if exact is None:
            return
        exact.copies.compare()
        for group in self.groups.taps:
            add_over_ranks(self.ranks, group, exact.sums, [exact.floor], [exact.unit])


def _checkpointed_by_reentry(y: torch.Tensor) -> bool:
    return any(node.name() == "CheckpointFunctionBackward" for node in nodes_behind([y]))


def _check_output(y: torch.Tensor, plain: torch.Tensor, depth: int, ranks: Ranks | None) -> None:
    if y.shape != plain.shape:
        raise SelfTestError(
            f"with taps the model's output has the shape {tuple(y.shape)}, without {tuple(plain.shape)}"
        )
    if ranks is None and torch.equal(y, plain) or not bool(plain.isfinite().all()):
        return
    error, size = norm(y - plain), norm(plain)
    if ranks is not None:  # one that raised alone would leave the others waiting
        error = float(ranks.max(torch.tensor([error], dtype=torch.float64, device=plain.device)))
    if not error <= 8 * unit_roundoff(plain) * max(1, depth) ** 0.5 * size:
        raise SelfTestError(
            f"the model's output changes by {error / max(size, 1e-30):.1%} when taps are on its modules: it gives "
            "different results for the same tokens, or what lies between its modules depends on the tensors that they "
            "return; leave out this test, and take the sketch as it is: verify=False"
        )


# --------------------------------------------------------------------------------------------- comparisons
def compare(
    groups: TapGroups, listener: Listener, exact: FormedSums, owners: tuple[int, ...], segments: Segments
) -> list[Comparison]:
    """Compare what the taps gave to each segment with what autograd formed of a loss of the segments ``owners``."""
    comparisons = []
    tokens = segments.batch * segments.length
    mine = torch.zeros(segments.count, dtype=torch.bool, device="cpu")
    mine[list(owners)] = True
    for group, taps in groups.taps.items():
        heard = [tap for tap in taps if tap in listener.sums]
        want = exact.sums.get(group)
        if want is None and not heard:
            continue
        allowed = 4 * exact.floor.get(group, 0.0)
        error = elsewhere = 0.0
        if heard:
            got = torch.stack([listener.sums[tap] for tap in heard]).sum(0)
            error = norm(got[mine].sum(0) - (0.0 if want is None else want))
            elsewhere = norm(got[~mine])
        elif want is not None:
            error = norm(want)
        copies = max(exact.copies.apart[i] for i in groups.members[group])
        for tap in heard:
            unit = max(listener.unit[tap], exact.unit.get(group, 0.0))
            allowed += listener.size[tap] * bound(unit, listener.calls[tap], tokens)
        if not heard:
            what = UNHEARD
        elif elsewhere > allowed:
            what = (
                "tokens of one segment count for another: the module does not see them in the batch's order"
            )
        else:
            what = "its tap saw something else than autograd"
        error = (error * error + elsewhere * elsewhere) ** 0.5
        size = 0.0 if want is None else norm(want)
        comparisons.append(Comparison(groups.names[group], what, error, allowed, size))
        if copies:
            what = (
                "every rank of the tensor-parallel group has it whole, and another gradient of it (of its own heads or "
                "tokens?)"
            )
            comparisons.append(Comparison(groups.names[group], what, copies, allowed, size))
    return comparisons


def _compare_frozen(
    groups: TapGroups, frozen: Listener, held: dict[Source, torch.Tensor], sizes: dict[Source, float]
) -> list[Comparison]:
    """Compare what the taps gave over frozen weights with what they gave over trainable ones."""
    comparisons = []
    depth = max(1, len(held)) ** 0.5
    for group, taps in groups.taps.items():
        for tap in taps:
            if tap not in frozen.sums and tap not in held:
                continue
            want, got = held.get(tap), frozen.sums.get(tap)
            terms = max(sizes.get(tap, 0.0), frozen.size.get(tap, 0.0))
            allowed = 8 * depth * frozen.unit.get(tap, 2.0**-24) * terms
            size = 0.0 if want is None else norm(want)
            if got is None:
                assert want is not None
                # A gradient of zeros may come or stay away.
                what = "over frozen weights its tap heard nothing (compiled before the taps came?)"
                error = norm(want)
            elif want is None:
                what, error = "its tap is heard over frozen weights only", norm(got)
            else:
                what, error = "over frozen weights its tap gives something else", norm(got - want)
            comparisons.append(Comparison(groups.names[group], what, error, allowed, size))
    return comparisons


def bound(unit: float, calls: int, tokens: int) -> float:
    """A bound of the difference of two sums of the same products, in units of ``sum |d| |a|``.

    To the tensors' dtype (``unit``) are rounded: the folded inputs, the products of a norm, the gradient, and its sum
    over ``calls``. In float32 are summed: ``tokens`` products, and the columns that meet in one number of the sketch
    (1024 for the widest layers); these errors add like a random walk (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).
    The factor 4 covers all of that, and that a sketch keeps norms only up to a small factor.
    """
    return 4 * ((3 + calls) * unit + (tokens + 1024) ** 0.5 * 2.0**-24)


def _instead(wrong: list[Comparison], reentry: bool, training: bool) -> str:
    """What may reach weights that are used without their modules, before they are left out."""
    if not any(one.what == UNHEARD for one in wrong):
        return ""
    if reentry:  # which takes no backward pass inside of the model's own
        return "turn gradient checkpointing off, or make it use_reentrant=False; or "
    return (
        "call model.eval(), since some models use weights in another way in train(); or " if training else ""
    )


def _not_finite(model: nn.Module, wrong: list[Comparison]) -> SelfTestError | None:
    """The error of gradients that are NaN or infinite by autograd too, which say nothing of the taps; None if all are
    finite."""
    # The size of a comparison over frozen weights is that of the taps' gradient: another one of the name is autograd's.
    finite = {name for one in wrong if math.isfinite(one.size) for name in one.names}
    names = [name for one in wrong for name in one.names if name not in finite]
    if not names:
        return None
    here: list[tuple[str, Any]] = [(name, local(p)) for name, p in model.named_parameters()]
    broken = [name for name, p in here if not bool(_wide(p).isfinite().all())]
    # Masks hold infinity on purpose.
    odd = [name for name, b in model.named_buffers() if bool(_wide(local(b)).isnan().any())]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        why = (
            f"the model holds NaN or infinity in {', '.join(broken[:3])}{more}, as after a training that diverged: "
            "give one whose weights are finite"
        )
    elif odd:
        why = f"the model's buffer {odd[0]} holds NaN, as one that was not filled after to_empty(): load the model anew"
    elif any(p.dtype == torch.float16 for _, p in here):
        why = (
            "the weights that are here are finite, so that a pass in float16 overflows: give the model in "
            "bfloat16 or float32 (dtype=); verify=False leaves out this test"
        )
    else:
        why = (
            "the weights that are here are finite, so that numbers overflow, or a hook, a mask or the model's own code "
            "makes NaN: torch.autograd.set_detect_anomaly(True) says where; verify=False leaves out this test"
        )
    return SelfTestError(
        f"the gradient that autograd formed on a few tokens is not finite, of {names[0]} for example; {why}"
    )


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose numbers can be asked whether they are finite: of eight bits they cannot."""
    return x.float() if x.is_floating_point() and x.itemsize == 1 else x


def _error(wrong: list[Comparison], remedy: str, instead: str = "") -> SelfTestError:
    example = wrong[0].names[0]
    return SelfTestError(
        "sketches are not those of the gradients that autograd formed on a few tokens (a module does not see every "
        "token once and in order, or its weight is used in another way):\n"
        + named(wrong)
        + (
            remedy
            or f"{instead}freeze them, or leave them out by name (exclude=[{example!r}, ...]); verify=False leaves out "
        )
        + "this test"
    )


def named(wrong: list[Comparison]) -> str:
    """A line for each group of parameters that is off, with its worst comparison."""
    worst: dict[tuple[str, ...], Comparison] = {}
    for one in wrong:
        before = worst.get(one.names)
        if before is None or not one.error <= before.error:
            worst[one.names] = one
    lines = [f"  {one}\n" for one in list(worst.values())[:LISTED]]
    if len(worst) > LISTED:
        lines.append(f"  and {len(worst) - LISTED} more\n")
    return "".join(lines)
