"""Sketches by groups of parameters: contributions held to exact gradients, and everything that stores go through."""

from __future__ import annotations

import copy
import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, save_policy, write_lines
from support.oracle import gradients_of, objective
from support.stores import sketches_of

import cropi
from cropi.cli import main
from cropi.errors import CropiError
from cropi.grouping import layer_groups
from cropi.options import Sketching
from cropi.ranking.contributions import lines, mean_contributions
from cropi.ranking.scores import Scores
from cropi.ranking.table import read_scores, write_scores
from cropi.store.merging import merge
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec, canonical_name
from cropi_kernels.testing import sketch_gradients

NAMED = {"attention": ["*self_attn*"], "mlp": ["*mlp*"], "others": ["rest"]}
GIVEN: dict[str, Any] = dict(dim=1024, progress=False)


def records(count: int, seed: int, sets: int = 0) -> list[dict[str, Any]]:
    draws = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for i in range(count):
        responses = [draws.integers(2, 30, size=draws.integers(2, 6)).tolist() for _ in range(3)]
        prompt = draws.integers(2, 30, size=4).tolist()
        made.append(
            {
                "id": f"{seed}-{i:03d}",
                "prompt_ids": prompt,
                "response_ids": responses,
                "rewards": [1.0, 0.0, 0.5],
            }
        )
        if sets:
            made[-1]["set"] = f"set{i % sets}"
    return made


TRAIN, VALID = records(7, 1), records(4, 2, sets=2)


def exact(model: Any, given: list[dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    """Every prompt's gradient in float64 by plain autograd, one response at a time."""
    wide = copy.deepcopy(model).double()
    return {record["id"]: gradients_of(wide, objective(wide, record)) for record in given}


def parts_of(names: list[str]) -> list[list[str]]:
    """The parameters of each of the groups `NAMED`."""
    attention, mlp = (fnmatch.filter(names, NAMED[name][0]) for name in ("attention", "mlp"))
    return [attention, mlp, [name for name in names if name not in (*attention, *mlp)]]


@pytest.mark.long
def test_contributions_are_those_of_exact_gradients_sketched_group_by_group() -> None:
    model = make_model()
    scores = cropi.score(model, TRAIN, VALID, eos=False, groups=NAMED, draws=0, **GIVEN)
    names = [canonical_name(name) for name, _ in model.named_parameters()]
    groups, spec = parts_of(names), SketchSpec(1024)

    def sketched(given: list[dict[str, Any]]) -> np.ndarray:
        """float64 [prompts, groups, dim]"""
        return np.stack([
            np.stack([
                sketch_gradients(model, g, spec, tuple(n for n in names if n not in own)).numpy() for own in groups
            ])
            for g in exact(model, given).values()
        ])  # fmt: skip

    train, valid = sketched(TRAIN), sketched(VALID)
    right = np.zeros((len(train), 2, 3))
    for v in range(2):
        mean = valid[v::2].mean(axis=0)
        lengths = np.linalg.norm(train.reshape(len(train), -1), axis=1) * np.linalg.norm(mean)
        right[:, v] = np.einsum("ngd,gd->ng", train, mean) / lengths[:, None]
    assert list(scores.groups) == list(NAMED) and scores.contributions is not None
    np.testing.assert_allclose(scores.contributions, right, atol=2e-5)
    np.testing.assert_allclose(scores.contributions.sum(axis=2), scores.table, atol=1e-6)
    assert (np.abs(right).max(axis=(0, 1)) > 1e-2).all()  # every group has a part
    dots = cropi.score(model, TRAIN, VALID, eos=False, groups=NAMED, draws=0, metric="dot", **GIVEN)
    means = np.stack([valid[v::2].mean(axis=0) for v in range(2)])
    by_hand = np.einsum("ngd,vgd->nvg", train, means)
    np.testing.assert_allclose(dots.contributions, by_hand, atol=2e-5 * np.abs(by_hand).max())
    less = cropi.score(
        model, TRAIN, VALID, eos=False, groups=NAMED, draws=0, minus="set1", minus_weight=0.5, **GIVEN
    )
    assert less.contributions is not None
    np.testing.assert_allclose(less.contributions[:, 0], right[:, 0] - 0.5 * right[:, 1], atol=3e-5)


def test_the_groups_add_up_to_the_sketch_of_all_parameters() -> None:
    model = make_model()
    whole = sketches_of(cropi.sketch(model, TRAIN, **GIVEN))
    for how in ({"layer_groups": 2}, {"groups": ["attention=*self_attn*", "others=rest"]}):
        store = cropi.sketch(model, TRAIN, **how, **GIVEN)
        assert store.dim == len(store.groups) * 1024
        for name, row in sketches_of(store).items():
            parts = row.view(len(store.groups), 1024)
            # 32 numbers of the accumulator are added to one of 1024, in two orders.
            assert float((parts.sum(0) - whole[name]).abs().max()) <= 2.0**-24 * 40 * float(
                parts.abs().sum(0).max()
            )


def test_scaled_gradients_have_the_same_groups() -> None:
    model = make_model()
    made = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.arange(2, 14)[None], labels=torch.arange(2, 14)[None]).loss.backward()
    made.step()
    made.zero_grad()
    whole = sketches_of(cropi.sketch(model, VALID, optimizer_state=made, **GIVEN))
    for name, row in sketches_of(
        cropi.sketch(model, VALID, optimizer_state=made, groups=NAMED, **GIVEN)
    ).items():
        assert float((row.view(3, 1024).sum(0) - whole[name]).norm()) <= 1e-5 * float(whole[name].norm())


def test_groups_of_layers_follow_the_model() -> None:
    stems = [f"h.{i}.{part}.weight" for i in range(5) for part in ("attn", "experts.3.up")]
    names = ["wte.weight", "wpe.weight", *stems, "ln_f.weight"]
    made = layer_groups(names, 2)
    assert list(made) == ["embeddings", "layers 0-1", "layers 2-4", "head"]
    assert made["embeddings"] == ["wte.weight", "wpe.weight"] and made["head"] == ["ln_f.weight"]
    assert made["layers 2-4"] == ["h.2.*", "h.3.*", "h.4.*"]
    adapters = layer_groups([f"model.layers.{i}.q.lora_A.weight" for i in (3, 4)], 2)
    assert list(adapters) == ["layer 3", "layer 4"]
    with pytest.raises(CropiError, match=r"layer_groups=6: 5 layers are sketched \(h\.\.\.\.\)"):
        layer_groups(names, 6)
    with pytest.raises(CropiError, match="no parameter's name holds the number of a layer .e.g. wte.weight."):
        layer_groups(names[:2], 1)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4", "int1"])
def test_every_store_dtype_keeps_the_sum(dtype: str) -> None:
    """Blocks with one scale (64 numbers of a group, 128 of two) may lie in two groups."""
    model, how = (
        make_model(),
        dict(groups=NAMED, dim=64, width=16, vocab_width=64, store_dtype=dtype, progress=False),
    )
    train, valid = (cropi.sketch(model, given, **how) for given in (TRAIN, VALID))
    scores = cropi.influence(train, valid, draws=0)
    assert scores.contributions is not None
    np.testing.assert_allclose(scores.contributions.sum(axis=2), scores.table, atol=1e-6)
    rows, mean = (
        sketches_of(train),
        torch.stack([x for i, x in enumerate(sketches_of(valid).values()) if i % 2 == 0]).mean(0),
    )
    for row, parts in zip(scores.rows, scores.contributions[:, 0]):
        x = rows[row.id].double()
        right = (x * mean).view(3, 64).sum(1) / (x.norm() * mean.double().norm())
        np.testing.assert_allclose(parts, right.numpy(), atol=1e-6)


def killed_after(rows: int, out: Path, given: dict[str, Any]) -> None:
    add = SketchStore.add

    def stopping(store: SketchStore, *row: Any) -> list[str]:
        if len(store) + len(store._pending) >= rows:
            raise KeyboardInterrupt
        return add(store, *row)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SketchStore, "add", stopping)
        cropi.sketch(make_model(), TRAIN, out=out, **given)


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_with_equal_bits_and_shares_merge(tmp_path: Path) -> None:
    given = GIVEN | {"layer_groups": 2, "tokens_per_batch": 32}
    killed_after(3, tmp_path / "cut", given)
    assert len(SketchStore.open(tmp_path / "cut")) == 3
    again = cropi.sketch(make_model(), TRAIN, out=tmp_path / "cut", **given)
    whole = cropi.sketch(make_model(), TRAIN, out=tmp_path / "whole", **given)
    assert sketches_of(again).keys() == sketches_of(whole).keys() == {record["id"] for record in TRAIN}
    assert all(torch.equal(sketches_of(again)[name], row) for name, row in sketches_of(whole).items())
    halves = [
        cropi.sketch(make_model(), TRAIN[a:b], out=tmp_path / f"h{a}", **given) for a, b in ((0, 3), (3, 7))
    ]
    merged = merge(tmp_path / "merged", halves)
    assert merged.groups == whole.groups and merged.verify() > 0
    valid = cropi.sketch(make_model(), VALID, **given)
    one, two = (cropi.influence(store, valid) for store in (whole, merged))
    np.testing.assert_allclose(one.contributions, two.contributions, atol=1e-5)


@pytest.mark.long
def test_stores_of_other_groups_are_refused(tmp_path: Path) -> None:
    model = make_model()
    made = {
        name: cropi.sketch(model, TRAIN, out=tmp_path / name, **how, **GIVEN)
        for name, how in {
            "plain": {}, "two": {"layer_groups": 2}, "one": {"layer_groups": 1}, "named": {"groups": NAMED},
            "turned": {"groups": dict(reversed(NAMED.items()))},
        }.items()
    }  # fmt: skip
    for a, b in (("plain", "two"), ("two", "plain"), ("two", "one"), ("named", "turned")):
        with pytest.raises(CropiError, match=f"{a} and .*{b} cannot be compared: groups = "):
            cropi.influence(made[a], made[b])
        with pytest.raises(CropiError, match="cannot be compared: groups = "):
            SketchStore.join([made[a], made[b]])
    with pytest.raises(CropiError, match="two was made with groups = .* but this run has None"):
        cropi.sketch(model, TRAIN, out=tmp_path / "two", **GIVEN)


@pytest.mark.long
def test_the_table_the_page_and_the_command_line_show_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_policy(tmp_path / "model")
    train, valid = (
        write_lines(tmp_path / f"{n}.jsonl", given) for n, given in (("train", TRAIN), ("valid", VALID))
    )
    out = tmp_path / "out"
    line = (
        f"run --model {tmp_path}/model --train {train} --valid {valid} --out {out} --fraction 0.3 --no-eos "
    )
    assert main([*line.split(), "--dim", "1024", "--layer-groups", "2", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    scores = read_scores(out / "scores.parquet")
    assert (
        list(scores.groups) == ["embeddings", "layer 0", "layer 1", "head"]
        and scores.contributions is not None
    )
    np.testing.assert_allclose(scores.contributions.sum(axis=2), scores.table, atol=1e-6)
    names = [f"contribution[{name}][{group}]" for name in scores.sets for group in scores.groups]
    frame = scores.to_pandas()
    assert [name for name in frame.columns if name.startswith("contribution")] == names
    np.testing.assert_array_equal(frame[names].to_numpy(), scores.contributions.reshape(len(scores), -1))
    chosen = [i for i, row in enumerate(scores.rows) if row.id in cropi.select(scores, 0.3).ids]
    pool, some = mean_contributions(scores, chosen)
    shown = lines(scores, chosen)
    assert all(f"groups        {one}" in printed for one in shown) and "layer 0 " in shown[0]
    words = f"select --scores {out}/scores.parquet --out {tmp_path}/ids.jsonl --fraction 0.3"
    assert main(words.split()) == 0
    alone = capsys.readouterr().out
    assert [line for line in alone.splitlines() if line.startswith("groups")] == [
        f"groups        {one}" for one in shown
    ]
    page = (out / "report.html").read_text("utf-8")
    for v in range(2):
        assert all(f"<td>{value:.4f}</td>" in page for value in (*pool[v], *some[v]))
        assert f"<td>{(some - pool)[v].sum():+.4f}</td>" in page
    np.testing.assert_allclose(
        (some - pool).sum(axis=1), scores.table[chosen].mean(axis=0) - scores.table.mean(axis=0), atol=1e-6
    )
    assert "--layer-groups 2" in page and 'id="groups"' in page
    stores = f"--train {out}/sketches/train --valid {out}/sketches/valid --out {tmp_path}/s.parquet"
    assert main(["influence", *stores.split()]) == 0
    assert "contribution[SET][GROUP] in the table" in capsys.readouterr().out
    assert main(["influence", *stores.split(), "--aggregate", "nearest"]) == 0
    assert "no contributions: with --aggregate nearest" in capsys.readouterr().out
    assert read_scores(tmp_path / "s.parquet").contributions is None


def test_a_table_without_groups_is_as_it_was(tmp_path: Path) -> None:
    scores = cropi.score(make_model(), TRAIN, VALID, draws=0, **GIVEN)
    assert scores.contributions is None and not scores.groups and "groups" not in scores.meta
    write_scores(tmp_path / "s.parquet", scores)
    found = read_scores(tmp_path / "s.parquet")
    assert isinstance(found, Scores) and found.contributions is None
    assert not any(name.startswith("contribution") for name in found.to_pandas().columns)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_groups": 0}, "layer_groups must be at least 1, got 0"),
        ({"layer_groups": "2"}, "layer_groups must be an integer or None, got '2'"),
        ({"layer_groups": 2, "groups": ["a=*"]}, "layer_groups is 2 and groups are named: give one of both"),
        ({"groups": "mlp=*mlp*"}, "groups must be a list .* got 'mlp=.mlp.'"),
        ({"groups": ["*mlp*"]}, "groups: '.mlp.' is not NAME=PATTERN,PATTERN"),
        ({"groups": ["mlp="]}, "groups: 'mlp=' is not NAME=PATTERN,PATTERN"),
        ({"groups": ["a=*mlp*", "a=*attn*"]}, "groups name 'a' twice"),
        ({"groups": {"a": "*mlp*"}}, "groups: 'a' has '.mlp.': give a list of patterns"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CropiError, match=message):
        Sketching(**given)


def test_groups_that_do_not_fit_the_model_are_refused_before_a_store_is_made(tmp_path: Path) -> None:
    for given, message in (
        ({"layer_groups": 3}, "layer_groups=3: 2 layers are sketched"),
        (
            {"groups": {"mlp": ["*mlp*"]}},
            "none has model.embed_tokens.weight, .* add patterns, or a group with",
        ),
        ({"groups": ["mlp=*mpl*", "others=rest"]}, "'.mpl.' of 'mlp' matches no parameter"),
        (
            {"groups": ["mlp=*mlp*", "up=*up_proj*"]},
            "'mlp' and 'up' both have model.layers.0.mlp.up_proj.weight",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cropi.sketch(make_model(), TRAIN, out=tmp_path / "out", **given, **GIVEN)
        assert not (tmp_path / "out").exists()
    with pytest.raises(CropiError, match="the sketch of all parameters is checked; leave them out here"):
        cropi.check(make_model(), TRAIN, n=4, layer_groups=2, **GIVEN)
