"""The selector: sums with forgetting, the rule of its draws, its memory, its state, and what it refuses."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.live_streams import turning
from cropi import Selector
from cropi.errors import CropiError
from cropi.ranking.packed_rows import PackedRows
from cropi.ranking.selector import NoValidation
from cropi_kernels import GradientSketcher, LiveSketcher, SketchSpec, reduce_sketch

SPEC = SketchSpec(256)


def made(n: int = 4, **options: Any) -> Selector:
    return Selector([f"p{i}" for i in range(n)], SPEC, **({"dim": 64, "explore": 0.0} | options))


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 256, generator=torch.Generator().manual_seed(seed))


def test_sums_forget_by_age() -> None:
    """Unit sketches by 2^(-(t - t_v) / half_life), whatever the steps in between were used for."""
    selector, x, y = made(half_life=10.0), rows(1, 1), rows(1, 2)
    selector.refresh(rows(3, 3))
    selector.update(["p1"], x, step=5)
    selector.update(["p0"], y, step=15)
    selector.update(["p1"], y, step=25)
    x, y = (torch.nn.functional.normalize(reduce_sketch(z, 64)) for z in (x, y))
    want = 0.25 * x + y
    assert (selector._rows.read(torch.tensor([1])) - want).norm() <= 2**-10 * want.norm()  # float16 twice
    mean = torch.nn.functional.normalize(reduce_sketch(rows(3, 3), 64).mean(0), dim=0)
    assert selector.scores(["p1"])[0] == pytest.approx(float(want[0] @ mean) / 1.25, abs=1e-3)
    assert np.isnan(selector.scores(["p2"])[0])
    selector.refresh(-rows(3, 3))
    assert selector.scores(["p1"])[0] == pytest.approx(-float(want[0] @ mean) / 1.25, abs=1e-3)


def test_visits_without_a_gradient_lower_a_prompt() -> None:
    selector, x = made(), rows(1)
    selector.refresh(x)
    selector.update(["p0", "p1"], torch.cat([x, x]), step=1)
    selector.update(["p0"], torch.zeros(1, 256), step=1)
    assert selector.scores(["p0", "p1"]) == pytest.approx([0.5, 1.0], abs=1e-3)


def test_draws_that_no_validation_prompt_decides_are_said() -> None:
    selector = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selector.next(2, 0)
        selector.update(["p0", "p1"], rows(2), step=1)
        with pytest.raises(NoValidation, match="drawn at random.*call refresh"):
            selector.next(2, 2)
        selector.refresh(rows(1))
        selector.next(2, 2)


def test_parts_of_a_prompt_add_up() -> None:
    one, other, x = made(), made(), rows(2)
    one.update(["p0", "p0"], x, step=1)
    other.update(["p0"], x.sum(0, keepdim=True), step=1)
    assert (one._rows.read(slice(0, 1)) - other._rows.read(slice(0, 1))).norm() <= 2**-10


def test_tensors_whose_axes_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of torch 2.11 has `names`, (None, None) of most, which are not those of a sketch's parameters."""
    monkeypatch.setattr(torch.Tensor, "names", (None, None), raising=False)
    selector, x = made(), rows(2)
    selector.refresh(x)
    selector.update(["p0"], x[:1], step=1)
    assert selector.state_dict()["origin"] == "{}" and np.isfinite(selector.scores(["p0"])[0])


def test_several_validation_sets_count_alike() -> None:
    selector = made()
    a, b = rows(1, 1), rows(1, 2)
    selector.refresh(torch.cat([a, a, 100 * b]), ["a", "a", "b"])
    selector.update(["p0"], a, step=1)
    u, v = reduce_sketch(a, 64)[0], reduce_sketch(b, 64)[0]
    want = (1 + float(torch.nn.functional.cosine_similarity(u, v, dim=0))) / 2
    assert selector.scores(["p0"])[0] == pytest.approx(want, abs=1e-3)


def test_what_is_not_finite_marks_its_prompt_alone() -> None:
    selector, x = made(), rows(2)
    selector.refresh(x[:1])
    selector.update(["p0", "p1"], x, step=1)
    before = selector.scores(["p0", "p1"])
    selector.update(["p0", "p1"], torch.full((2, 256), float("inf")), step=1)  # a step that overflowed
    assert selector.scores(["p0", "p1"]).tolist() == before.tolist()
    selector.update(["p0", "p1"], torch.cat([x[:1] * float("nan"), x[1:]]), step=1)
    assert selector.failed == {"p0": 2, "p1": 1}
    assert selector.scores(["p0"])[0] == pytest.approx(before[0] / 2)


# ------------------------------------------------------------------------------------------------ the rule
@pytest.mark.long
def test_regret_on_a_stream() -> None:
    """The rule gains more than half of what the best choice of every step gains, and loses less than three quarters of
    what is lost by always taking the best known."""
    rule, greedy = (np.mean([turning(s, explore=explore) for s in range(3)]) for explore in (1.0, 0.0))
    assert rule >= 0.5 and 1 - rule <= 0.75 * (1 - greedy), (rule, greedy)


@pytest.mark.long
def test_draws_of_whole_stages_need_less_exploring() -> None:
    """As in TRL, whose default is half: of 1000 prompts a stage of 10 steps draws 60, so that many are new anyway."""
    half, whole = (
        np.mean([turning(s, n=1000, stage=10, explore=explore) for s in range(3)]) for explore in (0.5, 1.0)
    )
    assert half >= 1.25 * whole, (half, whole)


def test_visits_are_compared_with_the_validation_mean_of_their_time() -> None:
    selector, x = made(within=10, half_life=10.0), rows(1)
    assert not selector.listens() and made().listens()
    selector.update(["p3"], x, step=2)  # no validation mean yet: it says nothing
    selector.refresh(x)
    assert [selector.listens(step) for step in (2, 12, 13)] == [True, True, False] and selector.listens()
    with pytest.raises(CropiError, match="step is 1: give an integer of at least 2"):
        selector.listens(1)
    selector.update(["p0", "p1"], torch.cat([x, -x]), step=4)
    selector.refresh(-x)
    assert selector.scores(["p0", "p1"]) == pytest.approx([1.0, -1.0], abs=1e-3)
    selector.update(["p0"], x, step=14)  # ten steps after the refresh: -1 now, beside a half of 1
    assert selector.scores(["p0"])[0] == pytest.approx((0.5 * 1.0 - 1.0) / 1.5, abs=1e-3)
    selector.update(["p0", "p2"], torch.cat([x, x]), step=15)
    assert selector.scores(["p0"])[0] == pytest.approx(-1 / 3, abs=1e-3) and selector.step == 15
    assert selector.seen.tolist() == [True, True, False, False] and selector.nbytes == 4 * 28
    again = made(within=10, half_life=10.0)
    again.load_state_dict(selector.state_dict())
    for one in (selector, again):
        one.update(["p2"], x, step=15)
    assert selector.seen.tolist() == again.seen.tolist() == [True, True, False, False]
    with pytest.raises(CropiError, match="within = 10, but this Selector has None"):
        made(half_life=10.0).load_state_dict(selector.state_dict())
    for bad in (0, 2.5, True):
        with pytest.raises(CropiError, match="within must be None or a number of steps"):
            made(within=bad)


def test_prompts_that_point_away_are_told() -> None:
    """By mean and deviation: one visit is not enough, many are; what was never seen is not opposed."""
    selector, x = made(dim=256), torch.eye(256)
    selector.refresh(x[:1])
    for step in range(30):
        selector.update(["p0", "p1"], torch.stack([x[1] - 0.15 * x[0], x[1] + 0.15 * x[0]]), step)
        if step == 0:
            assert selector.opposed(["p0", "p1", "p2"]).tolist() == [False, False, False]
    assert selector.opposed(["p1", "p0", "p2", "p0"]).tolist() == [False, True, False, True]
    with pytest.raises(CropiError, match="not in the pool"):
        selector.opposed(["other"])


def test_draws_are_the_same_in_every_process_and_differ_by_step() -> None:
    one, other = made(50, explore=1.0, seed=3), made(50, explore=1.0, seed=3)
    assert one.next(5, 1) == other.next(5, 1) != one.next(5, 2)
    assert len(set(one.next(50))) == 50


# -------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("bits, per_number, error", [(16, 2.0, 2**-11), (4, 0.53125, 0.2)])
def test_packed_rows(bits: int, per_number: float, error: float) -> None:
    table, x = PackedRows(10, 1024, bits), torch.randn(3, 1024) * torch.tensor([[1e-6], [1.0], [1e5]])
    places = torch.tensor([7, 2, 5])
    table.write(places, x)
    got = table.read(places)
    assert ((got - x).norm(dim=1) <= error * x.norm(dim=1)).all()
    assert not table.read(torch.tensor([0, 1])).any()
    assert table.nbytes == 10 * (1024 * per_number + 2)


def test_four_bits_are_right_on_average() -> None:
    """Many small rows on a large one: each is far below half a step, their sum is not."""
    with pytest.raises(CropiError, match="dim is 96: in 4 bits it must be a multiple of 64"):
        PackedRows(1, 96, 4)
    table, place = PackedRows(1, 16 * 64, 4), torch.tensor([0])
    large, small = torch.zeros(16, 64), 0.1 * torch.ones(16, 64)
    large[:, 0], small[:, 0], small[8:] = 28.0, 0.0, -small[8:]
    table.write(place, large.view(1, -1))
    for _ in range(100):
        table.write(place, table.read(place) + small.view(1, -1))
    # A step of 4 has a chance of 0.1 / 4: a variance of at most 0.4 in each of 100 roundings, and 504 numbers.
    means = table.read(place).view(2, 8, 64)[:, :, 1:].mean(dim=(1, 2))
    assert ((means - torch.tensor([10.0, -10.0])).abs() <= 4 * (100 * 0.4 / 504) ** 0.5).all()


@pytest.mark.long
def test_a_million_prompts() -> None:
    """4 bits of 256 numbers: 138 bytes a prompt and 28 for its counts; a draw takes a fraction of a second."""
    selector = Selector(range(1_000_000), dim=256, bits=4)
    assert selector.nbytes == 1e6 * (138 + 28)
    selector.refresh(torch.randn(4, 32768))
    selector.update([5, 999_999], torch.randn(2, 32768), 1)
    assert len(set(selector.next(64))) == 64


# --------------------------------------------------------------------------------------------------- state
@pytest.mark.parametrize("bits", [16, 4])
def test_a_run_goes_on_where_it_was_saved(bits: int) -> None:
    def go_on(selector: Selector) -> list[Any]:
        chosen = []
        for step in range(5, 8):
            ids = selector.next(3, step)
            selector.update(ids, rows(3, step), step)
            chosen.append(ids)
        return chosen

    # Numbers of numpy: a state that held them could not be loaded.
    numbers = {
        "dim": np.int64(64),
        "bits": np.int64(bits),
        "seed": np.int32(0),
        "half_life": np.float32(200.0),
    }
    selector = made(20, explore=np.float64(1.0), **numbers)
    selector.refresh(rows(3, 9))
    for step in range(4):
        selector.update([f"p{step}", "p7"], rows(2, step), step)
    file = io.BytesIO()
    torch.save(selector.state_dict(), file)
    file.seek(0)
    again = made(20, explore=1.0, bits=bits)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert go_on(again) == go_on(selector)
    assert np.array_equal(again.scores(again.ids), selector.scores(selector.ids), equal_nan=True)


def test_states_that_do_not_fit_are_refused() -> None:
    state = made().state_dict()
    for other, message in (
        (made(5), "1 prompts are not in the state, for example 'p4'"),
        (made(3), "1 prompts are not in the pool, for example 'p3'"),
        (made(dim=128), "saved with dim = 64, but this Selector has 128"),
        (made(bits=4), "saved with bits = 16"),
        (Selector([f"p{i}" for i in range(4)], SketchSpec(512), dim=64), "saved with spec"),
    ):
        with pytest.raises(CropiError, match=message):
            other.load_state_dict(state)
    with pytest.raises(CropiError, match="not a state of a Selector: 'version' is missing"):
        made().load_state_dict({"model": {}})
    with pytest.raises(CropiError, match="version 2"):
        made().load_state_dict(state | {"version": 2})


# ---------------------------------------------------------------------------------------------- bad input
def test_refused_in_words() -> None:
    with pytest.raises(CropiError, match="sketch's 256, got 1024 .the default.: give dim=N"):
        Selector(["p0"], SketchSpec(256))
    selector = made()
    selector.update(["p0"], rows(1), step=3)
    for ids, sketches, step, message in (
        (["p0"], rows(1), 2, "step is 2: give an integer of at least 3"),
        (["p0"], rows(1), 3.5, "step is 3.5"),
        (["p0", "p1"], rows(1), 4, "ids must be a list of 1"),
        ([None], rows(1), 4, "the prompt of row 0 has no id"),
        (["p0", "other"], rows(2), 4, "row 1 is 'other', which is not in the pool"),
        (["p0"], rows(1)[:, :128], 4, "128 numbers a row"),
        (["p0"], rows(1).tolist(), 4, "give a float tensor"),
        ([0], rows(1), 4, "row 0 is 0, which is not in the pool: .* such as 'p0'"),
        ([float("nan")], rows(1), 4, "the prompt of row 0 has no id"),
        ([["p0"]], rows(1), 4, "is not in the pool"),
        (["p0"], rows(0), 4, "ids must be a list of 0, one for each row, got 1"),
        ("p0", rows(1), 4, "ids must be a list of 1, one for each row, got 'p0'"),
    ):
        with pytest.raises(CropiError, match=message):
            selector.update(ids, sketches, step)
    for options, message in (
        ({"dim": 48}, "power of two"),
        ({"dim": 512}, "up to the sketch's 256"),
        ({"bits": 8}, "bits must be one of 16, 4"),
        ({"half_life": 0.0}, "half_life"),
        ({"explore": -1.0}, "explore"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"features": [["a"]] * 4}, "features must be 4 rows of finite numbers"),
        ({"features": np.ones((3, 2))}, "features must be 4 rows of finite numbers"),
    ):
        with pytest.raises(CropiError, match=message):
            made(**options)
    for ids, message in (
        (["a", "a"], "'a' twice"),
        (["a", None], "None in place 1"),
        ([float("nan"), 1], "nan in place 0: every prompt needs an id, a string or an integer"),
        ([("a", 1)], "in place 0"),
        ([], "at least one"),
    ):
        with pytest.raises(CropiError, match=message):
            Selector(ids)
    for n in (0, 5, 1.5, True):
        with pytest.raises(CropiError, match="from 1 to 4"):
            selector.next(n)  # type: ignore[arg-type]
    for step in (2, "4", 4.5):
        with pytest.raises(CropiError, match="give an integer of at least 3, the last one"):
            selector.next(1, step)  # type: ignore[arg-type]
    assert selector.step == 3 and selector.seen.tolist() == [True, False, False, False]


class Given:
    def __init__(self, spec: SketchSpec, names: tuple[str, ...]) -> None:
        self.sketches, self.spec, self.names = rows(1), spec, names


def test_sketches_of_another_spec_or_model_are_refused() -> None:
    selector = made()
    with pytest.raises(CropiError, match="but this Selector is for"):
        selector.update(["p0"], Given(SketchSpec(256, seed=1), ("w",)), 1)
    selector.update(["p0"], Given(SPEC, ("w",)), 1)
    with pytest.raises(CropiError, match="another model: their 1 parameters"):
        selector.refresh(Given(SPEC, ("v",)))
    other = made()
    with pytest.raises(CropiError, match="not in the pool"):
        other.update(["unknown"], Given(SPEC, ("v",)), 1)
    other.update(["p0"], Given(SPEC, ("w",)), 1)  # what was refused says nothing of the model


def test_sketches_that_point_up_the_loss_are_refused() -> None:
    """A block of `GradientSketcher` gives the opposite of a live block of the same loss."""
    model, where = torch.nn.Linear(4, 4), torch.arange(4)
    features, made_of = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), made()
    with LiveSketcher(model, SPEC) as live, live.batch(where, shape=(4,)) as down:
        model(features).square().sum().backward()
    with GradientSketcher(model, SPEC) as sketcher, sketcher.batch(where, shape=(4,)) as up:
        model(features).square().sum().backward()
    assert torch.allclose(up.sketches, -down.sketches, atol=1e-5 * float(down.sketches.abs().max()))
    for call in (lambda: made_of.refresh(up), lambda: made_of.update(made_of.ids, up, 1)):
        with pytest.raises(
            CropiError, match=r"GradientSketcher.batch, whose rows point up the loss.*-1 times"
        ):
            call()
    made_of.update(made_of.ids, down, 1)
    made_of.refresh(-up.sketches[:1])
    assert made_of.scores(["p0"])[0] == pytest.approx(1.0, abs=1e-2)


def test_ids_and_sketches_of_any_kind_of_array() -> None:
    """Plain ids come back, whatever they were given in: a checkpoint is read with ``weights_only``."""
    for pool in (np.arange(4), torch.arange(4), [np.int64(i) for i in range(4)], range(4)):
        selector = Selector(pool, SPEC, dim=64)  # type: ignore[arg-type]
        assert [type(name) for name in selector.ids] == [int] * 4
        selector.update(np.array([1, 2]), rows(2), np.int64(1))  # type: ignore[arg-type]
        selector.update(torch.tensor([3]), rows(1).half(), 1)  # type: ignore[arg-type]
        assert selector.seen.tolist() == [False, True, True, True]
        file = io.BytesIO()
        torch.save(selector.state_dict(), file)
        file.seek(0)
        Selector(range(4), SPEC, dim=64).load_state_dict(torch.load(file, weights_only=True))
    words = Selector(np.array(["a", "b"]), SPEC, dim=64)  # type: ignore[arg-type]
    words.update(np.array(["b"]), rows(1), 1)  # type: ignore[arg-type]
    assert words.seen.tolist() == [False, True]


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e25])
@pytest.mark.parametrize("within", [None, 3])
def test_usefulness_does_not_depend_on_the_size_of_a_sketch(size: float, within: int | None) -> None:
    """The squares of such numbers are beyond float32."""
    selector = made(within=within)
    selector.refresh(rows(1))
    selector.update(["p0"], size * rows(1), step=1)
    assert selector.scores(["p0"])[0] == pytest.approx(1.0, abs=1e-3)


def test_a_step_that_says_nothing() -> None:
    """No rows at all, as a rank may have; rows of zeros, of which every token was ignored."""
    selector = made()
    selector.refresh(rows(1))
    selector.update([], rows(0), step=7)
    assert selector.step == 7 and not selector.seen.any()
    selector.update(["p0"], torch.zeros(1, 256), step=8)
    assert selector.scores(["p0"])[0] == 0.0 and selector.seen.tolist() == [True, False, False, False]


def damaged(state: dict[str, Any], key: str) -> dict[str, Any]:
    value = state[key]
    if isinstance(value, torch.Tensor):
        return state | {key: value[:, :-1] if key == "valid" else value[:-1]}
    return state | {
        key: {} if isinstance(value, dict) else [*value, 0.0] if isinstance(value, list) else None
    }


def test_a_state_that_is_damaged_is_refused_whole() -> None:
    source = made()
    source.refresh(rows(1))
    source.update(["p0"], rows(1), step=3)
    state = source.state_dict()
    for key in state:
        if key in ("version", "settings", "ids"):
            continue
        selector = made()
        with pytest.raises(CropiError, match=f"the state is damaged: {key}"):
            selector.load_state_dict(damaged(state, key))
        assert selector.step == 0 and not selector.seen.any() and not len(selector._valid)
    with pytest.raises(CropiError, match=r"damaged: ids is .* and should be a list of 4"):
        made().load_state_dict(state | {"ids": ["p0", "p1", "p2", "p3", "p3"]})
    with pytest.raises(CropiError, match=r"damaged: rows\['values'\]"):
        made().load_state_dict(state | {"rows": state["rows"] | {"values": state["rows"]["values"][:1]}})
    with pytest.raises(CropiError, match="not a state of a Selector: 'refreshed' is missing"):
        made().load_state_dict({key: value for key, value in state.items() if key != "refreshed"})


class TwoRanks:
    """Two threads in the place of processes."""

    def __init__(self) -> None:
        self._meet, self._values = threading.Barrier(2, timeout=60), [None, None]

    def gathered(self, value: Any) -> list[Any]:
        self._values[threading.current_thread().name == "1"] = value
        self._meet.wait()
        values = list(self._values)
        self._meet.wait()
        return values

    def run(self, work: Callable[[int], list[str]]) -> list[list[str]]:
        said: dict[int, list[str]] = {}
        threads = [
            threading.Thread(target=lambda i=i: said.update({i: work(i)}), name=str(i)) for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [said[0], said[1]]


def test_an_error_on_one_rank_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 gives an id that is not in the pool, another step, another model; then both give what is right."""
    ranks = TwoRanks()
    monkeypatch.setattr("cropi.ranking.selector.all_gathered", ranks.gathered)

    def work(rank: int) -> list[str]:
        selector, said = made(), []
        for ids, sketches, step in (
            (["p9" if rank else "p0"], rows(1), 1),
            (["p0"], rows(1), 1 + rank),
            (["p0"], Given(SPEC, ("v",) if rank else ("w",)), 1),
            ([f"p{rank}"], Given(SPEC, ("w",)), 2),
        ):
            try:
                selector.update(ids, sketches, step, gather=True)
            except CropiError as error:
                said.append(str(error))
        return [*said, f"{selector.step} {selector.seen.tolist()}"]

    zero, one = ranks.run(work)
    assert zero[0] == f"rank 1: {one[0]}" and one[0].startswith("the prompt of row 0 is 'p9', which is not")
    assert (
        zero[1:]
        == one[1:]
        == [
            "update(gather=True): the ranks gave steps [1, 2], and a step is one for all",
            "update(gather=True): the sketches of rank 1 are of another model: their 1 parameters (the first is 'v') "
            "are not those of the sketches before, which have no 'v'",
            "2 [True, True, False, False]",
        ]
    )


def test_with_a_trainers_step_and_a_scored_batch() -> None:
    """The pair: live sketches of training prompts, scored validation prompts, one direction for both.

    The loss is minus what is scored, divided by a number: every prompt is useful for itself.
    """
    from support import live as steps
    from support import zoo

    import cropi

    model, step = zoo.make("llama"), steps.Step()
    scored = torch.nn.functional.pad(step.scored, (1, 0))
    valid = cropi.score_batch(
        model, step.ids, step.mask, response_mask=scored, prompt_ids=step.prompts, weights=step.mask.float(),
        spec=steps.SPEC,
    )  # fmt: skip
    selector = Selector(range(3), steps.SPEC, explore=0.0)
    selector.refresh(valid)
    with LiveSketcher(model, steps.SPEC) as live, live.batch(step.prompts, shape=step.shape) as got:
        steps.cross_entropy(steps.logits_of(model, step), step, step.rows(None)).backward()
    selector.update(range(3), got, 1)
    same = torch.nn.functional.cosine_similarity(got.sketches[valid.ids], valid.sketches)
    assert (same > 0.9999).all(), "one direction, and one up to the divisor"
    want = torch.nn.functional.cosine_similarity(got.sketches, valid.sketches.mean(0)[None])
    # 3 / sqrt(1024): so many of 32768 numbers are kept.
    assert selector.scores(range(3)) == pytest.approx(want.tolist(), abs=0.1)
