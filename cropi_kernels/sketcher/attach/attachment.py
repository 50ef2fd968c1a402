"""Which tap for which module of a model."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from ...names import canonical_name, listed, module_name
from ...plan import VectorPlan
from ..model.ranks import Ranks
from ..model.sharded import units
from ..model.state import check_loaded
from ..sums.accumulator import Accumulator
from ..sums.matrix import MatrixSketch
from ..taps import exact
from ..taps.exact import Exact, ExactTaps
from ..taps.parts import PartLinearTap
from ..taps.taps import Hook, LinearTap, Tap
from .builder import TapBuilder, owners_of
from .coverage import Coverage, uncovered

Places = dict[tuple[nn.Module, str], str]  # names of parameters, by their modules and their names there
UNCOVERED = "uncovered"  # as a pattern of `exclude`: whatever has no tap


@dataclasses.dataclass
class Attachment:
    """The taps of a ``model`` by module, the sums ``acc`` to which they add, the parameters that they cover, and the
    head's own sketches for the fused pass."""

    model: nn.Module
    acc: Accumulator
    taps: dict[nn.Module, Tap]
    coverage: Coverage
    head_matrix: MatrixSketch | None
    head_bias: VectorPlan | None
    exact: ExactTaps
    wanted: dict[nn.Parameter, str]  # names of what is sketched
    places: Places
    head_adds: tuple[bool, bool] = (True, True)  # whether this rank adds the head's weight, and its bias
    ranks: Ranks | None = None  # of a tensor-parallel group

    def check_places(self) -> Places:
        """Check that the sketched parameters are those of the same modules as when the taps were planned.

        Returns:
            The names of all parameters, by their places now.

        Raises:
            ValueError: names one that is not; or parameters have no values.
        """
        check_loaded(self.model)
        places = _places(self.model)
        if units(self.model):  # FSDP2 puts other tensors in the weights' places
            return places
        changed = {name for _, name in places.items() ^ self.places.items()}
        if moved := changed.intersection(self.wanted.values()):
            raise ValueError(
                f"{min(moved)} belongs to other modules than when this sketcher was made: modules were replaced, tied "
                "or parametrized since, and those that came have no tap. Make a new sketcher"
            )
        return places

    @property
    def sources(self) -> list[tuple[nn.Module, Tap | Exact]]:
        """All that add to the sketches, each with its module."""
        return [*self.taps.items(), *((one.chain[0], one) for one in self.exact.parameters)]

    def hook(self) -> Iterator[Hook]:
        """Hook every tap to its module, one by one, so that a caller has those that are on when one fails."""
        for module, tap in self.taps.items():
            yield tap.hook(module)
        yield from self.exact.register()

    def unhook(self, handles: list[Hook]) -> None:
        """Take the hooks off, and empty the list."""
        for handle in handles:
            handle.remove()
        handles.clear()
        self.exact.forget()

    def form(self, modules: Iterable[nn.Module]) -> None:
        """Form the gradients of these modules' parameters too, instead of what their taps do."""
        formed = {one.chain[0] for one in self.exact.parameters} | set(modules)
        builder = TapBuilder(self.model, self.acc, self.wanted, formed)
        assert not builder.missing()
        self.taps = builder.taps
        self.exact = ExactTaps(self.acc, builder.exact)
        self.coverage = dataclasses.replace(self.coverage, by_kind=builder.by_kind)


def plan_model(model: nn.Module, acc: Accumulator, exclude: Sequence[str] | str) -> Attachment:
    """Find a tap for every trainable parameter, which adds to ``acc`` by its spec.

    Raises:
        UncoveredParameterError: names each parameter that cannot be covered, its module's class and the remedy.
        ValueError: a pattern of ``exclude`` matches no parameter, no parameter is left to sketch, two share a name
            (their coordinates would be the same), or some were made under `torch.inference_mode`.
    """
    names = {p: canonical_name(n) for n, p in model.named_parameters()}
    if made := [name for p, name in names.items() if p.is_inference()]:
        raise ValueError(
            f"{listed(made, 3)}: made under torch.inference_mode(), so that they have no gradient: make or load the "
            "model outside of it"
        )
    trainable = {p: name for p, name in names.items() if p.requires_grad}
    patterns: Sequence[str] | str = [UNCOVERED] if exclude == UNCOVERED else exclude
    excluded = _excluded(names, trainable, patterns)
    wanted = {p: name for p, name in trainable.items() if name not in excluded}
    total, left_out = sum(p.numel() for p in model.parameters()), {}
    # Every module that uses a parameter needs its tap: a tied weight has two, and half a gradient is a wrong one.
    while missing := (builder := TapBuilder(model, acc, wanted)).missing():
        lost = {wanted[p]: p.numel() for p, _ in missing}
        if UNCOVERED not in patterns:
            lines = [_describe(builder, wanted[p], p, m) for p, m in missing]
            problem, share = "no tap covers these trainable parameters", sum(lost.values()) / total
            raise uncovered(problem, lines, next(iter(lost)), share)
        left_out.update(lost)
        wanted = {p: name for p, name in wanted.items() if name not in lost}
    if not wanted:
        raise ValueError(
            f"nothing to sketch: {len(trainable)} of the model's {len(names)} parameters have requires_grad, and "
            f"exclude leaves out {len(excluded) + len(left_out)}; call model.requires_grad_(True), or exclude less"
        )
    if len(set(wanted.values())) < len(wanted):
        twice = next(n for n in wanted.values() if list(wanted.values()).count(n) > 1)
        raise ValueError(f"two parameters are named {twice!r} once wrappers' parts are gone: rename one")
    coverage = Coverage(
        total=total,
        covered=sum(p.numel() for p in builder.covered),
        by_kind=builder.by_kind,
        names=tuple(wanted.values()),
        excluded=excluded,
        uncovered=left_out,
        shapes={name: tuple(p.shape) for p, name in wanted.items()},
    )
    # The head's sketches, if it is a linear layer.
    head = builder.taps.get(builder.head) if builder.head is not None else None
    linear = head if isinstance(head, LinearTap) else None
    shares = linear.shares if isinstance(linear, PartLinearTap) else {}
    weight, bias = (which not in shares or shares[which].adds for which in ("weight", "bias"))
    return Attachment(
        model=model,
        acc=acc,
        taps=builder.taps,
        coverage=coverage,
        head_matrix=linear.matrix if linear else None,
        head_bias=linear.bias if linear else None,
        exact=ExactTaps(acc, builder.exact),
        wanted=wanted,
        places=_places(model),
        head_adds=(weight, bias),
        ranks=builder.ranks,
    )


def _places(model: nn.Module) -> Places:
    first: dict[int, str] = {}
    return {
        (module, key): first.setdefault(id(p), canonical_name(f"{path}.{key}" if path else key))
        for path, module in model.named_modules()
        for key, p in module._parameters.items()
        if p is not None
    }


def refused_modules(
    plan: Attachment, decoder: nn.Module | None, wrong: dict[nn.Module, str]
) -> dict[nn.Module, tuple[str, str]]:
    """Modules that cannot be sketched, with their names and why.

    Their tap is ``wrong`` and the gradient cannot be formed; or, where the ``decoder`` alone runs (in
    `policy_gradient`), it would be formed of a module outside it.
    """
    names = {module: module_name(path) for path, module in plan.model.named_modules()}
    users, refused = owners_of(plan.model), {}
    formed = {one.chain[0] for one in plan.exact.parameters}
    for module, why in wrong.items():
        mine = [p for p in module.parameters(recurse=False) if p in plan.wanted]
        if module in formed or any(len(users[p]) > 1 or p.numel() > exact.LARGEST for p in mine):
            refused[module] = names[module] or "the model itself", why
    if decoder is not None:
        inside = set(decoder.modules())
        beyond = {outer for one in plan.exact.parameters for outer in one.chain} - inside
        elsewhere = {outer for outer in beyond if decoder not in set(outer.modules())}
        # A part of the decoder may be one of another module, too: the decoder alone shows half of its gradient.
        shared = {one.chain[0] for one in plan.exact.parameters if not elsewhere.isdisjoint(one.chain)}
        for module in (*wrong, *formed):
            if module not in inside or module in shared:
                why = "outside the decoder, where no formula is known for its parameters"
                refused[module] = names[module] or "the model itself", why
    return refused


def _describe(builder: TapBuilder, name: str, p: nn.Parameter, module: nn.Module) -> str:
    """A parameter that has no tap in ``module``, and what keeps its gradient from being formed."""
    owners = builder.owners[p]
    if module in builder.reasons:
        why = builder.reasons[module]
    elif len(owners) > 1:
        why = f"shared by {len(owners)} modules ({', '.join(type(m).__name__ for m in owners)})"
    else:
        why = f"no formula is known for its use, and its {p.numel():,} numbers are too many for a gradient to be formed"
        why += f" (at most {exact.LARGEST:,})"
    return f"{name} {tuple(p.shape)} in {type(module).__name__}: {why}"


def _excluded(
    names: dict[nn.Parameter, str], trainable: dict[nn.Parameter, str], patterns: Sequence[str] | str
) -> dict[str, int]:
    if isinstance(patterns, str):
        raise ValueError(f"exclude={patterns!r}: give a list of patterns, e.g. exclude=[{patterns!r}]")
    if not isinstance(patterns, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"exclude={patterns!r}: give a list of patterns, e.g. exclude=['*.mlp.*']")
    excluded: dict[str, int] = {}
    for pattern in patterns:
        matched = {name: p.numel() for p, name in trainable.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matched and pattern != UNCOVERED:
            example = next(iter(names.values()), "none at all")
            raise ValueError(
                f"exclude pattern {pattern!r} matches no trainable parameter (e.g. {example}): change it, or "
                "leave it out"
            )
        excluded |= matched
    return excluded
