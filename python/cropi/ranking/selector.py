"""`Selector`: what a trainer needs to choose prompts by the sketches of its own steps."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cropi.agreement import agree, all_gathered
from cropi.checked import absent, fits, is_id
from cropi.errors import CropiError, article, warn
from cropi.ranking.alike import known_alike
from cropi.ranking.exploring import Noise, Values, draw, known
from cropi.ranking.failing import Failing
from cropi.ranking.origin import Origin, differs, merged, origin_of
from cropi.ranking.packed_rows import PackedRows
from cropi.ranking.selector_arguments import check_settings, features_of, names_of
from cropi.ranking.selector_state import check_state
from cropi.ranking.validation_means import directions
from cropi.store.unit import unit_rows
from cropi_kernels import BatchSketch, LiveSketch, SketchSpec, reduce_sketch

CHUNK = 65536  # rows that are float32 at one time
# Half-lives after which a visit counts nothing: its error, 1 / w, would come near float64's limit.
FORGOTTEN = 600


class NoValidation(UserWarning):
    """Prompts are drawn after visits, and no validation sketches were given."""


class Selector:
    """Keeps what the sketches of training steps say of every prompt of a pool, and chooses the next prompts.

    For each prompt: the sum of its sketches, each of length 1, with forgetting by age: ``sum_v w_v g_v / |g_v|`` over
    its visits v, ``w_v = 2^(-(t - t_v) / half_life)``. Its usefulness is that sum, divided by ``sum_v w_v``, times the
    validation mean of length 1: the average of its visits' cosines with the present validation mean, 0 for visits
    without a gradient; with several validation sets, the average over sets. How the next prompts are drawn:
    :mod:`cropi.ranking.exploring`.

    Everything is decided by what was given and ``seed``: processes that are given the same choose the same.

    Args:
        ids: the pool; strings or integers, all different.
        spec: of the sketches that will be given; None: ``SketchSpec()``.
        dim: numbers that are kept of a sketch (`cropi_kernels.reduce_sketch`).
        bits: 16 or 4 for each of them (4: with a scale for each 64; docs/live.md has the memory of a million prompts).
        half_life: optimizer steps after which a visit counts half.
        explore: times the uncertainty of the draws; 1 is the rule, 0 takes the best known.
        seed: of all draws.
        features: float ``[len(ids), k]``, what is known of each prompt before any visit, such as
            :func:`cropi.ranking.alike.prompt_features`: what visits show of a prompt is then expected of those that are
            like it. None: nothing is shared.
        within: None: the sketches of visits are kept, and compared with the *present* validation mean. A number: a
            visit is compared with the validation mean of its own time, and counts where `refresh` is at most so many
            steps past (`listens` tells); its cosine alone is kept. A gradient that a step has followed says little of
            what is left to gain along it, so that old sketches mislead where gradients turn within a few steps
            (docs/live.md).

    >>> spec = SketchSpec(256)
    >>> selector = Selector(["a", "b", "c"], spec, dim=64, explore=0.0)
    >>> towards = torch.ones(1, 256)
    >>> selector.refresh(towards)
    >>> selector.update(["a", "b"], torch.cat([towards, -towards]), step=1)
    >>> selector.next(2)
    ['a', 'c']
    """

    def __init__(
        self,
        ids: Sequence[Hashable],
        spec: SketchSpec | None = None,
        *,
        dim: int = 1024,
        bits: int = 16,
        half_life: float = 200.0,
        explore: float = 1.0,
        seed: int = 0,
        features: npt.ArrayLike | None = None,
        within: int | None = None,
    ) -> None:
        self.spec = SketchSpec() if spec is None else spec
        if not isinstance(self.spec, SketchSpec):
            raise CropiError(f"spec is {article(type(spec).__name__)}: give a SketchSpec")
        self.ids = names_of(ids)
        check_settings(self.spec, dim, half_life, explore, within, seed)
        # Plain numbers in the place of numpy's, which torch.load(weights_only=True) does not take of a state.
        self.within, self._refreshed = None if within is None else int(within), 0
        self.dim, self.seed = int(dim), int(seed)
        self.half_life, self.explore = float(half_life), float(explore)
        self._features = None if features is None else features_of(features, len(self.ids))
        self._place = {name: i for i, name in enumerate(self.ids)}
        n = len(self.ids)
        self._rows = PackedRows(n if within is None else 0, self.dim, bits, self.seed)
        self._weight = np.zeros(n)  # of visits, at the step `_last`
        self._last = np.full(n, -1, dtype=np.int64)
        self._failed = np.zeros(n, dtype=np.int32)
        self._failing = Failing()
        self._valid = torch.zeros(0, self.dim, dtype=torch.float32, device="cpu")
        self._noise = Noise()
        self._shown = np.zeros(n)  # usefulness, on average over visits
        self._origin: Origin = {}  # of the sketches
        # Of every prompt; None: since it was worked out, something was given.
        self._opposed: npt.NDArray[np.bool_] | None = None
        self.step = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        seen = int(self.seen.sum())
        return (
            f"Selector({len(self)} prompts, {seen} seen up to step {self.step}, {len(self._valid)} validation sets, "
            f"{self._rows.bits} bits x {self.dim}: {self.nbytes / 1e6:.1f} MB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, without the ids."""
        tables = (self._weight, self._shown, self._last, self._failed, self._features)
        return self._rows.nbytes + sum(t.nbytes for t in tables if t is not None)

    # ------------------------------------------------------------------------------------------------- given
    def update(self, ids: Sequence[Hashable], sketches: Any, step: int, *, gather: bool = False) -> None:
        """Add the sketches of one training step.

        Args:
            ids: the prompt of each row, a list, an array or a tensor; a prompt that has several rows (of ranks, of
                micro-batches) gets their sum. Of a `LiveSketch`, prompts without a row in its batch have no visit.
            sketches: float ``[n, spec.dim]``, or what has them: a `cropi_kernels.LiveSketch` or a `SketchedBatch`, of
                which spec, parameters, model and estimator must be those of all sketches before
                (:mod:`cropi.ranking.origin`). Nothing shows these of a tensor, nor its sign: its rows have to point
                down the loss, as those of ``LiveSketcher.batch`` do (``GradientSketcher.batch``: take -1 times its
                rows). Rows of zeros are visits without a gradient; so are rows with a NaN or an infinity,
                which mark their prompts as failed besides (where no row of a step is finite, they only do that: an
                overflow under loss scaling says nothing of a prompt). A prompt that fails again and again is left out
                for ever longer (:mod:`cropi.ranking.failing`).
            step: the optimizer step; never less than before.
            gather: take the updates of all ranks of torch.distributed's default group, in their order; every rank must
                call, with as many rows as it has (none, too), and has the same selector afterwards.

        Raises:
            CropiError: an id that is not in the pool, or None; sketches of another spec, size, model, tokenizer or
                estimator; a step back.
                With ``gather``, on every rank if on one, and where ranks give different steps. The selector is then
                as it was.
        """

        def read() -> tuple[int, Origin, npt.NDArray[np.int64], torch.Tensor]:
            when = self._step(step)
            rows, origin = self._reduced(sketches, "sketches")
            places = self.places(ids, len(rows))
            if isinstance(sketches, LiveSketch) and len(sketches.visited) == len(rows):
                # Sketches of other blocks may have been added to it, or its rows be some that were chosen.
                here = (sketches.visited | rows.any(dim=1)).numpy()
                return when, origin, places[here], rows[here]
            return when, origin, places, rows

        every: Callable[[Any], list[Any]] = all_gathered if gather else lambda value: [value]
        mine = agree(read, every, str, lambda rank, problem: CropiError(f"rank {rank}: {problem}"))
        parts = every(mine)
        steps, origin = sorted({part[0] for part in parts}), self._origin
        if len(steps) > 1:
            raise CropiError(f"update(gather=True): the ranks gave steps {steps}, and a step is one for all")
        for rank, part in enumerate(parts):
            if why := differs(origin, part[1]):
                raise CropiError(f"update(gather=True): the sketches of rank {rank} are of {why}")
            origin = merged(origin, part[1])
        self.step, self._origin, self._opposed = steps[0], origin, None
        places = np.concatenate([part[2] for part in parts])
        if len(places):
            self._add(places, torch.cat([part[3] for part in parts]))

    def refresh(self, sketches: Any, sets: Sequence[str] | None = None) -> None:
        """Take new sketches of validation prompts: their means, one a set, replace the ones before.

        A set without a gradient (solved by now, or by chance the rewards of its few prompts are all equal) does not end
        a training: where there are means before, a warning names it, and it is left out until the next `refresh`.
        Where no set has one, the means before are kept.

        Args:
            sketches: as for `update`; rows that are not finite, or zero, are left out.
            sets: the validation set of each row; None: they are one.

        Raises:
            CropiError: as for `update`; the first time, a set without a usable row.
        """
        rows, origin = self._reduced(sketches, "validation sketches")
        if sets is not None and (isinstance(sets, str) or len(sets) != len(rows)):
            raise CropiError(f"sets must be a list of {len(rows)} names, one for each row, got {sets!r:.200}")
        names = ["valid"] * len(rows) if sets is None else [str(name) for name in sets]
        means, problems = directions(rows, names)
        if problems:
            if not len(self._valid):
                raise CropiError(
                    f"{problems[0]}: give sketches of prompts whose rewards differ, or leave the set out"
                )
            kept = f"so the validation means of step {self._refreshed} are kept"
            left = f"so {'it does' if len(problems) == 1 else 'they do'} not count until the next refresh"
            warn(
                f"{', and '.join(problems)}, {left if means else kept}; give more prompts whose rewards differ",
            )
        if not means:
            return
        self._valid, self._refreshed, self._opposed = torch.stack(means), self.step, None
        self._origin = merged(self._origin, origin)
        self._rescore(np.flatnonzero(self._last >= 0))

    # ------------------------------------------------------------------------------------------------- asked
    def listens(self, step: int | None = None) -> bool:
        """Whether visits of a step count: with ``within``, those that come soon enough after a `refresh`.

        Where they do not, the step needs no sketches: `update` would take from them which gradients are not finite, and
        nothing else. Give it no rows then, so that it knows the step.

        Args:
            step: the optimizer step, never less than the last one; None: the one after the last one.
        """
        when = self.step + 1 if step is None else self._step(step)
        return self.within is None or (len(self._valid) > 0 and when - self._refreshed <= self.within)

    def next(self, n: int, step: int | None = None) -> list[Any]:
        """The ids of ``n`` different prompts, best draw first.

        Args:
            n: how many.
            step: when they will be used; never less than the last step that was given, which None is. The draw
                depends on it.

        Without a `refresh` all prompts are equal, which a warning says after the first steps.

        Raises:
            CropiError: more than the pool holds, or no integer; a step back.
        """
        if not fits(n, int) or not 1 <= n <= len(self):
            raise CropiError(f"n must be an integer from 1 to {len(self)}, the size of the pool, got {n!r}")
        when = self._step(step)
        if not len(self._valid) and self.step > 0:
            warn(
                "the next prompts are drawn at random, whatever their visits showed: call refresh with sketches of "
                "validation prompts", NoValidation,
            )  # fmt: skip
        means, deviations = self.known(when)
        means[self._failing.resting(when)] = -np.inf
        return [self.ids[i] for i in draw(means, deviations, int(n), self.explore, (self.seed, when))]

    def known(self, step: int | None = None) -> tuple[Values, Values]:
        """Means and standard deviations of the usefulness of every prompt, in the order of `ids`; ``step`` as for
        `next`."""
        when = self._step(step)
        weight = self._weight * self._kept(self._last, when)
        if self._features is not None:
            return known_alike(self._shown, weight, self._noise, self._features)
        return known(self._shown, weight, self._noise.variance)

    def opposed(self, ids: Sequence[Hashable]) -> npt.NDArray[np.bool_]:
        """Whether visits say that these prompts point against the validation mean: mean and one standard deviation of
        what is known of their usefulness are below 0. False of prompts that were never seen."""
        places = self.places(ids)
        if self._opposed is None:  # asked for every micro-batch of a step
            means, deviations = self.known()
            self._opposed = (means + deviations < 0) & self.seen
        result: npt.NDArray[np.bool_] = self._opposed[places]
        return result

    def scores(self, ids: Sequence[Hashable]) -> Values:
        """The usefulness of these prompts as their visits show it; NaN where there was none."""
        places = self.places(ids)
        return np.where(self._weight[places] > 0, self._shown[places], np.nan)

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """Whether there was a visit, in the order of `ids`."""
        result: npt.NDArray[np.bool_] = self._weight > 0
        return result

    @property
    def failed(self) -> dict[Any, int]:
        """How often the gradient of a prompt was not finite, where it ever was."""
        return {self.ids[i]: int(self._failed[i]) for i in np.flatnonzero(self._failed)}

    # ------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The whole state as tensors and plain values, for ``torch.save`` and ``torch.load(weights_only=True)``.

        The same on every rank, whatever the number of ranks; tensors are not copied.
        """
        return {
            "version": 1, "settings": self._settings(), "ids": list(self.ids), "rows": self._rows.state_dict(),
            "weight": torch.from_numpy(self._weight), "shown": torch.from_numpy(self._shown),
            "last": torch.from_numpy(self._last), "failed": torch.from_numpy(self._failed), "valid": self._valid,
            "noise": [self._noise.total, self._noise.count], "step": self.step, "refreshed": self._refreshed,
            "origin": json.dumps(self._origin, sort_keys=True), "failing": self._failing.state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the pool must be the same, in any order.

        A selector that was given sketches knows their model, and takes no state of another one. To say it beforehand,
        call `update` with no rows.

        Raises:
            CropiError: no such state, of other settings, of another pool or model, or damaged; names what differs. The
                selector is then as it was.
        """
        state = check_state(state, self.state_dict())
        origin = json.loads(state["origin"])
        if why := differs(self._origin, origin):
            raise CropiError(f"the state's sketches are of {why}")
        before = {name: i for i, name in enumerate(state["ids"])}
        order = torch.tensor([before[name] for name in self.ids], dtype=torch.int64, device="cpu")
        self._rows.load_state_dict(state["rows"], order if self.within is None else order[:0])
        self._refreshed = int(state["refreshed"])
        for key in ("weight", "shown", "last", "failed"):
            getattr(self, f"_{key}")[:] = state[key][order].numpy()
        self._valid, self.step, self._opposed = state["valid"].clone(), int(state["step"]), None
        self._origin = merged(self._origin, origin)
        self._noise = Noise(*map(float, state["noise"]))
        self._failing.load(state["failing"], {old: new for new, old in enumerate(order.tolist())})

    @functools.cached_property
    def _features_digest(self) -> str:
        """A digest that does not depend on the order of the pool: the sum of a hash for each prompt."""
        assert self._features is not None
        parts = (
            hashlib.sha256(f"{name!r}".encode() + row.tobytes()).digest()[:8]
            for name, row in zip(self.ids, self._features)
        )
        return f"{sum(int.from_bytes(part, 'big') for part in parts) % 2**64:016x}"

    def _settings(self) -> dict[str, Any]:
        settings = {
            "spec": json.dumps(self.spec.to_dict(), sort_keys=True), "dim": self.dim, "bits": self._rows.bits,
            "half_life": self.half_life, "seed": self.seed,
        }  # fmt: skip
        if self.within is not None:
            settings["within"] = self.within
        if self._features is not None:
            settings["features"] = self._features_digest
        return settings

    # ------------------------------------------------------------------------------------------------- parts
    def _step(self, step: int | None) -> int:
        if step is None:
            return self.step
        if not fits(step, int) or step < self.step:
            raise CropiError(f"step is {step!r}: give an integer of at least {self.step}, the last one")
        return int(step)

    def _reduced(self, given: Any, what: str) -> tuple[torch.Tensor, Origin]:
        """float32 rows [n, dim] on the CPU, and of which model they are."""
        if isinstance(given, BatchSketch):
            raise CropiError(
                f"{what} are of GradientSketcher.batch, whose rows point up the loss, and a Selector's point down it: "
                "give those of LiveSketcher.batch, or -1 times these (`-batch.sketches`)"
            )
        spec, origin = getattr(given, "spec", None), origin_of(given)
        if isinstance(spec, SketchSpec) and spec != self.spec:
            raise CropiError(f"{what} are of {spec}, but this Selector is for {self.spec}")
        if why := differs(self._origin, origin):
            raise CropiError(f"{what} are of {why}")
        rows = getattr(given, "sketches", given)
        if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or not rows.is_floating_point():
            raise CropiError(f"{what}: give a float tensor [n, {self.spec.dim}], got {given!r:.200}")
        if rows.shape[1] != self.spec.dim:
            raise CropiError(
                f"{what} have {rows.shape[1]} numbers a row, but this Selector is for {self.spec}: give sketches of "
                "that spec, or make the Selector with theirs"
            )
        rows = rows.detach().float()
        return reduce_sketch(rows, self.dim, seed=self.spec.seed, version=self.spec.version).cpu(), origin

    def places(self, ids: Sequence[Hashable], count: int | None = None) -> npt.NDArray[np.int64]:
        """The places of prompts in `ids`; ``count``: how many there must be."""
        names = ids.tolist() if hasattr(ids, "tolist") else ids
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or count not in (None, len(names)):
            of, got = "" if count is None else f" of {count}", len(names) if listed else f"{ids!r:.100}"
            raise CropiError(f"ids must be a list{of}, one for each row, got {got}")
        found = [self._place.get(name) if is_id(name) else None for name in names]
        if None in found:
            i = found.index(None)
            why = "has no id" if absent(names[i]) else f"is {names[i]!r}, which is not in the pool"
            raise CropiError(
                f"the prompt of row {i} {why}: the ids are those that the Selector was made with, such as "
                f"{self.ids[0]!r}"
            )
        return np.array(found, dtype=np.int64)

    def _add(self, places: Any, rows: torch.Tensor) -> None:
        finite = rows.isfinite().all(dim=1)
        # A part that is not finite spoils the sum of a prompt's parts.
        broken = np.unique(places[~finite.numpy()])
        unique, inverse = np.unique(places, return_inverse=True)
        failed = len(broken) == len(unique)
        self._failed[broken] += 1
        self._failing.note(broken, self.step, int(self._last.max()) if failed else self.step)
        if failed:
            return  # the step failed (an overflow under loss scaling), and says nothing of any prompt
        self._failing.end(np.setdiff1d(unique, broken))
        new = torch.zeros(len(unique), self.dim, dtype=torch.float64, device="cpu")
        new.index_add_(0, torch.from_numpy(inverse), rows.double())
        new[torch.from_numpy(np.isin(unique, broken))] = 0.0
        new = unit_rows(new)
        if not self.listens(self.step):
            return
        kept = self._kept(self._last[unique], self.step)
        before = self._weight[unique] * kept
        if len(self._valid):
            again = before > 0
            seen = _along(new, self._valid)
            self._noise.note(seen[again] - self._shown[unique][again], before[again])
            if self.within is not None:
                self._shown[unique] = (before * self._shown[unique] + seen) / (before + 1.0)
        if self.within is None:
            where = torch.from_numpy(unique)
            self._rows.write(where, self._rows.read(where) * torch.from_numpy(kept).float()[:, None] + new)
        self._weight[unique] = before + 1.0
        self._last[unique] = self.step
        self._rescore(unique)

    def _kept(self, last: Any, when: int) -> Values:
        """The share of its weight at step ``last`` that a visit still has at step ``when``."""
        ages = np.maximum(when - last, 0)
        halvings = ages / self.half_life
        kept: Values = np.where((last >= 0) & (halvings < FORGOTTEN), np.exp2(-halvings), 0.0)
        return kept

    def _rescore(self, places: Any) -> None:
        if not len(self._valid) or self.within is not None:
            return
        for start in range(0, len(places), CHUNK):
            part = places[start : start + CHUNK]
            along = _along(self._rows.read(torch.from_numpy(part)), self._valid)
            self._shown[part] = along / self._weight[part]


def _along(rows: torch.Tensor, valid: torch.Tensor) -> Values:
    """The mean product of each of ``rows`` with the rows of ``valid``."""
    products: Values = (rows @ valid.T).mean(dim=1).double().numpy()
    return products
