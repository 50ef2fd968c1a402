"""Whose log-probs are they? Those of the right policy pass; others are named before any work."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines

import cropi
from cropi.data.records import make_group
from cropi.errors import CropiError
from cropi.gradient.behaviour_check import BehaviourMismatch, check_behaviour, judge, signature
from cropi.gradient.estimators import ESTIMATORS
from cropi.gradient.health import Health
from cropi.gradient.layout import layout_of
from cropi.gradient.tokenize import Tokenize
from cropi.model.policy import Policy
from cropi.ranking.influence import influence
from cropi.ranking.table import read_scores, write_scores
from cropi.sketching.job import EqualModels, SketchJob
from cropi.sketching.run import sketch
from cropi.sketching.summary import Summary
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec


@torch.no_grad()
def rollouts(model: Any, count: int = 6, temperature: float = 1.0, length: int = 12) -> list[dict[str, Any]]:
    """Responses that the model samples, with their log-probs at that temperature."""
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    records = []
    for i in range(count):
        prompt = [rng.randrange(2, 97) for _ in range(5 + i % 3)]
        rows = torch.tensor([prompt] * 4)
        found = []
        for _ in range(length):
            logp = (model(input_ids=rows).logits[:, -1].float() / temperature).log_softmax(-1)
            token = torch.multinomial(logp.exp(), 1, generator=generator)
            rows, found = torch.cat([rows, token], dim=1), [*found, logp.gather(1, token)]
        records.append(
            {"id": f"p{i}", "prompt_ids": prompt, "response_ids": rows[:, len(prompt) :].tolist(),
             "logprobs": torch.cat(found, dim=1).clamp(max=0.0).tolist(), "rewards": [1.0, 0.0, 0.0, 1.0],
             "temperature": temperature}
        )  # fmt: skip
    return records


def scaled(records: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    return [r | {"logprobs": [[x * factor for x in row] for row in r["logprobs"]]} for r in records]


def relabelled(records: list[dict[str, Any]], temperature: float | None) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "temperature"} | ({"temperature": temperature} if temperature else {})
            for r in records]  # fmt: skip


def run(folder: Path, model: Any, records: list[dict[str, Any]], **options: Any) -> Summary:
    path = write_lines(folder / "t.jsonl", records)
    job = SketchJob([path], folder / "s", spec=SketchSpec(dim=512), **options)
    return sketch(Policy(model, make_tokenizer()), job, progress=False)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_of_the_right_policy_pass(tmp_path: Path, dtype: torch.dtype, temperature: float) -> None:
    """In bfloat16 those of float32, as an engine of another precision would give."""
    records = rollouts(make_model(), temperature=temperature)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BehaviourMismatch)
        summary = run(tmp_path, make_model().to(dtype), records)
    assert summary.finding is not None and summary.finding.level == ""
    assert summary.finding.median == pytest.approx(1.0, abs=0.02) and summary.finding.tokens == 6 * 4 * 12
    assert summary.health.ratio == pytest.approx(1.0, abs=0.05) and summary.health.ess > 0.98
    assert "behaviour     file; ratio 1" in summary.text()


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, head", [("granite", {"logits_scaling": 0.25}), ("gemma3_text", {"final_logit_softcapping": 3.0})]
)
def test_heads_that_scale_or_cap_their_logits_pass(tmp_path: Path, kind: str, head: dict[str, float]) -> None:
    model = make_model(kind, **head)
    finding = run(tmp_path, model, rollouts(model)).finding
    assert finding is not None and finding.level == "" and finding.median == pytest.approx(1.0, abs=1e-5)


def test_prompts_are_shared_and_a_model_that_mixes_responses_there_is_judged_without(tmp_path: Path) -> None:
    """The layout is tried on 13 tokens first; in longer shared rows this model gives hidden states of other tokens."""
    model, seen, mixes = make_model(), [], False

    def watch(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        shared = mask is not None and mask.ndim == 4
        seen.append((shared, ids.numel()))
        if mixes and shared and ids.shape[1] > 13:
            output.last_hidden_state.copy_(output.last_hidden_state.flip(1))

    policy = Policy(model, make_tokenizer())
    tokens = Tokenize(policy.tokenizer, policy.vocabulary)
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    groups = [tokens(make_group(record, "made")) for record in rollouts(model, length=4)]
    layout = layout_of(policy, "auto")
    check_behaviour(policy, groups, ESTIMATORS["cropi"], layout=layout)  # the head is measured once a model
    model.model.register_forward_hook(watch, with_kwargs=True)
    findings = []
    for mixes in (False, True):
        seen.clear()
        findings.append(check_behaviour(policy, groups, ESTIMATORS["cropi"], layout=layout))
        assert [shared for shared, _ in seen] == ([True, False] if mixes else [True])
    assert seen[0][1] < 0.75 * seen[1][1]
    for finding in findings:
        assert finding is not None and finding.level == "" and finding.median == pytest.approx(1.0, abs=1e-4)


WRONG: dict[str, tuple[Callable[[Any], list[dict[str, Any]]], str]] = {
    "raw beside 0.6": (
        lambda m: relabelled(scaled_to(m, rollouts(m, temperature=0.6), 1.0), 0.6),
        r"fit this policy at temperature 1 .*not at the stated temperature 0.6.*processed_logprobs",
    ),
    "no temperature": (
        lambda m: relabelled(rollouts(m, temperature=0.6), None),
        r"fit this policy at temperature 0.6\d* .*not at the stated temperature 1 .*--temperature 0.6",
    ),
    "wrong temperature": (
        lambda m: relabelled(rollouts(m, temperature=1.5), 0.7),
        r"fit this policy at temperature 1.5\d* .*stated temperature 0.7",
    ),
    "base 2": (lambda m: scaled(rollouts(m), 1 / math.log(2)), "logarithms to base 2: times 0.6931"),
    "base 10": (lambda m: scaled(rollouts(m), 1 / math.log(10)), "logarithms to base 10: times 2.3026"),
    "another model": (lambda m: rollouts(sharp(7)), "far from this policy's"),
    "too small": (lambda m: shifted(rollouts(m), -1.5), "more than 2 times the probability"),
}


@torch.no_grad()
def scaled_to(model: Any, records: list[dict[str, Any]], temperature: float) -> list[dict[str, Any]]:
    """The same tokens with the log-probs of another temperature."""
    made = []
    for r in records:
        ids = torch.tensor([r["prompt_ids"] + ids for ids in r["response_ids"]])
        begin = len(r["prompt_ids"])
        logp = (model(input_ids=ids).logits[:, begin - 1 : -1] / temperature).log_softmax(-1)
        values = logp.gather(2, ids[:, begin:, None])[..., 0].clamp(max=0.0)
        made.append(r | {"logprobs": values.tolist()})
    return made


def shifted(records: list[dict[str, Any]], by: float) -> list[dict[str, Any]]:
    return [r | {"logprobs": [[x + by for x in row] for row in r["logprobs"]]} for r in records]


def sharp(seed: int) -> Any:
    """Another random model, that is as sure of its tokens as trained ones are."""
    model = make_model(seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    return model


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_log_probs_are_named_before_a_store_is_made(tmp_path: Path, name: str) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    make, message = WRONG[name]
    records = make(model)
    with pytest.raises(CropiError, match=message):
        run(tmp_path, model, records)
    assert not (tmp_path / "s").exists()
    with pytest.warns(BehaviourMismatch, match=message):
        assert run(tmp_path, model, records, behaviour_check="warn").sketched == 6


@pytest.mark.long
def test_the_check_can_be_left_out_and_is_where_no_ratio_is(tmp_path: Path) -> None:
    records = scaled(rollouts(make_model()), 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BehaviourMismatch)
        for name, options in {"off": {"behaviour_check": "off"}, "current": {"behaviour": "current"}}.items():
            (tmp_path / name).mkdir()
            summary = run(tmp_path / name, make_model(), records, **options)
            assert summary.finding is None and summary.sketched == 6
    with pytest.raises(CropiError, match="behaviour_check"):
        SketchJob((), None, behaviour_check="no")


def test_a_policy_that_training_has_moved_passes_or_warns_by_how_far() -> None:
    """The bounds themselves, on made-up ratios with a mean of 1."""
    generator = torch.Generator().manual_seed(0)
    stored = -torch.rand(4000, generator=generator).double() * 3
    for spread, level in ((0.1, ""), (0.5, ""), (1.0, "warn"), (1.8, "error")):
        ratio = torch.exp(spread * torch.randn(4000, generator=generator) - spread**2 / 2).double()
        health = Health.of_ratios(ratio)
        own = stored + ratio.log()
        got = judge(stored, own, lambda t: stored * 9, [1.0], float(ratio.median()), health)
        assert got[0] == level, (spread, health.ess, got)
        # Of a lognormal ratio the effective sample size is exp(-spread^2).
        if spread <= 1:
            assert health.ess == pytest.approx(math.exp(-(spread**2)), rel=0.25)


def test_tokens_whose_ratio_overflows_do_not_hide_the_others(tmp_path: Path) -> None:
    records = scaled(rollouts(make_model()), 1 / math.log(2))
    records[0]["logprobs"][0][0] = -500.0
    with pytest.raises(CropiError, match="logarithms to base 2"):
        run(tmp_path, make_model(), records)


def test_a_signature_is_named_only_where_it_fits_much_better() -> None:
    generator = torch.Generator().manual_seed(1)
    own = -torch.rand(500, generator=generator).double() * 4
    noise = 0.3 * torch.randn(500, generator=generator).double()

    def policy(temperature: float | None) -> torch.Tensor:
        return own if temperature is None else own / temperature

    assert signature(own / 0.7, own, policy, [1.0]).startswith(
        "the stored log-probs fit this policy at temperature 0.7"
    )
    assert signature(own + noise, own, policy, [1.0]) == ""
    assert signature(own + 0.01 * noise, own, policy, [1.0]) == ""


def test_scores_hold_the_health_of_every_prompt_and_old_tables_are_read(tmp_path: Path) -> None:

    model = make_model()
    records = rollouts(model) + [
        {"id": "equal", "prompt_ids": [5], "response_ids": [[7], [8]], "rewards": [1.0, 1.0],
         "logprobs": [[-1.0], [-1.0]]}
    ]  # fmt: skip
    run(tmp_path, model, records)
    store = SketchStore.open(tmp_path / "s")
    scores = influence(store, [store])
    write_scores(tmp_path / "scores.parquet", scores)
    read = read_scores(tmp_path / "scores.parquet")
    for row, again in zip(scores.rows, read.rows, strict=True):
        assert again.extra == row.extra
        assert set(row.extra) == {"file"} | (set() if row.id == "equal" else {"ratio", "ess", "clipped"})


def test_token_ids_beyond_the_behaviour_models_vocabulary_are_named_before_the_job(tmp_path: Path) -> None:
    records = [
        {"id": "a", "prompt_ids": [5], "response_ids": [[96, 7], [8]], "rewards": [1.0, 0.0]},
    ]
    with pytest.raises(CropiError, match="token id 96 is beyond the behaviour model's vocabulary of 90"):
        run(tmp_path, make_model(), records, behaviour="model", behaviour_model=make_model(vocab_size=90))
    assert not (tmp_path / "s").exists()


@pytest.mark.long
def test_a_behaviour_model_that_has_the_policys_adapters_in_it_is_refused() -> None:
    """PEFT changes the model that it is given: every ratio would be 1, without a word."""
    peft = pytest.importorskip("peft")
    base, records = make_model(), make_records(6)
    copied = copy.deepcopy(base)
    policy = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    options: dict[str, Any] = {"dim": 512, "progress": False}
    with pytest.raises(
        CropiError, match="behaviour_model shares its weights with the policy, whose adapters"
    ):
        cropi.sketch(policy.eval(), records, make_tokenizer(), behaviour_model=base, **options)
    store = cropi.sketch(policy, records, make_tokenizer(), behaviour_model=copied, **options)
    assert all(abs(row.extra["ratio"] - 1) > 1e-4 for row in store.rows() if row.status == "ok")


@pytest.mark.long
def test_a_behaviour_model_that_is_trained_with_the_policy_is_refused() -> None:
    """A policy that is kept from before training in place holds the weights of after it: every ratio would be 1."""
    model, records = make_model(), make_records(6)
    before, copied = Policy(model), copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    same = copy.copy(model)
    assert same is not model and next(same.parameters()) is next(model.parameters())
    for behaviour in (before, model, same):
        with pytest.raises(CropiError, match="behaviour_model holds the very weights of the policy"):
            cropi.sketch(model, records, make_tokenizer(), behaviour_model=behaviour, dim=512, progress=False)
    options: dict[str, Any] = {"dim": 512, "progress": False}
    store = cropi.sketch(model, records, make_tokenizer(), behaviour_model=copied, **options)
    assert all(abs(row.extra["ratio"] - 1) > 1e-4 for row in store.rows() if row.status == "ok")
    with pytest.warns(EqualModels, match="the behaviour model's weights are those of the policy"):
        store = cropi.sketch(
            model, records, make_tokenizer(), behaviour_model=copy.deepcopy(model), **options
        )
    assert all(abs(row.extra["ratio"] - 1) < 1e-5 for row in store.rows() if row.status == "ok")
