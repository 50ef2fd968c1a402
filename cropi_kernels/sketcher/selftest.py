"""The self-test: before any work, the sums of a model's taps are compared with plain autograd on a few tokens.

Two runs of the model on the same tokens, cut into two segments of unequal length:

*held*: the covered parameters have ``requires_grad`` while the taps listen. So a tap sees the very numbers from which
autograd forms the parameter's gradient, and the two may differ by the rounding of their sums alone, whatever the
model's depth and dtype: that is what lets the bound be tight in bfloat16. Once for each segment, with the loss of that
segment only: a tap must give autograd's gradient to this segment, and nothing to the other.

*frozen*: as `GradientSketcher` works, weights frozen. Every tap must give what it gave before, but for the rounding of
the backward pass; and the output must be that of the model without taps.

Nothing is known of the modules: hooks that change an output or a gradient, replaced forwards, weights that are used
elsewhere too, tokens in another order, graphs that were compiled before the taps came all show as a difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ..names import canonical_name
from .accumulator import Accumulator
from .attach import Attachment
from .coverage import UncoveredParameterError
from .hooks import unless_none
from .listener import Listener, Source, norm, projected, smallest, unit_roundoff
from .ranks import Copies, Ranks, add_over_ranks, like_spread, settled
from .reached import unreached
from .segments import Segments
from .sharded import hooked_whole, reshard, starting_over, units
from .untouched import nothing_kept, thawed, untouched

LISTED = 20  # parameters that an error names

Forward = Callable[[], torch.Tensor]
Owned = list[tuple[nn.Parameter, Callable[[torch.Tensor, torch.Tensor], None]]]


class SelfTestError(UncoveredParameterError):
    """A tap does not give autograd's gradient of its parameter."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters that are compared as one (a module's weight and bias; all that share a weight), in one segment.

    ``error`` and ``allowed`` are norms of sketches, in units of that of autograd's gradient (``size``; where that is
    0, of the error itself).
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
        closest: the part nearest to its bound.
        heard: the modules whose taps heard the backward pass; one that is not heard in a later batch raises an error.
        seconds: what it took.
    """

    tokens: tuple[int, int]
    names: tuple[str, ...]
    untested: tuple[str, ...]
    closest: Part | None
    heard: frozenset[str] = dataclasses.field(repr=False)
    seconds: float

    def __str__(self) -> str:
        batch, length = self.tokens
        text = f"taps held to autograd on {batch} x {length} tokens: {len(self.names)} parameters right"
        if self.untested:
            text += f", {len(self.untested)} without a gradient there ({', '.join(self.untested[:3])})"
        if self.closest is not None:
            text += f"\n  nearest to its bound: {self.closest}"
        return text


@dataclasses.dataclass(frozen=True)
class Trial:
    """What to run: ``forward()`` gives a tensor, ``cotangents`` are gradients of it.

    All that the i-th of them makes belongs to the segments ``owners[i]`` and to no other.
    """

    forward: Forward
    segments: Segments
    cotangents: tuple[torch.Tensor, ...]
    owners: tuple[tuple[int, ...], ...] = ((0,), (1,))
    remedy: str = ""  # the end of the error's message, before "this test"


# -------------------------------------------------------------------------------------------------- parts
class Parts:
    """Taps and parameters in groups that share one: a group's taps add up to its parameters' gradients."""

    def __init__(self, model: nn.Module, attachment: Attachment) -> None:
        reshard(model)
        self.model = model
        names = {id(p): canonical_name(n) for n, p in model.named_parameters()}
        self.formed: dict[int, tuple[nn.Parameter, Callable[[torch.Tensor, torch.Tensor], None]]] = {}
        group: dict[int, int] = {}  # a parameter's id -> its group
        members: dict[int, list[Source]] = {}
        sources: list[tuple[Source, Owned]] = [
            (tap, tap.formed(module) if tap.adds else [(p, _nothing) for p, _ in tap.formed(module)])
            for module, tap in attachment.taps.items()
        ]
        sources += [(one, [(one.parameter, one.add)]) for one in attachment.exact.parameters]
        for tap, own in sources:
            for p, add in own:
                self.formed.setdefault(id(p), (p, add))
            mine = sorted({group.get(id(p), id(p)) for p, _ in own})
            for other in mine[1:]:
                members[mine[0]] = members.get(mine[0], []) + members.pop(other, [])
                group = {k: mine[0] if g == other else g for k, g in group.items()}
            group.update({id(p): mine[0] for p, _ in own})
            members.setdefault(mine[0], []).append(tap)
        self.taps = members
        self.names: dict[int, tuple[str, ...]] = {
            g: tuple(names.get(i, "?") for i, mine in group.items() if mine == g) for g in members
        }
        self.group = group
        self.known = {n for mine in self.names.values() for n in mine}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p, _ in self.formed.values()]


def parameters_of(
    model: nn.Module, attachment: Attachment
) -> list[tuple[nn.Parameter, Callable[[torch.Tensor, torch.Tensor], None]]]:
    """Every sketched parameter, and what adds the sketch of its gradient, once that exists, to ``out`` [1,
    base_dim]."""
    return list(Parts(model, attachment).formed.values())


def _nothing(gradient: torch.Tensor, out: torch.Tensor) -> None:
    """Of a gradient that another rank adds."""


class FormedSums:
    """Autograd's gradients, sketched one by one as they are formed: only one exists at a time."""

    def __init__(
        self,
        parts: Parts,
        dim: int,
        device: torch.device,
        ranks: Ranks | None = None,
        leave: bool = False,
    ) -> None:
        self.parts, self.dim, self.device = parts, dim, device
        self.leave = leave  # the gradients to autograd, for an optimizer
        self.units = units(parts.model)
        self.copies = Copies(ranks, parts.parameters)
        self.sums: dict[int, torch.Tensor] = {}
        self.floor: dict[int, float] = {}  # what numbers below the dtype's smallest may have lost
        self.unit: dict[int, float] = {}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        if self.units:
            hooks = {id(p): unless_none(self._taker(p, add)) for p, add in self.parts.formed.values()}
            with hooked_whole(self.parts.model, hooks):
                yield
            return
        # Hooks run in the order in which they were registered: ours see what those of the model's owner have made.
        handles = [p.register_hook(unless_none(self._taker(p, add))) for p, add in self.parts.formed.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _taker(
        self, p: nn.Parameter, add: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> Callable[[torch.Tensor], torch.Tensor | None]:
        group = self.parts.group[id(p)]

        def take(gradient: torch.Tensor) -> torch.Tensor | None:
            out = torch.zeros(1, self.dim, dtype=torch.float32, device=self.device)
            here = settled(gradient.detach(), p)
            with torch.no_grad():
                add(here.to(torch.promote_types(here.dtype, torch.float32)), out)
            self.sums[group] = self.sums.get(group, 0.0) + projected(out)[0]
            self.copies.note(p, here)
            self.floor[group] = self.floor.get(group, 0.0) + smallest(here) * gradient.numel() ** 0.5
            self.unit[group] = max(self.unit.get(group, 0.0), unit_roundoff(here))
            if self.leave:
                return None
            nothing = here.new_zeros(()).expand_as(here)  # autograd keeps this: a gradient would stay
            return like_spread(nothing, gradient)

        return take


# --------------------------------------------------------------------------------------------------- runs
def self_test(
    model: nn.Module, attachment: Attachment, acc: Accumulator, trial: Trial, others: Sequence[Part] = ()
) -> SelfTest:
    """Compare the taps with autograd, inside the ``with`` block of a `GradientSketcher`. The model stays as it is.

    ``others`` are parts that were compared elsewhere; they are reported together.

    Extra memory: one parameter's gradient at a time and `PROJECTED` numbers for each.

    Raises:
        SelfTestError: names the parameters whose taps are off, and by how much; or says how the model's output changes
            where taps are.
        ValueError: the model cannot be differentiated by ordinary autograd; says why.
    """
    started = time.perf_counter()
    parts = Parts(model, attachment)
    runs = _Runs(model, acc, parts, trial)
    with untouched(model), starting_over(model):
        try:
            found, tested, frozen = runs.compare()
        except RuntimeError as error:
            if "inplace operation" in str(error):
                raise SelfTestError(
                    f"ordinary autograd cannot run the model, so that its taps can be held to nothing ({error}); leave "
                    "out this test, and take the sketch as it is: verify=False"
                ) from error
            if "use_reentrant" not in str(error):
                raise
            runs.reentrant = True
            found, tested, frozen = runs.compare()
    found += others
    held = [n for g in parts.taps if g in tested for n in parts.names[g]] + [
        n for part in others for n in part.names
    ]
    unused = [n for g in parts.taps for n in parts.names[g] if n not in held]
    wrong = [part for part in found if not part.right]
    if wrong:
        raise _error(wrong, trial.remedy)
    reached = {name for part in found if part.size > 0 for name in part.names}
    if problem := unreached(parts.taps, parts.names, frozen, reached):
        raise SelfTestError(problem)
    return SelfTest(
        (trial.segments.batch, trial.segments.length),
        tuple(dict.fromkeys(n for n in held if n in parts.known)),
        tuple(unused),
        max(found, key=lambda part: part.error / part.allowed if part.allowed else 0.0, default=None),
        frozenset(tap.where for tap in frozen.sums),
        time.perf_counter() - started,
    )


class _Runs:
    def __init__(self, model: nn.Module, acc: Accumulator, parts: Parts, trial: Trial) -> None:
        self.acc, self.parts, self.trial, self.ranks = acc, parts, trial, acc.ranks
        self.reentrant = False
        self.device = trial.cotangents[0].device
        self.devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})

    def again(self) -> contextlib.AbstractContextManager[None]:
        """The same random numbers in every run: dropout drops the same. No weights that autocast has cast and kept."""
        torch.clear_autocast_cache()
        return torch.random.fork_rng(devices=self.devices)

    def compare(self) -> tuple[list[Part], set[int], Listener]:
        """The parts; the groups of parameters that have a gradient; what the taps gave over frozen weights."""
        with self.again(), torch.no_grad():
            plain = self.trial.forward()
        with self.again():
            frozen = self.frozen(plain)
        parts: list[Part] = []
        held: dict[Source, torch.Tensor] = {}
        sizes: dict[Source, float] = {}
        tested: set[int] = set()
        for s in range(len(self.trial.cotangents)):
            with self.again():
                listener, exact = self.held(s)
            parts += compare(self.parts, listener, exact, self.trial.owners[s], self.trial.segments)
            tested |= set(exact.sums)
            for tap, took in listener.sums.items():
                held[tap] = held[tap] + took if tap in held else took
                sizes[tap] = sizes.get(tap, 0.0) + listener.size[tap]
        return parts + _compare_frozen(self.parts, frozen, held, sizes), tested, frozen

    def frozen(self, plain: torch.Tensor) -> Listener:
        listener = Listener(self.acc)
        with listener.batch(self.trial.segments, self.device):
            with torch.enable_grad():
                y = self.trial.forward()
            _check_output(y.detach(), plain, len(self.parts.taps), self.ranks)
            if y.requires_grad:
                y.backward(torch.stack(self.trial.cotangents).sum(0).to(y.dtype))
        self.over_ranks(listener)
        return listener

    def held(self, s: int) -> tuple[Listener, FormedSums]:
        listener, exact = (
            Listener(self.acc),
            FormedSums(self.parts, self.acc.spec.base_dim, self.device, self.ranks),
        )
        parameters = self.parts.parameters
        with thawed(parameters), listener.batch(self.trial.segments, self.device), exact.hooked():
            with torch.enable_grad():
                y = self.trial.forward()
            # Of the modules' outputs too: a tap must be heard where no parameter lies behind it.
            inputs = [*parameters, *{id(t): t for t in listener.outputs}.values()]
            cotangent = self.trial.cotangents[s].to(y.dtype)
            # That kind of checkpointing knows no named inputs; FSDP2's whole parameters have no names.
            if y.requires_grad and (self.reentrant or exact.units):
                with nothing_kept(parameters):
                    y.backward(cotangent)
            elif y.requires_grad:
                torch.autograd.grad(y, inputs, cotangent, allow_unused=True)
        self.over_ranks(listener, exact)
        return listener, exact

    def over_ranks(self, listener: Listener, exact: FormedSums | None = None) -> None:
        """What all ranks of a tensor-parallel group found, on each of them: all come to the same conclusion."""
        if self.ranks is None:
            return
        for taps in self.parts.taps.values():
            for tap in taps:
                add_over_ranks(
                    self.ranks, tap, listener.sums, [listener.size], [listener.unit, listener.calls]
                )
        if exact is None:
            return
        exact.copies.compare()
        for group in self.parts.taps:
            add_over_ranks(self.ranks, group, exact.sums, [exact.floor], [exact.unit])


def _check_output(y: torch.Tensor, plain: torch.Tensor, depth: int, ranks: Ranks | None = None) -> None:
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
    parts: Parts, listener: Listener, exact: FormedSums, owners: tuple[int, ...], segments: Segments
) -> list[Part]:
    """What the taps gave to each segment, and what autograd formed of a loss that belongs to ``owners``."""
    found = []
    tokens = segments.batch * segments.length
    mine = torch.zeros(segments.count, dtype=torch.bool, device="cpu")
    mine[list(owners)] = True
    for group, taps in parts.taps.items():
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
        copies = max((exact.copies.apart[i] for i, g in parts.group.items() if g == group), default=0.0)
        for tap in heard:
            unit = max(listener.unit[tap], exact.unit.get(group, 0.0))
            allowed += listener.size[tap] * bound(unit, listener.calls[tap], tokens)
        if not heard:
            what = "its tap heard nothing: the weight is used without its module"
        elif elsewhere > allowed:
            what = (
                "tokens of one segment count for another: the module does not see them in the batch's order"
            )
        else:
            what = "its tap saw something else than autograd"
        error = (error * error + elsewhere * elsewhere) ** 0.5
        found.append(Part(parts.names[group], what, error, allowed, 0.0 if want is None else norm(want)))
        if copies:
            what = (
                "every rank of the tensor-parallel group has it whole, and another gradient of it (of its own heads or "
                "tokens?)"
            )
            found.append(Part(parts.names[group], what, copies, allowed, 0.0 if want is None else norm(want)))
    return found


def _compare_frozen(
    parts: Parts, frozen: Listener, held: dict[Source, torch.Tensor], sizes: dict[Source, float]
) -> list[Part]:
    """Compare the taps over frozen weights with those over trainable ones, but for a backward pass's rounding."""
    found = []
    depth = max(1, len(held)) ** 0.5
    for group, taps in parts.taps.items():
        for tap in taps:
            if tap not in frozen.sums and tap not in held:
                continue
            want, got = held.get(tap), frozen.sums.get(tap)
            size = max(sizes.get(tap, 0.0), frozen.size.get(tap, 0.0))
            allowed = 8 * depth * frozen.unit.get(tap, 2.0**-24) * size
            if got is None:
                assert want is not None
                # A gradient of zeros may come or stay away.
                what, error = (
                    "over frozen weights its tap heard nothing (compiled before the taps came?)",
                    norm(want),
                )
            elif want is None:
                what, error = "its tap is heard over frozen weights only", norm(got)
            else:
                what, error = "over frozen weights its tap gives something else", norm(got - want)
            found.append(Part(parts.names[group], what, error, allowed, 0.0 if want is None else norm(want)))
    return found


def bound(unit: float, calls: int, tokens: int) -> float:
    """Of the difference of two sums of the same products, in units of ``sum |d| |a|``.

    Rounded to the tensors' dtype are the folded inputs, the products of a norm, the gradient, and its sum over
    ``calls``; in float32 sums of ``tokens`` products and of the columns that meet in a number of the sketch (1024 for
    the widest layers), whose errors add like a random walk (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). A sketch
    keeps norms up to a small factor: 4 for all of it.
    """
    return 4 * ((3 + calls) * unit + (tokens + 1024) ** 0.5 * 2.0**-24)


def _error(wrong: list[Part], remedy: str) -> SelfTestError:
    example = wrong[0].names[0]
    return SelfTestError(
        "sketches are not those of the gradients that autograd formed on a few tokens (a module does not see every "
        "token once and in order, or its weight is used in another way):\n"
        + named(wrong)
        + (
            remedy
            or f"freeze them, or leave them out by name (exclude=[{example!r}, ...]); verify=False leaves out "
        )
        + "this test"
    )


def named(wrong: list[Part]) -> str:
    """A line for each parameter that is off, with its worst part."""
    worst: dict[tuple[str, ...], Part] = {}
    for part in wrong:
        before = worst.get(part.names)
        if before is None or not part.error <= before.error:
            worst[part.names] = part
    lines = [f"  {part}\n" for part in list(worst.values())[:LISTED]]
    if len(worst) > LISTED:
        lines.append(f"  and {len(worst) - LISTED} more\n")
    return "".join(lines)
