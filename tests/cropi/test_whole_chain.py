"""From raw rollouts to chosen prompts, against the formulas of docs/method.md written out again in NumPy and float64.

Nothing of the package computes what is expected but the sketch of a gradient: objectives are differentiated by plain
autograd, one response at a time, and everything after the sketches is NumPy.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import stdtrit
from support.made_data import make_model
from support.oracle import OBJECTIVES, advantages, response_logprobs, sketch_of

import cropi
from cropi.errors import CropiError
from cropi.gradient.estimators import ESTIMATORS
from cropi.ranking.scores import Scores
from cropi.ranking.selection import select
from cropi.store.memory import MemoryStore
from cropi.store.rows import OK, SKIPPED, RowInfo
from cropi_kernels import SketchSpec

SPEC = SketchSpec(1024)
GIVEN: dict[str, Any] = dict(dim=SPEC.dim, behaviour_check="off", verify=False, progress=False)


# ------------------------------------------------------------------------------------------------------ rollouts
def rollouts(model: Any, count: int, seed: int, sets: int = 0) -> list[dict[str, Any]]:
    """Prompts with 3 to 6 responses, some of them equal, some with tokens of a tool; log-probs of a policy that is a
    little off, at a temperature of the prompt's own; graded rewards, which are equal for every fifth prompt."""
    rng, made = np.random.default_rng(seed), list[dict[str, Any]]()
    for i in range(count):
        prompt, temperature = (
            rng.integers(2, 30, rng.integers(2, 6)).tolist(),
            float(rng.choice([0.6, 1.0, 1.3])),
        )
        responses = [rng.integers(2, 30, rng.integers(1, 8)).tolist() for _ in range(rng.integers(3, 7))]
        responses[1] = list(responses[0]) if i % 4 == 1 else responses[1]
        masks = [[1] + rng.integers(0, 2, len(ids) - 1).tolist() for ids in responses]
        if i % 3 == 0:
            masks = [[1] * len(ids) for ids in responses]
        rewards = rng.choice([0.0, 0.25, 1.0], len(responses)).tolist() if i % 5 else [0.5] * len(responses)
        rewards[0] = rewards[0] if i % 5 == 0 or len(set(rewards)) > 1 else 0.75
        with torch.no_grad():
            now = [response_logprobs(model, prompt, ids, temperature).numpy() for ids in responses]
        before = [(p - 0.35 * rng.standard_normal(len(p))).clip(max=0.0).tolist() for p in now]
        made.append(
            {
                "id": f"{seed}-{i:03d}", "prompt_ids": prompt, "response_ids": responses, "rewards": rewards,
                "loss_mask": masks, "logprobs": before, "temperature": temperature, "task": "ab"[i % 2],
            }
        )  # fmt: skip
        if sets:
            made[-1]["set"] = f"set{i % sets}"
    return made


# ---------------------------------------------------------------------------------------------------- gradients
def exact(model: Any, records: list[dict[str, Any]], estimator: str) -> np.ndarray:
    """float64 [prompts, dim]; NaN without a gradient: all rewards are equal, or all tokens clipped."""
    made = np.full((len(records), SPEC.dim), np.nan)
    for row, record in zip(made, records, strict=True):
        if len(set(record["rewards"])) > 1:
            sketched = sketch_of(model, record, estimator, SPEC).numpy()
            row[:] = sketched if sketched.any() else np.nan
    return made


# -------------------------------------------------------------------------------------------- scores and choices
def against(train: np.ndarray, valid: np.ndarray, sets: list[str], **given: Any) -> np.ndarray:
    """The scores, float64 [prompts, sets]; ``minus`` is a set whose score is taken off."""
    cosine, columns = given.get("metric", "cosine") == "cosine", {}
    for name in sorted(set(sets)):
        rows = valid[[s == name for s in sets]]
        rows = rows[np.isfinite(rows).all(axis=1)]
        if given.get("aggregate") == "nearest":
            targets = rows
        elif given.get("mean") == "normalised":
            targets = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0)[None]
        else:
            targets = rows.mean(axis=0)[None]
        products = train @ targets.T
        if cosine:
            products = products / np.linalg.norm(train, axis=1)[:, None] / np.linalg.norm(targets, axis=1)
        columns[name] = products.max(axis=1)
    off = given.get("minus_weight", 1.0) * columns.pop(given["minus"]) if "minus" in given else 0.0
    return np.stack([column - off for column in columns.values()], axis=1)


def chosen(table: np.ndarray, rows: list[dict[str, Any]], fraction: float, **given: Any) -> list[str]:
    """The ids of the selection, best first."""
    method, usable = given.get("method", "rrf"), np.isfinite(table).all(axis=1)
    pool = [i for i in range(len(rows)) if usable[i] or given.get("pool", "all") == "all"]
    groups = [pool]
    if given.get("per") == "task":
        groups = [
            [i for i in pool if rows[i]["task"] == task] for task in sorted({row["task"] for row in rows})
        ]
    picked: list[tuple[float, float, str]] = []
    kept: list[int] = []
    for group in groups:
        n = int(len(group) * fraction + 1e-9)
        own = [i for i in group if usable[i]]
        value = dict.fromkeys(own, 0.0)
        for column in table.T:
            order = sorted(own, key=lambda i: (-column[i], rows[i]["id"]))
            for rank, i in enumerate(order, 1):
                if method == "rrf" and rank <= n:
                    value[i] += 1 / rank
                if method == "rrf_classic":
                    value[i] += 1 / (given.get("rrf_constant", 60) + rank)
        if method in ("max", "mean"):
            value = {i: float(getattr(table[i], method)()) for i in own}
        beyond = {i: -table[i].max() if method == "rrf" and not value[i] else 0.0 for i in own}
        ranked = sorted(own, key=lambda i: (-value[i], beyond[i], rows[i]["id"]))
        if "min_score" in given:
            ranked = [i for i in ranked if table[i].max() >= given["min_score"]]
        if "dedup" in given:
            ranked = distinct(ranked[:], n, kept, given["sketches"], given["dedup"])
        picked += [(-value[i], -table[i].max(), rows[i]["id"]) for i in ranked[:n]]
    return [name for _, _, name in (sorted(picked) if len(groups) > 1 else picked)]


def distinct(ranked: list[int], n: int, kept: list[int], sketches: np.ndarray, bound: float) -> list[int]:
    """The first ``n`` without near copies of a better one or of what other groups have ``kept``."""
    unit = sketches / np.linalg.norm(sketches, axis=1, keepdims=True)
    own: list[int] = []
    for i in ranked:
        if len(own) < n and all(unit[i] @ unit[j] <= bound for j in kept):
            own.append(i)
            kept.append(i)
    return own


# --------------------------------------------------------------------------------------------------------- tests
WAYS: tuple[dict[str, Any], ...] = (
    {}, {"metric": "dot"}, {"mean": "normalised"}, {"aggregate": "nearest"}, {"aggregate": "nearest", "metric": "dot"},
    {"minus": "set1", "minus_weight": 0.5}, {"metric": "dot", "mean": "normalised", "minus": "set0"},
)  # fmt: skip


@pytest.fixture(scope="module")
def world() -> tuple[Any, Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """A model, the same in float64, training and validation rollouts."""
    model = make_model()
    wide = copy.deepcopy(model).double()
    return model, wide, rollouts(wide, 14, 1), rollouts(wide, 9, 2, sets=2)


def health(model: Any, record: dict[str, Any], estimator: str) -> list[float]:
    """Mean ratio, effective sample size and clipped share of the scored tokens."""
    ratios, off = list[np.ndarray](), list[np.ndarray]()
    low, high = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28)}.get(estimator, (0.2, 0.2))
    signs = advantages(record["rewards"], OBJECTIVES[estimator][0])
    for ids, mask, before, a in zip(
        record["response_ids"], record["loss_mask"], record["logprobs"], signs, strict=True
    ):
        kept = np.array(mask, dtype=bool)
        with torch.no_grad():
            now = response_logprobs(model, record["prompt_ids"], ids, record["temperature"]).numpy()
        moved = (now - np.array(before))[kept]
        rho = np.exp(np.full(len(moved), moved.mean()) if estimator == "gspo" else moved)
        ratios.append(rho)
        off.append(rho > 1 + high if a > 0 else (rho < 1 - low) & (a < 0))
    rho = np.concatenate(ratios)
    return [rho.mean(), rho.sum() ** 2 / len(rho) / (rho**2).sum(), np.concatenate(off).mean()]


@pytest.mark.long
@pytest.mark.parametrize("estimator", sorted(OBJECTIVES.keys() - {"sft"}))
def test_from_rollouts_to_chosen_prompts(estimator: str, world: Any) -> None:
    model, wide, train, valid = world
    stores = [cropi.sketch(model, given, estimator=estimator, **GIVEN) for given in (train, valid)]
    right, plain = (exact(one, train, estimator) for one in (wide, model))
    lengths = np.linalg.norm(right, axis=1)
    usable = np.isfinite(lengths)
    made = {row.id: x.double().numpy() for rows, table in stores[0].shards() for row, x in zip(rows, table)}
    assert sorted(made) == [record["id"] for record, good in zip(train, usable) if good] and 8 < len(
        made
    ) < len(train)
    # At most twice the error of plain torch's float32 gradients.
    allowed = 2 * np.nanmax(np.linalg.norm(plain - right, axis=1) / lengths)
    for row, record, want, length in zip(stores[0].rows(), train, right, lengths, strict=True):
        assert row.pass_rate == np.mean(np.array(record["rewards"]) >= 0.5) and row.task == record["task"]
        if row.id in made:
            assert np.linalg.norm(made[row.id] - want) <= allowed * length
            assert (
                row.tokens == sum(map(sum, record["loss_mask"]))
                and abs(row.norm - length) <= allowed * length
            )
            if ESTIMATORS[estimator].clip_low is not None:
                found = [row.extra[name] for name in ("ratio", "ess", "clipped")]
                np.testing.assert_allclose(found, health(wide, record, estimator), rtol=2.0**-20)
    against_all = exact(wide, valid, estimator)
    for way in WAYS:
        scores = cropi.influence(stores[0], stores[1], draws=0, **way)
        table = against(right, against_all, [record["set"] for record in valid], **way)
        # Errors of both sides and of products in float32.
        np.testing.assert_allclose(scores.table, table, atol=3 * allowed * np.nanmax(np.abs(table)))
        for fraction, rule in ((0.3, {}), (0.5, {"per": "task", "method": "max"}), (0.2, {"method": "mean"})):
            assert select(scores, fraction=fraction, **rule).ids == chosen(table, train, fraction, **rule)
    lower = cropi.influence(stores[0], stores[1], draws=20)
    degrees = [
        sum(record["set"] == name and len(set(record["rewards"])) > 1 for record in valid) - 1
        for name in lower.sets
    ]
    table = lower.table - stdtrit(degrees, 0.8) * lower.stderr
    assert select(lower, fraction=0.3, confidence=0.8).ids == chosen(table, train, 0.3)


RULES: tuple[dict[str, Any], ...] = (
    {}, {"method": "rrf_classic"}, {"method": "rrf_classic", "rrf_constant": 3.0}, {"method": "max"},
    {"method": "mean"}, {"pool": "usable"}, {"per": "task"}, {"per": "task", "pool": "usable", "method": "max"},
    {"min_score": 0.2}, {"dedup": 0.95}, {"dedup": 0.95, "per": "task"},
    {"dedup": 0.95, "min_score": 0.0, "method": "mean"},
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_choices_from_any_table(rule: dict[str, Any]) -> None:
    """Ties, prompts without a score, copies, and pools of a few prompts."""
    rng, tried = np.random.default_rng(0), 0
    for trial in range(25):
        count = int(rng.integers(3, 40))
        names = sorted({f"{'pq'[int(rng.integers(2))]}{i}" for i in range(count)})
        rows = [{"id": name, "task": "abc"[int(rng.integers(3))]} for name in names]
        table = rng.standard_normal((count, int(rng.integers(1, 5))))
        table = np.round(2 * table) / 2 if trial % 3 == 0 else table
        missing = rng.random(count) < 0.2
        table[missing] = np.nan
        sketches = rng.standard_normal((count, 16))
        for i in range(1, count):
            sketches[i] = 2 * sketches[int(rng.integers(i))] if rng.random() < 0.3 else sketches[i]
        store = MemoryStore({"spec": {"dim": 16}})
        for row, vector, gone in zip(rows, torch.from_numpy(sketches).float(), missing, strict=True):
            status = (SKIPPED, "equal rewards") if gone else (OK, "")
            store.add(RowInfo(row["id"], *status, task=row["task"]), None if gone else vector)
        store.finish()
        given = {"sketches": sketches} if "dedup" in rule else {}
        want = chosen(table, rows, fraction := float(rng.choice([0.1, 0.3, 0.5, 1.0])), **rule, **given)
        scores = Scores(store.rows(), [f"set{v}" for v in range(table.shape[1])], table, {}, store=store)
        if want:
            assert select(scores, fraction=fraction, **rule).ids == want
            tried += 1
        else:
            with pytest.raises(CropiError, match="chooses none|no prompt has so high a score"):
                select(scores, fraction=fraction, **rule)
    assert tried > 15
