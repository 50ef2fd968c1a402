"""Micro-batches: both layouts, any split, one exact gradient."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.made_data import make_model
from support.oracle import flat_gradient, objective

import cropi.gradient.batches as batches_module
from cropi.data.records import PromptGroup
from cropi.errors import CropiError
from cropi.gradient.batches import MicroBatch, Row, cut_batches, make_batches, plan_rows
from cropi.gradient.estimators import ESTIMATORS, sequence_behaviour
from cropi.gradient.layout import Layout, choose_layout
from cropi.gradient.masks import handed, prefix_mask
from cropi.gradient.tokenize import TokenGroup
from cropi.sketching.passes import fetch
from cropi_kernels import GradientSketcher, PolicyGradient, SketchSpec
from cropi_kernels.sketcher.batch.inputs import model_inputs

SHARED, PADDED = Layout(shared=True), Layout(shared=False)


def make_group(
    name: str, prompt: int, responses: list[int], seed: int, temperature: float = 1.0
) -> TokenGroup:
    rng = random.Random(seed)
    tokens = [[rng.randrange(2, 98) for _ in range(n)] for n in responses]
    logprobs = [[-3 * rng.random() for _ in ids] for ids in tokens]
    rewards = [float(k % 2) + 0.1 * k for k in range(len(responses))]
    record = PromptGroup(name, "text", None, rewards)
    return TokenGroup(record, [rng.randrange(2, 98) for _ in range(prompt)], tokens, logprobs, temperature)


GROUPS = [
    make_group("a", 5, [4, 1, 7, 3], seed=1),
    make_group("b", 1, [2, 2], seed=2),
    make_group("c", 9, [6, 6, 5, 1, 1, 8], seed=3, temperature=0.5),
    make_group("d", 3, [10, 2, 4], seed=4),
]
ESTIMATOR = ESTIMATORS["cropi"]


def exact(model: Any, group: TokenGroup) -> torch.Tensor:
    """The gradient from its definition: one response at a time, no batch, no mask."""
    record = {
        "prompt_ids": group.prompt, "response_ids": group.responses, "rewards": group.group.rewards,
        "logprobs": group.logprobs, "temperature": group.temperature,
    }  # fmt: skip
    return flat_gradient(model, objective(model, record))


def from_batches(model: Any, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """Each prompt's gradient from the arrays that the sketcher gets, by plain autograd."""
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        inputs = model_inputs(model, batch.attention_mask, batch.position_ids, None)
        logits = model(input_ids=batch.input_ids, **inputs).logits
        chosen = logits.flatten(0, 1)[batch.positions] / batch.temperature
        logp = chosen.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        weights = ESTIMATOR.weights(logp.detach(), batch.behaviour, batch.advantages, batch.divisors)
        for s, group in enumerate(batch.groups):
            part = flat_gradient(model, (weights * logp)[batch.token_segments == s].sum())
            sums[group.id] = sums.get(group.id, torch.zeros(())) + part
    return sums


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_layout_and_split_gives_the_exact_gradient(kind: str, attention: str) -> None:
    model = make_model(kind).double()
    model.set_attn_implementation(attention)
    model.train().get_input_embeddings().eval()
    layout = choose_layout(model)
    assert model.training and not model.get_input_embeddings().training, "every module in its own mode"
    model.eval()
    assert layout.shared, layout.note
    expected = {group.id: exact(model, group) for group in GROUPS}
    for chosen, budget in ((layout, 2048), (SHARED, 25), (PADDED, 2048), (PADDED, 1)):
        got = from_batches(
            model, list(make_batches(GROUPS, ESTIMATOR, chosen, budget=budget, stored_behaviour=True))
        )
        assert got.keys() == expected.keys()
        for name in expected:
            # Advantages, divisors and behaviour log-probs are float32, the model float64.
            torch.testing.assert_close(
                got[name], expected[name], rtol=3e-6, atol=3e-6 * float(expected[name].abs().max())
            )


def test_sketches_agree_between_layouts_and_splits() -> None:
    model = make_model("llama")
    reference: dict[str, torch.Tensor] = {}
    with GradientSketcher(model, SketchSpec(dim=512)) as sketcher:
        for layout, budget in ((SHARED, 2048), (SHARED, 20), (PADDED, 64), (PADDED, 1)):
            sums: dict[str, torch.Tensor] = {}
            for batch in make_batches(GROUPS, ESTIMATOR, layout, budget=budget, stored_behaviour=True):
                b = batch

                def weigh(logp: torch.Tensor, start: int, stop: int, b: MicroBatch = b) -> torch.Tensor:
                    assert b.behaviour is not None
                    return ESTIMATOR.weights(
                        logp, b.behaviour[start:stop], b.advantages[start:stop], b.divisors[start:stop]
                    )

                result = sketcher.policy_gradient(
                    batch.input_ids, segments=batch.segments, positions=batch.positions, targets=batch.targets,
                    weigh=weigh, num_segments=len(batch.groups), attention_mask=batch.attention_mask,
                    position_ids=batch.position_ids, temperature=batch.temperature,
                )  # fmt: skip
                for s, group in enumerate(batch.groups):
                    sums[group.id] = sums.get(group.id, 0) + result.sketches[s]
            reference = reference or sums
            for name, sketch in sums.items():
                size = float(reference[name].norm())
                assert float((sketch - reference[name]).norm()) < 1e-4 * size, (name, layout, budget)


def divided(batch: MicroBatch) -> list[MicroBatch]:
    return [part for half in batch.halves() for part in divided(half)] if batch.divisible else [batch]


def test_a_shared_row_is_halved_down_to_single_responses() -> None:
    """Responses of one token have no inputs, and one without scored tokens has no gradient."""
    model = make_model().double()
    masks = [[1, 0, 1, 1], [1], [0] * 7, [0, 1, 1], [1, 1]]
    some = replace(make_group("m", 4, [4, 1, 7, 3, 2], seed=7), masks=masks)
    for group in (GROUPS[2], some):
        (batch,) = make_batches([group], ESTIMATOR, SHARED, stored_behaviour=True)
        parts, scored = divided(batch), [any(mask) for mask in group.masks or group.responses]
        assert batch.input_ids.shape[0] == 1 and [part.finished for part in parts] == [[False]] * (
            len(parts) - 1
        ) + [[True]]
        # The mask is gone with the second response that has inputs.
        assert all(part.blocks is None and bool(part.present.all()) for part in parts)
        assert torch.equal(torch.cat([part.responses for part in parts]), batch.responses)
        assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
        assert 1 < len(parts) <= sum(scored)
        for whole, own in zip(
            from_batches(model, [batch]).values(), from_batches(model, parts).values(), strict=True
        ):
            # The weights are float32.
            torch.testing.assert_close(own, whole, rtol=3e-6, atol=3e-6 * float(whole.abs().max()))


def test_rows_hold_every_response_once_and_respect_the_budget() -> None:
    group = make_group("g", 20, [3, 30, 4, 4, 12, 1, 1, 9], seed=5)
    for budget in (1, 30, 45, 60, 1000):
        rows = plan_rows(group, SHARED, budget)
        assert sorted(k for row in rows for k in row.chosen) == list(range(8))
        assert all(row.length <= budget or len(row.chosen) == 1 for row in rows)
        assert [row.last for row in rows] == [False] * (len(rows) - 1) + [True]
    assert len(plan_rows(group, SHARED, 1000)) == 1, "without an attention cost sharing is always cheaper"
    assert len(plan_rows(group, PADDED, 1000)) == 8
    # 8 long responses to a short prompt: attention over one row of all costs more than the prompt saves.
    long = make_group("h", 4, [200] * 8, seed=6)
    assert len(plan_rows(long, Layout(True, attention_cost=1e-2), 10_000)) == 8


def test_masks_of_shared_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask has a number for every pair of tokens: with 32,768 tokens a batch one row's once took 3 GiB."""
    monkeypatch.setattr(batches_module, "MOST_PAIRS", 900)
    groups = [make_group(f"g{i}", 6, [9, 3, 5, 12, 4, 6], seed=i) for i in range(8)]
    groups += [make_group(f"s{i}", 3, [3, 2, 2], seed=20 + i) for i in range(4)]
    groups.append(make_group("long", 25, [9, 9], seed=9))
    batches = cut_batches(groups, SHARED, budget=10_000)
    sizes = [(len(batch), max(row.length for row in batch)) for batch in batches if batch[0].shared]
    assert max(rows * length**2 for rows, length in sizes) <= 900 and max(rows for rows, _ in sizes) > 1
    assert [len(row.chosen) for batch in batches for row in batch if row.group.id == "long"] == [1, 1]
    monkeypatch.setattr(batches_module, "MOST_PAIRS", 1 << 28)
    (batch,) = cut_batches(groups, SHARED, budget=10_000)
    assert len(batch) == len(groups)


def test_the_memory_of_a_plan_grows_with_the_responses_and_not_with_their_square() -> None:
    count = 1000
    group = make_group("a", 3, [1 + k % 4 for k in range(count)], seed=5)
    group.responses[:] = [[*ids[:-1], 100 + k] for k, ids in enumerate(group.responses)]
    tracemalloc.start()
    batches = cut_batches([group], Layout(shared=True, attention_cost=0.01), budget=64)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(k for batch in batches for row in batch for k in row.chosen) == list(range(count))
    assert most < 1000 * count  # the numbers of all responses in as many plans took 8,000


def test_the_responses_of_a_row_are_as_many_as_cost_least() -> None:
    layout, rng = Layout(shared=True, attention_cost=0.02), random.Random(0)
    for seed in range(200):
        sizes = [rng.randint(1, 9) for _ in range(rng.randint(1, 9))]
        group, budget = make_group("a", rng.randint(1, 20), sizes, seed), rng.randint(8, 60)
        lengths = [len(group.responses[k]) - 1 for k, *_ in group.equal]
        plans = [[tuple(range(len(lengths)))[i : i + m] for i in range(0, len(lengths), m)]
                 for m in range(1, len(lengths) + 1)]  # fmt: skip
        rows = [[len(group.prompt) + sum(lengths[i] for i in row) for row in plan] for plan in plans]
        costs = [sum(n * (1 + (0.01 if m == 0 else 0.02) * n) if m == 0 or max(plan) <= budget else float("inf")
                     for n in plan) for m, plan in enumerate(rows)]  # fmt: skip
        best = plans[costs.index(min(costs))]
        found = [row.chosen for row in plan_rows(group, layout, budget)]
        assert found == [tuple(group.equal[i][0] for i in row) for row in best]


def test_batches_respect_the_budget_and_never_mix_temperatures() -> None:
    groups = [
        make_group(f"g{i}", 3 + i % 5, [2 + i % 7, 4, 1], seed=i, temperature=(1.0, 0.5)[i % 2])
        for i in range(40)
    ]
    for layout in (SHARED, PADDED):
        finished: list[str] = []
        for batch in make_batches(groups, ESTIMATOR, layout, budget=64, window=16):
            assert batch.input_ids.numel() <= 64
            assert {group.temperature for group in batch.groups} == {batch.temperature}
            assert bool((batch.segments[1:] >= batch.segments[:-1]).all())
            assert batch.behaviour is None
            finished += [group.id for group, last in zip(batch.groups, batch.finished) if last]
        assert sorted(finished) == sorted(group.id for group in groups), (
            "each prompt is finished exactly once"
        )


def test_cutting_measures_every_row_a_few_times_however_large_a_batch_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 65,536 tokens a batch it once took a second for every 256 prompts: each row was compared with all others."""
    groups, real, asked = (
        [make_group(f"g{i}", 2, [1 + i % 3] * 4, seed=i) for i in range(32)],
        Row.length.fget,
        0,
    )

    def length(row: Row) -> int:
        nonlocal asked
        asked += 1
        return int(real(row))

    monkeypatch.setattr(Row, "length", property(length))
    (batch,) = cut_batches(groups, PADDED, 10_000)
    assert len(batch) == sum(len(group.equal) for group in groups) and asked <= 3 * len(batch)


def test_token_count_leaves_padding_out() -> None:
    for layout in (SHARED, PADDED):
        expected = sum(row.length for group in GROUPS for row in plan_rows(group, layout, 64))
        assert sum(batch.tokens for batch in make_batches(GROUPS, ESTIMATOR, layout, budget=64)) == expected


def test_masks_are_made_on_the_device() -> None:
    """The host makes and copies a number for each token, and none for each pair of tokens."""
    for layout in (SHARED, PADDED):
        for batch in make_batches(GROUPS, ESTIMATOR, layout, budget=64):
            there = batch.to("meta")
            assert there.attention_mask.is_meta and there.attention_mask.shape == batch.attention_mask.shape
            sizes = [x.numel() for x in vars(batch).values() if isinstance(x, torch.Tensor)]
            assert max(sizes) == max(batch.input_ids.numel(), batch.targets.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_keeps_one_mask_for_all_layers(dtype: torch.dtype) -> None:
    """Torch makes numbers of a bool mask in every layer, and keeps them for the backward pass."""
    model = make_model("llama", num_hidden_layers=3).to(dtype)
    layout = choose_layout(model)
    assert layout.added == dtype
    (batch,) = make_batches(GROUPS[:1], ESTIMATOR, layout)
    length = batch.input_ids.shape[1]

    def run(mask: torch.Tensor) -> tuple[torch.Tensor, int]:
        kept: dict[int, torch.Size] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.shape[-2:] == (length, length):
                kept[x.untyped_storage().data_ptr()] = x.shape
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
        return logits, len(kept)

    want, many = run(batch.attention_mask)
    got, one = run(handed(batch.attention_mask, layout.added))
    assert (many, one) == (3, 1) and torch.equal(got, want)


def test_a_model_that_takes_bool_masks_alone_is_handed_these() -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")
    assert choose_layout(model).added is None, "the sketcher itself makes the mask of eager attention"
    model.set_attn_implementation("sdpa")
    forward = model.model.forward

    def wants_bool(attention_mask: torch.Tensor | None = None, **rest: Any) -> Any:
        mask = attention_mask if attention_mask is None or attention_mask.ndim == 2 else attention_mask != 0
        return forward(attention_mask=mask, **rest)

    model.model.forward = wants_bool
    layout = choose_layout(model)
    assert layout.shared and layout.added is None


def test_masks_that_are_added_begin_where_attention_reads_them_without_a_copy() -> None:
    seen = prefix_mask(torch.tensor([[0, 0, 1, 1, 2, -1], [0, 1, 1, 2, 2, 3]]))
    for dtype, lowest in ((torch.bfloat16, -9e29), (torch.float32, -9e29), (torch.float16, -65504)):
        got = handed(seen, dtype)
        assert got.dtype == dtype and got.stride(-1) == 1 and all(n % 8 == 0 for n in got.stride()[:-1])
        assert torch.equal(got == 0, seen) and torch.equal(got <= lowest, ~seen)
        # As kernels have it, which know exponentials of 2 alone.
        assert (got.float() * 1.4427).isfinite().all()


def test_prefix_mask_by_hand() -> None:
    got = prefix_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert got == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_models_that_cannot_share_are_found_by_trying() -> None:
    bloom = make_model("bloom")  # ALiBi: distances come from the mask, not from position_ids
    layout = choose_layout(bloom)
    assert not layout.shared and "does not take a 4-D mask" in layout.note
    with pytest.raises(CropiError, match="layout 'shared' does not work for this model"):
        choose_layout(bloom, "shared")
    assert choose_layout(bloom, "padded") == PADDED
    with pytest.raises(CropiError, match="layout must be one of"):
        choose_layout(bloom, "packed")
    deaf = make_model("llama")
    # The decoder is what a pass runs.
    forward = deaf.model.forward
    deaf.model.forward = lambda attention_mask=None, **rest: forward(**rest)
    assert "do not follow a custom mask" in choose_layout(deaf).note


def test_sliding_windows_bound_what_is_shared() -> None:
    model = make_model("mistral", sliding_window=16)
    layout = choose_layout(model)
    assert layout.shared and layout.window == 16
    short, long = make_group("s", 5, [4, 4], seed=1), make_group("l", 10, [12, 4], seed=2)
    assert plan_rows(short, layout, 999)[0].shared and not plan_rows(long, layout, 999)[0].shared
    with pytest.raises(CropiError, match="prompt 'l' needs 22 tokens.*layers of 16"):
        plan_rows(long, choose_layout(model, "shared"), 999)
    model = model.double()
    got = from_batches(model, list(make_batches([short, long], ESTIMATOR, layout, stored_behaviour=True)))
    for group in (short, long):
        expected = exact(model, group)
        torch.testing.assert_close(
            got[group.id], expected, rtol=3e-6, atol=3e-6 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_weights_do_not_depend_on_how_groups_are_split(name: str) -> None:
    def weights(layout: Layout, budget: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for batch in make_batches(GROUPS, ESTIMATORS[name], layout, budget=budget, stored_behaviour=True):
            assert batch.behaviour is not None
            # Some log-prob for every token.
            current = batch.behaviour + 0.3 * torch.sin(batch.targets.float())
            old, estimator = batch.behaviour, ESTIMATORS[name]
            if estimator.level == "sequence":
                assert batch.responses is not None
                old = sequence_behaviour(current, old, batch.responses)
            w = estimator.of_sequences().weights(current, old, batch.advantages, batch.divisors)
            for s, group in enumerate(batch.groups):
                found.setdefault(group.id, []).extend(w[batch.token_segments == s].tolist())
        return found

    whole = weights(SHARED, 10_000)
    assert {group.id: group.scored for group in GROUPS} == {key: len(w) for key, w in whole.items()}
    for layout, budget in ((SHARED, 20), (PADDED, 10_000), (PADDED, 1)):
        assert weights(layout, budget) == whole


@pytest.mark.parametrize("equal", [False, True], ids=["each its own", "equal ones"])
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_weights_and_health_read_nothing_from_a_device(name: str, equal: bool) -> None:
    """A device may still have passes to do, for which the host would wait: ``meta`` has no numbers to read."""
    group = make_group("a", 5, [4, 1, 7, 3], seed=1)
    assert group.logprobs is not None
    if equal:
        group = replace(
            group, responses=[*group.responses[:3], group.responses[0]],
            logprobs=[*group.logprobs[:3], group.logprobs[0]],
        )  # fmt: skip
    estimator = ESTIMATORS[name]
    (batch,) = make_batches([group], estimator, PADDED, stored_behaviour=True)
    there = batch.to("meta")
    logprobs = torch.empty(len(batch.targets), device="meta")
    weigh = estimator.weigher(there.advantages, there.divisors, there.behaviour, there.responses, there.noise)
    weights = weigh(logprobs, 0, len(logprobs))
    assert weights.is_meta and weights.shape == logprobs.shape
    sketches = torch.empty(1, 8, device="meta")
    fetched = fetch(estimator, there, there.behaviour, PolicyGradient(sketches, logprobs, weights, dict))
    assert [x.shape[0] for x in fetched.wait()] == [1, 1, 1, 1]
