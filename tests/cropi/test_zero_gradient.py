"""Equal responses are computed once, and gradients that are zero by algebra are no prompts to rank; small ones are."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_tokenizer, write_lines
from support.oracle import response_logprobs, sketch_of
from support.stores import sketches_of

from cropi.errors import CropiError
from cropi.gradient.equal import equal_responses, sum_of_equals
from cropi.gradient.estimators import ESTIMATORS
from cropi.gradient.zero import Suspicion, is_zero, rounding
from cropi.model.policy import Policy
from cropi.ranking.members import validation_means
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

SPEC = SketchSpec(dim=1024)


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, 97) for _ in range(count)]


def job(
    out: Path, model: Any, records: list[dict[str, Any]], **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, RowInfo]]:
    path = write_lines(out.with_suffix(".jsonl"), records)
    sketch(Policy(model, make_tokenizer()), SketchJob([path], out, spec=SPEC, **options), progress=False)
    store = SketchStore.open(out)
    vectors = sketches_of(store)
    return vectors, {row.id: row for row in store.rows()}


def exact(model: Any, record: dict[str, Any], estimator: str) -> torch.Tensor:
    """In float64, one response at a time, equal ones too."""
    return sketch_of(copy.deepcopy(model).double(), record, estimator, SPEC)


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got - right).norm() / right.norm())


def duplicates(logprobs: bool, masks: bool) -> list[dict[str, Any]]:
    """Prompts with two or three equal responses among others, each with log-probs of its own."""
    rng = random.Random(0)
    records = []
    for i in range(4):
        a, b, c = ids(rng, 6), ids(rng, 3), ids(rng, 8)
        responses = [a, b, a, c, a, b][: 4 + i % 3]
        record: dict[str, Any] = {
            "id": f"p{i}", "prompt_ids": ids(rng, 4 + i), "response_ids": responses,
            "rewards": [round(rng.random(), 3) for _ in responses],
        }  # fmt: skip
        if logprobs:
            record["logprobs"] = [[-5.0 + rng.gauss(0, 0.2) for _ in ids] for ids in responses]
        if masks:
            record["loss_mask"] = [
                [0] * (k % 2) + [1] * (len(ids) - k % 2) for k, ids in enumerate(responses)
            ]
        records.append(record)
    return records


@pytest.mark.long
@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("masks", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", ["cropi", "ppo", "dapo", "reinforce"])
def test_equal_responses_are_computed_once_with_the_sum_of_their_weights(
    tmp_path: Path, name: str, masks: bool, layout: str
) -> None:
    model, estimator = make_model(), ESTIMATORS[name]
    records = duplicates(logprobs=estimator.ratio, masks=masks)
    # One response a row, several rows a prompt; and as many as fit.
    for budget in (1, 2048):
        options = dict(
            layout=layout, estimator=estimator, tokens_per_batch=budget,
        )  # fmt: skip
        got, rows = job(tmp_path / f"s{budget}", model, records, **options)
        for record in records:
            assert error(got[record["id"]], exact(model, record, name)) < 2e-5
            assert rows[record["id"]].tokens == sum(
                map(sum, record["loss_mask"]) if masks else map(len, record["response_ids"])
            )


def test_statistics_of_a_row_count_every_one_of_equal_responses(tmp_path: Path) -> None:
    """Half of the tokens has the ratio 2, a quarter 1/2 and a quarter 1; equal responses differ in it."""
    model = make_model()
    response, other = [5, 9, 12], [7, 8, 11]
    found = [response_logprobs(model, [3, 4], ids).detach() for ids in (response, other)]
    shifts = {0: 2.0, 1: 0.5, 2: 1.0, 3: 2.0}
    logprobs = [(found[k % 3 == 2] - float(np.log(r))).tolist() for k, r in shifts.items()]
    responses = [other if k % 3 == 2 else response for k in shifts]
    record = {
        "id": "a", "prompt_ids": [3, 4], "response_ids": responses, "rewards": [1.0, 0.0, 1.0, 0.0],
        "logprobs": logprobs,
    }  # fmt: skip
    _, rows = job(tmp_path / "s", model, [record], estimator=ESTIMATORS["ppo"])
    extra = rows["a"].extra
    assert extra["ratio"] == pytest.approx((2 + 0.5 + 1 + 2) / 4, rel=1e-5)
    assert extra["ess"] == pytest.approx(5.5**2 / (4 * (4 + 0.25 + 1 + 4)), rel=1e-5)
    # Clipped: 2 > 1.2 where the advantage is positive, 0.5 < 0.8 where it is negative; 2 with a negative one is not.
    assert extra["clipped"] == pytest.approx(2 / 4)


def test_what_cancels_by_algebra_is_a_zero_gradient_and_known_before_any_pass(tmp_path: Path) -> None:
    rng, model = random.Random(1), make_model()
    a, b, c = ids(rng, 6), ids(rng, 6), ids(rng, 8)
    records = [
        {"id": "same", "prompt_ids": ids(rng, 5), "response_ids": [a] * 4, "rewards": [0.71, 0.70, 0.69, 0.72]},
        {"id": "pairs", "prompt_ids": ids(rng, 5), "response_ids": [a, a, b, b], "rewards": [1.0, 0, 1, 0]},
        {"id": "thirds", "prompt_ids": ids(rng, 5), "response_ids": [a] * 3 + [b] * 3, "rewards": [0.1, 0.2, 0.6] * 2},
        {"id": "cut", "prompt_ids": ids(rng, 10), "response_ids": [[*c, 5, 6], [*c, 9, 9]], "rewards": [1.0, 0.0]},
    ]  # fmt: skip
    seen: list[list[int]] = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: seen.extend(args[0].tolist())
    )
    got, rows = job(tmp_path / "s", model, records, max_length=18, too_long="truncate-right", layout="padded")
    handle.remove()
    assert not got and {row.reason for row in rows.values()} == {"zero gradient"}
    # The model is tried on tokens that are made up; no prompt was computed.
    prompts = [record["prompt_ids"] for record in records]
    assert seen and not any(row[: len(prompt)] == prompt for row in seen for prompt in prompts)
    with pytest.raises(CropiError, match="no usable prompt: 4 were left out"):
        validation_means([SketchStore.open(tmp_path / "s")])


def test_log_probs_of_their_own_or_clipping_keep_equal_responses_from_cancelling(tmp_path: Path) -> None:
    rng, model = random.Random(2), make_model()
    a = ids(rng, 5)
    record: dict[str, Any] = {
        "id": "a", "prompt_ids": ids(rng, 4), "response_ids": [a, a], "rewards": [1.0, 0.0],
        "logprobs": [[-4.0] * 5, [-4.5, -4.0, -4.0, -4.0, -4.0]],
    }  # fmt: skip
    got, _ = job(tmp_path / "own", model, [record])
    assert error(got["a"], exact(model, record, "cropi")) < 1e-5
    record["logprobs"][1] = record["logprobs"][0]
    _, rows = job(tmp_path / "equal", model, [record])
    assert rows["a"].reason == "zero gradient"
    # A ratio above 1.2 is clipped where the advantage is positive, and not where it is negative.
    old = (response_logprobs(model, record["prompt_ids"], a).detach() - 0.5).tolist()
    record["logprobs"] = [old, old]
    got, _ = job(tmp_path / "ppo", model, [record], estimator=ESTIMATORS["ppo"])
    assert error(got["a"], exact(model, record, "ppo")) < 1e-5


TWINS = ("*embed_tokens*", "lm_head*")


def twins(model: Any) -> Any:
    """Tokens 5 and 6 are one and the same but for their rows of the embedding and the head."""
    with torch.no_grad():
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            table[6] = table[5]
    return model


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cancels_by_rounding_alone_is_a_zero_gradient(
    tmp_path: Path, dtype: torch.dtype, layout: str
) -> None:
    """Unequal responses with equal gradients, of the parameters that are sketched."""
    rng, model = random.Random(3), twins(make_model(tie_word_embeddings=False)).to(dtype)
    records = []
    for i in range(6):
        rest = ids(rng, 9)
        responses = [[5, *rest], [6, *rest]] * (1 + i % 2)
        records.append(
            {"id": f"zero{i}", "prompt_ids": ids(rng, 4 + i), "response_ids": responses,
             "rewards": [1.0, 0.0] * (1 + i % 2)}
        )  # fmt: skip
        records.append(
            {"id": f"good{i}", "prompt_ids": ids(rng, 4 + i), "response_ids": [ids(rng, 9) for _ in range(4)],
             "rewards": [1.0, 0.0, 0.0, 1.0]}
        )  # fmt: skip
    got, rows = job(tmp_path / "s", model, records, layout=layout, exclude=TWINS)
    assert {row.id for row in rows.values() if row.reason == "zero gradient"} == {
        f"zero{i}" for i in range(6)
    }
    assert set(got) == {f"good{i}" for i in range(6)}


@pytest.mark.long
def test_many_responses_that_have_little_in_common_are_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sum grows as the root of their number, and so does its rounding, which is a hundredth of it."""
    monkeypatch.setattr(Suspicion, "is_suspicious", lambda *_: True)
    rng, model = random.Random(0), make_model(num_hidden_layers=36).to(torch.bfloat16)
    record = {
        "id": "a", "prompt_ids": ids(rng, 4), "response_ids": [ids(rng, 8) for _ in range(96)],
        "rewards": [1.0, 0.0, 0.0] * 32,
    }  # fmt: skip
    got, rows = job(tmp_path / "half", model, [record])
    assert rows["a"].reason == ""
    whole, _ = job(tmp_path / "whole", copy.deepcopy(model).float(), [record])
    assert error(got["a"], whole["a"]) < 0.05


@pytest.mark.long
def test_the_rule_can_be_switched_off(tmp_path: Path) -> None:
    rng, model = random.Random(3), twins(make_model(tie_word_embeddings=False))
    with torch.no_grad():
        row = model.model.embed_tokens.weight[6]
        row += 2.0**-22 * row.abs().max() * torch.linspace(-1, 1, len(row))  # units in the last place
    rest, records = ids(rng, 9), []
    for i in range(4):
        responses = [[5, *rest], [6, *rest]] * 2
        records.append(
            {
                "id": str(i),
                "prompt_ids": ids(rng, 4 + i),
                "response_ids": responses,
                "rewards": [1.0, 0, 1, 0],
            }
        )
    _, rows = job(tmp_path / "on", model, records, exclude=TWINS)
    assert {row.reason for row in rows.values()} == {"zero gradient"}
    got, rows = job(tmp_path / "off", model, records, exclude=TWINS, zero_check=False)
    assert len(got) == 4 and all(0 < float(sketch.norm()) < 1e-4 for sketch in got.values())
    record = records[0]
    record["response_ids"] = [rest] * 4
    _, rows = job(tmp_path / "equal", model, [record], exclude=TWINS, zero_check=False)
    assert rows["0"].reason == "zero gradient"
    with pytest.raises(CropiError, match="zero_check"):  # the rows of one store are made by one rule
        job(tmp_path / "equal", model, [record], exclude=TWINS)


def test_small_gradients_that_are_right_stay(tmp_path: Path) -> None:
    """A long common beginning cancels; a sure policy; rewards that hardly differ. Held to float64."""
    rng, model = random.Random(4), make_model(max_position_embeddings=512)
    begin = ids(rng, 200)
    small = {
        "id": "begin", "prompt_ids": ids(rng, 5), "response_ids": [[*begin, 7], [*begin, 8]], "rewards": [1.0, 0.0]
    }  # fmt: skip
    close = {
        "id": "close", "prompt_ids": ids(rng, 5), "response_ids": [ids(rng, 6), ids(rng, 6)],
        "rewards": [0.5, 0.50001],
    }  # fmt: skip
    got, _ = job(tmp_path / "s", model, [small, close], estimator=ESTIMATORS["reinforce"])
    for record in (small, close):
        assert error(got[record["id"]], exact(model, record, "reinforce")) < 1e-4
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure.lm_head.weight.mul_(20.0)
        prompt, responses = ids(rng, 5), []
        for _ in range(2):  # the two likeliest continuations
            text = [*prompt]
            for step in range(6):
                best = sure(input_ids=torch.tensor([text])).logits[0, -1].topk(2).indices
                text.append(int(best[len(responses) if step == 5 else 0]))
            responses.append(text[len(prompt) :])
    record = {"id": "sure", "prompt_ids": prompt, "response_ids": responses, "rewards": [1.0, 0.0]}
    got, _ = job(tmp_path / "sure", sure, [record])
    assert error(got["sure"], exact(sure, record, "cropi")) < 1e-3


def test_the_rule_itself() -> None:
    assert equal_responses([[1], [1], [2]], [[1], [0], [1]]) == [(0,), (1,), (2,)]
    table = torch.tensor([[0.5, -0.5, 0.0], [0.5, -0.4999, 0.0], [0.1, 0.2, -0.3], [1e-30, 0.0, 0.0]])
    assert sum_of_equals(table).tolist() == [0.0, pytest.approx(1e-4, rel=1e-3), 0.0, pytest.approx(1e-30)]
    # Beside the sizes of the terms, whatever these are.
    assert sum_of_equals(torch.tensor([[1e6, -1e6 - 0.25], [1e-6, -9e-7]])).tolist() == [
        0.0,
        pytest.approx(1e-7, rel=1e-5),
    ]
    bound = rounding(make_model())
    # A model that does not say how many layers it has counts as one of 32.
    assert rounding(torch.nn.Linear(2, 2)) == 2**-19
    assert bound == pytest.approx((32 * 2) ** 0.5 * 2**-24) and is_zero(bound, 1.0, bound)
    assert not is_zero(2 * bound, 1.0, bound)
    suspicion = Suspicion(bound)
    assert suspicion.is_suspicious(1e-3, 1.0) and not suspicion.is_suspicious(10.0, 1.0)
    assert suspicion.is_suspicious(0.03, 1.0), "the largest so far is 10"
    assert not suspicion.is_suspicious(0.0, 0.0) and not suspicion.is_suspicious(float("nan"), 1.0)
