"""Influence and selection against examples worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import json_lines
from support.made_data import write_lines

from cropi.cli.select import best_and_worst, prompt_texts
from cropi.errors import CropiError
from cropi.options import Influence
from cropi.ranking import selection_files
from cropi.ranking.influence import influence, score_rows
from cropi.ranking.members import left_out, validation_means
from cropi.ranking.plot import _labels as labels_of
from cropi.ranking.plot import plot_scores
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection, select
from cropi.ranking.selection_files import CopiedPrompts, write_selected_records, write_selection
from cropi.ranking.table import read_scores, write_scores
from cropi.ranking.values import fuse_ranks
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore

MANIFEST: dict[str, Any] = {
    "spec": {"dim": 2}, "hash_version": 1, "stage": "0", "model": {"dtype": "float32", "weights": "aa"},
    "parameters": {"covered": 2, "total": 2, "excluded": []}, "dtype": "float32",
}  # fmt: skip
Sketches = dict[str, tuple[str, tuple[float, float] | None]]


def make_store(path: Path, prompts: Sketches, **changes: Any) -> SketchStore:
    """A store of plane vectors, two to a shard; None is a prompt skipped for equal rewards."""
    with SketchStore.create(path, MANIFEST | changes, shard_rows=2) as store:
        for name, (set_name, values) in prompts.items():
            if values is None:
                store.add(RowInfo(name, "skipped", "equal rewards", set=set_name))
            else:
                store.add(RowInfo(name, set=set_name), torch.tensor(values))
    return SketchStore.open(path)


TRAIN: Sketches = {
    "a": ("train", (3.0, 4.0)), "b": ("train", (0.0, 2.0)), "c": ("train", None), "d": ("train", (-1.0, 0.0)),
}  # fmt: skip
VALID: Sketches = {
    "x1": ("x", (2.0, 0.0)), "x2": ("x", (4.0, 0.0)), "x3": ("x", None), "y1": ("y", (0.0, 1.0)),
    "y2": ("y", (0.0, 5.0)),
}  # fmt: skip


def test_scores_by_hand(tmp_path: Path) -> None:
    train, valid = make_store(tmp_path / "t", TRAIN), make_store(tmp_path / "v", VALID)
    cosine = influence(train, [valid])
    assert (cosine.ids, cosine.sets) == (["a", "b", "c", "d"], ["x", "y"])
    np.testing.assert_allclose(cosine.table, [[0.6, 0.8], [0, 1], [math.nan] * 2, [-1, 0]], atol=1e-12)
    assert cosine.usable.tolist() == [True, True, False, True]
    dot = influence(train, [valid], metric="dot")  # means (3, 0) and (0, 3)
    np.testing.assert_allclose(dot.table, [[9, 12], [0, 6], [math.nan] * 2, [-3, 0]], atol=1e-12)


def test_scores_of_tensors_and_what_does_not_fit() -> None:
    rows, means = (
        torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([0.0, 2.0])},
    )
    np.testing.assert_allclose(score_rows(rows, means), [[0.6, 0.8], [math.nan] * 2])
    np.testing.assert_allclose(score_rows(rows, means, metric="dot"), [[9, 8], [0, 0]])
    info = [RowInfo("a"), RowInfo("b")]
    assert select(Scores(info, ["x", "y"], score_rows(rows, means), {}), fraction=0.5).chosen == [0]
    for call, named in (
        (lambda: score_rows(rows[0], means), r"sketches has shape \[2\]: give \[prompts, dim\]"),
        (lambda: score_rows(rows, {"x": torch.zeros(3)}), r"means\['x'\] has shape \[3\]: give \[2\]"),
        (
            lambda: score_rows(rows, rows[0]),
            "means is a Tensor: give a dict with the mean of every validation",
        ),
        (lambda: score_rows(rows, {}), "means is empty: give a dict"),
        (lambda: score_rows(rows.numpy(), means), r"sketches is an ndarray: give a tensor \[prompts, dim\]"),
        (lambda: score_rows(rows, means, metric="l2"), "metric must be one of cosine, dot, got 'l2'"),
        (lambda: Scores(info, ["x"], np.zeros((2, 2)), {}), r"give a numpy array \[2, 1\]"),
        (lambda: Scores(info, ["x"], rows[:, :1], {}), "table is a Tensor"),
        (lambda: influence(rows, [rows]), "a SketchStore is needed, got Tensor; score_rows takes tensors"),
        (lambda: fuse_ranks(np.zeros((3, 1)), ["a"], 1), r"table has shape \[3, 1\]: give \[1, sets\]"),
    ):
        with pytest.raises(CropiError, match=named):
            call()


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_equal_sketches_have_equal_scores_wherever_they_stand(metric: str) -> None:
    """The order among equal prompts is that of their ids, so not even the last bit may depend on the shard."""
    row = torch.randn(1, 4096)
    for sets in (1, 2, 3):
        means = {f"s{i}": torch.randn(4096) for i in range(sets)}
        alone = score_rows(row, means, metric=metric)
        for count in (2, 3, 5, 7, 8, 13, 64):
            scores = score_rows(row.repeat(count, 1), means, metric=metric)
            np.testing.assert_array_equal(scores, alone.repeat(count, axis=0))


def test_a_prompt_without_a_score_for_every_set_is_never_chosen() -> None:
    rows = [RowInfo("a"), RowInfo("b"), RowInfo("c")]
    scores = Scores(rows, ["x", "y"], np.array([[9.0, math.nan], [math.inf, 1.0], [0.0, 0.0]]), {})
    assert scores.usable.tolist() == [False, False, True]
    for method in ("rrf", "max", "random"):
        assert select(scores, fraction=1.0, method=method).chosen == [2]


def test_plain_and_normalised_means_differ_as_they_should(tmp_path: Path) -> None:
    valid = make_store(tmp_path / "v", {"p": ("v", (10.0, 0.0)), "q": ("v", (0.0, 1.0))})
    assert validation_means([valid])["v"].tolist() == [5.0, 0.5]
    assert validation_means([valid], Influence(mean="normalised"))["v"].tolist() == [0.5, 0.5]


def test_sets_may_be_spread_over_stores_and_capped(tmp_path: Path) -> None:
    one = make_store(tmp_path / "1", {f"p{i}": ("v", (float(i), 1.0)) for i in range(6)})
    two = make_store(tmp_path / "2", {f"q{i}": ("v", (float(i + 6), 1.0)) for i in range(6)})
    assert validation_means([one, two])["v"].tolist() == [5.5, 1.0]
    capped = {
        seed: validation_means([one, two], Influence(max_valid=3, valid_seed=seed))["v"].tolist()
        for seed in range(5)
    }
    assert all(mean[1] == 1.0 for mean in capped.values()) and len({mean[0] for mean in capped.values()}) > 1
    assert validation_means([one, two], Influence(max_valid=3))["v"].tolist() == capped[0]
    assert validation_means([one, two], Influence(max_valid=12))["v"].tolist() == [5.5, 1.0]


def test_max_valid_draws_any_prompts_and_no_neighbours(tmp_path: Path) -> None:
    one = make_store(tmp_path / "1", {f"p{i}": ("v", (2.0**i, 1.0)) for i in range(6)})
    two = make_store(tmp_path / "2", {f"q{i}": ("v", (2.0 ** (i + 6), 1.0)) for i in range(6)})
    means = [
        validation_means([one, two], Influence(max_valid=3, valid_seed=seed))["v"] for seed in range(200)
    ]
    drawn = [round(3 * float(mean[0])) for mean in means]  # a bit per prompt
    assert {bits.bit_count() for bits in drawn} == {3}, "without replacement"
    # 200 draws of 220 sets are about 131 different ones; runs of neighbours are 10.
    assert len(set(drawn)) > 90
    # Each prompt is drawn 50 times in the mean, with a standard deviation of 6.
    assert all(20 < sum(bits >> i & 1 for bits in drawn) < 80 for i in range(12))


def test_bad_comparisons_are_refused(tmp_path: Path) -> None:
    train = make_store(tmp_path / "t", TRAIN)
    with pytest.raises(CropiError, match="'y' has no usable prompt: 2 were left out .equal rewards."):
        influence(
            train,
            [make_store(tmp_path / "v1", {"x": ("x", (1.0, 0.0)), "y1": ("y", None), "y2": ("y", None)})],
        )
    both = "3 were left out (equal rewards, one response); give prompts that are solved sometimes and several responses"
    assert left_out(["one response", "equal rewards", "one response"]).startswith(both)
    with pytest.raises(CropiError, match="'x': the mean of its gradients is zero"):
        influence(train, [make_store(tmp_path / "v2", {"p": ("x", (1.0, 0.0)), "q": ("x", (-1.0, 0.0))})])
    for number, (change, named) in enumerate([
        ({"stage": "1"}, "stage = '0' in the first, '1' in the second"),
        ({"model": {"dtype": "float32", "weights": "bb"}}, "model.weights = 'aa' in the first, 'bb' in the second"),
        ({"spec": {"dim": 2, "seed": 1}}, "spec.seed = None in the first, 1 in the second"),
        ({"parameters": {"covered": 1, "total": 2, "excluded": []}}, "parameters.covered = 2 in the first, 1"),
    ]):  # fmt: skip
        with pytest.raises(CropiError, match=named):
            influence(train, [make_store(tmp_path / f"w{number}", VALID, **change)])
    valid = make_store(tmp_path / "v", VALID)
    for options, named in (({"metric": "l2"}, "metric must be"), ({"mean": "median"}, "mean must be")):
        with pytest.raises(CropiError, match=named):
            influence(train, [valid], **options)
    with pytest.raises(CropiError, match="no training prompt has a usable sketch"):
        influence(make_store(tmp_path / "n", {"c": ("train", None)}), [valid])


def test_score_table_comes_back(tmp_path: Path) -> None:
    scores = influence(make_store(tmp_path / "t", TRAIN), [make_store(tmp_path / "v", VALID)])
    write_scores(tmp_path / "scores.parquet", scores)
    again = read_scores(tmp_path / "scores.parquet")
    assert again.ids == scores.ids and again.sets == scores.sets and again.meta == scores.meta
    np.testing.assert_array_equal(again.table, scores.table)
    assert again.rows[2].status == "skipped" and again.rows[2].reason == "equal rewards"
    with pytest.raises(CropiError, match="there is no such score table"):
        read_scores(tmp_path / "none.parquet")
    with pytest.raises(CropiError, match=r"is a folder; its score table is .*scores.parquet: give that"):
        read_scores(tmp_path)
    (tmp_path / "bad.parquet").write_text("x")
    with pytest.raises(CropiError, match="is not a score table"):
        read_scores(tmp_path / "bad.parquet")


def make_scores(
    table: list[list[float]], rates: list[float] | None = None, names: str = "abcdefghij"
) -> Scores:
    count = len(table)
    rows = [RowInfo(names[i], pass_rate=(rates or [0.5] * count)[i]) for i in range(count)]
    meta = {"metric": "cosine", "train": {"stage": "0", "model": {"weights": "aa"}}}
    return Scores(rows, ["x", "y"], np.array(table), meta)


# Ten prompts, n = 3. L_x = a (1), b (2), c (3); L_y = d (1), b (2), e (3).
# fused: a 1, d 1, b 1/2 + 1/2 = 1, c 1/3, e 1/3, others 0. The three best are a, b, d.
TEN = [
    [0.9, 0.0], [0.8, 0.8], [0.7, 0.1], [0.1, 0.9], [0.0, 0.7],
    [0.6, 0.6], [0.2, 0.2], [0.3, 0.3], [-0.1, 0.4], [-0.5, -0.5],
]  # fmt: skip


def test_reciprocal_rank_fusion_by_hand() -> None:
    fused = fuse_ranks(np.array(TEN), list("abcdefghij"), 3)
    np.testing.assert_allclose(fused, [1, 1, 1 / 3, 1, 1 / 3, 0, 0, 0, 0, 0])
    chosen = select(make_scores(TEN), fraction=0.3)
    assert [("abcdefghij")[i] for i in chosen.chosen] == ["a", "b", "d"]
    assert [("abcdefghij")[i] for i in chosen.order] == list("abdcefihgj"), (
        "beyond the lists, by the highest score"
    )
    best = select(make_scores(TEN), fraction=0.3, method="max")
    assert [("abcdefghij")[i] for i in best.chosen] == ["a", "d", "b"]


def test_equal_scores_go_by_id_whatever_the_order_of_rows() -> None:
    equal = [[1.0, 1.0]] * 10
    for names in ("abcdefghij", "jihgfedcba", "cabdhgfeji"):
        for method in ("rrf", "max"):
            scores = make_scores(equal, names=names)
            assert [names[i] for i in select(scores, fraction=0.2, method=method).chosen] == ["a", "b"]


def test_prompts_without_a_gradient_count_in_the_pool_but_are_never_chosen() -> None:
    table = [[math.nan, math.nan]] * 5 + [[0.1 * i, 0.0] for i in range(5)]
    for method in ("rrf", "max", "random", "learnability", "pass_rate"):
        chosen = select(make_scores(table), fraction=0.4, method=method).chosen
        assert len(chosen) == 4 and min(chosen) >= 5, method
        assert len(select(make_scores(table), fraction=0.4, method=method, pool="usable").chosen) == 2
        assert len(select(make_scores(table), fraction=1.0, method=method).chosen) == 5


def test_size_of_the_selection_is_the_rounded_down_share() -> None:
    table = [[float(i), 0.0] for i in range(100)]
    names = [f"{i:03d}" for i in range(100)]
    scores = Scores([RowInfo(name) for name in names], ["x", "y"], np.array(table), {})
    for fraction, n in ((0.1, 10), (0.29, 29), (0.299, 29), (0.57, 57), (1.0, 100)):
        assert len(select(scores, fraction=fraction).chosen) == n
    with pytest.raises(CropiError, match="fraction 0.009 of a pool of 100 prompts chooses none"):
        select(scores, fraction=0.009)
    for fraction in (0.0, 1.5, -0.1, math.nan):
        with pytest.raises(CropiError, match="fraction must be (in|a finite number)"):
            select(scores, fraction=fraction)
    with pytest.raises(CropiError, match="method must be one of"):
        select(scores, method="best")


def test_baselines_follow_the_pass_rate_and_the_seed() -> None:
    rates = [0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.875, 1.0, 0.5]
    scores = make_scores(TEN, rates)
    learn = select(scores, fraction=0.3, method="learnability").chosen
    assert set(learn[:2]) == {4, 9} and learn[2] in (3, 5)  # 0.25, 0.25, then 0.24 twice
    assert select(scores, fraction=0.3, method="pass_rate").chosen == [8, 7, 6]
    draws = {tuple(select(scores, fraction=0.3, method="random", seed=seed).chosen) for seed in range(10)}
    assert (
        len(draws) > 5
        and select(scores, method="random", seed=3).chosen == select(scores, method="random", seed=3).chosen
    )
    assert (
        len({select(scores, fraction=0.3, method="learnability", seed=seed).chosen[2] for seed in range(20)})
        == 2
    )


def test_learnability_draws_between_mirrored_pass_rates() -> None:
    """p and 1 - p are equally learnable; with 5 responses the two products differ by a rounding."""
    names = [f"{kind}{i:03d}" for kind in ("easy", "hard") for i in range(100)]
    rows = [RowInfo(name, pass_rate=0.8 if name.startswith("easy") else 0.2) for name in names]
    scores = Scores(rows, ["x"], np.zeros((200, 1)), {})
    chosen = select(scores, fraction=0.5, method="learnability").chosen
    easy = sum(i < 100 for i in chosen)
    assert 25 < easy < 75, "of 100 drawn from 100 and 100: mean 50, standard deviation 3.5"


@pytest.mark.parametrize("part", [2, 4096])
def test_lines_of_a_selection_are_what_json_writes_of_each(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts with what forms and lines are made of, and numbers that only Python has; checksums of sorted keys."""
    monkeypatch.setattr(selection_files, "_PART", part)
    names = ["%s", "a\nb", '"{0}"\\', "é\u2028", "100 %d"]
    sets = ["z %", "a{1}", "Ω"]
    table = np.array(
        [[0.1, 1e-9, 3.0], [1e300, math.inf, -0.0], [math.nan, 0.25, 1 / 3], [1, 2, 3], [0, 0, 1e16]]
    )
    model = {"weights": {"b": "%s", "a": ["{}", None]}}
    scores = Scores(
        [RowInfo(name, pass_rate=0.5) for name in names],
        sets,
        table,
        {"train": {"stage": "%", "model": model}},
    )
    chosen = Selection(
        [4, 1, 0, 2, 3], [4, 1, 0, 2, 3], np.array([0.5, 2, math.nan, 1e-7, 9]), "100 %", scores, {}
    )
    write_selection(tmp_path / "selected.jsonl", scores, chosen)
    lines = (tmp_path / "selected.jsonl").read_bytes().decode().split("\n")
    assert lines.pop() == "" and len(lines) == 5
    for rank, (i, line) in enumerate(zip(chosen.chosen, lines, strict=True), 1):
        row = {
            "id": names[i], "rank": rank, "fused": float(chosen.fused[i]), "method": "100 %",
            "scores": dict(zip(sets, table[i].tolist(), strict=True)), "stage": "%", "model": model["weights"],
        }  # fmt: skip
        check = f"{zlib.crc32(json.dumps(row, sort_keys=True).encode()):08x}"
        assert line == json.dumps(row | {"check": check}, ensure_ascii=False)
    write_selection(tmp_path / "none.jsonl", scores, replace(chosen, chosen=[]))
    assert (tmp_path / "none.jsonl").read_bytes() == b""


@pytest.mark.long
def test_written_selection_table_and_plot(tmp_path: Path) -> None:
    scores = make_scores(TEN)
    chosen = select(scores, fraction=0.3)
    write_selection(tmp_path / "selected.jsonl", scores, chosen)
    lines = json_lines(tmp_path / "selected.jsonl")
    assert [(line["id"], line["rank"], line["fused"]) for line in lines] == [
        ("a", 1, 1.0),
        ("b", 2, 1.0),
        ("d", 3, 1.0),
    ]
    assert (
        lines[0]["scores"] == {"x": 0.9, "y": 0.0} and lines[0]["stage"] == "0" and lines[0]["model"] == "aa"
    )

    records = [
        {"id": name, "prompt": name, "responses": ["1", "2"], "rewards": [1, 0], "level": name}
        for name in "dbaz"
    ]
    pool = tmp_path / "pool.jsonl"
    write_lines(pool, records)
    write_selected_records(tmp_path / "chosen.jsonl", [pool], scores, chosen)
    assert json_lines(tmp_path / "chosen.jsonl") == [
        records[2], records[1], records[0],
    ]  # fmt: skip
    copied = [record | {"prompt": "d"} if record["id"] in "db" else record for record in records]
    pool.write_text("".join(json.dumps(record) + "\n" for record in copied))
    with pytest.warns(
        CopiedPrompts, match="1 of the 3 chosen prompts are exact copies of another chosen one"
    ):
        write_selected_records(tmp_path / "copies.jsonl", [pool], scores, chosen)
    pool.write_text("".join(json.dumps(record | {"answer": record["id"]}) + "\n" for record in copied))
    write_selected_records(tmp_path / "others.jsonl", [pool], scores, chosen)
    pool.write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(CropiError, match="2 selected prompts are not in .*for example 'a'"):
        write_selected_records(tmp_path / "none.jsonl", [pool], scores, chosen)
    assert not (tmp_path / "none.jsonl").exists()

    text = best_and_worst(scores, chosen, count=2, texts={"a": "1+1="}).splitlines()
    assert [line.split()[:2] for line in text[1:]] == [
        ["1", "a"],
        ["2", "b"],
        ["..."],
        ["9", "g"],
        ["10", "j"],
    ]
    assert text[1].endswith("1+1=") and len(best_and_worst(scores, chosen, count=50).splitlines()) == 11
    eighth = replace(scores, rows=[replace(row, pass_rate=1 / 8) for row in scores.rows])
    assert best_and_worst(eighth, chosen, count=1).splitlines()[1].split()[3] == "0.13", "as on the page"
    begun = [{"id": name, "prompt": f"<system>\n{'Be helpful. ' * 9}<user>\n{name} + 1"} for name in "abc"]
    texts = prompt_texts([row | {"responses": ["2", "3"], "rewards": [1, 0]} for row in begun], ["a", "b"])
    assert texts == {"a": "...a + 1", "b": "...b + 1"}
    long = replace(scores, rows=[replace(row, id=row.id + 4000 * "x") for row in scores.rows])
    assert max(map(len, best_and_worst(long, chosen, count=2).splitlines())) < 200
    wide = replace(
        scores, rows=[replace(row, task="\u6570\u5b66" if row.id in "ag" else "sums") for row in scores.rows]
    )
    first, second = best_and_worst(wide, chosen, count=2).splitlines()[1:3]
    assert first.index("0.") + 2 == second.index("0.") and "\u6570\u5b66  " in first, "two columns a letter"
    plot_scores(tmp_path / "scores.png", scores, chosen)
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
    plot_scores(tmp_path / "scores.pdf", scores, chosen)
    assert (tmp_path / "scores.pdf").read_bytes()[:4] == b"%PDF"
    with pytest.raises(CropiError, match="scores.txt should end in one of .png, .pdf, .svg"):
        plot_scores(tmp_path / "scores.txt", scores, chosen)


@pytest.mark.long
@pytest.mark.filterwarnings("error")
def test_a_plot_names_sets_by_letters_that_some_font_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letters that matplotlib's own font lacks were boxes, and signs of formulas ended the plot."""
    import matplotlib.font_manager as fonts

    assert labels_of(["x", "größe"]) == (["'x'", "'größe'"], ["DejaVu Sans"])
    # Of the fonts that matplotlib brings, one has this letter.
    assert labels_of(["\u1d81"])[0] == ["'\u1d81'"] and len(labels_of(["\u1d81"])[1]) == 2
    installed = fonts.fontManager.ttflist
    # The list is kept in a file, and some fonts may be gone.
    gone = dataclasses.replace(installed[0], name="Gone", fname=str(tmp_path / "gone.ttf"))
    monkeypatch.setattr(fonts.fontManager, "ttflist", [gone, *installed])
    assert labels_of(["\u1d81"])[0] == ["'\u1d81'"] and "Gone" not in labels_of(["\u1d81"])[1]
    there = any(0x6570 in fonts.get_font(f.fname).get_charmap() for f in installed if "Last" not in f.name)
    sets = ["数", r"$\frac$ $", "x"]
    assert labels_of(sets)[0] == ["'数'" if there else r"'\u6570'", repr(sets[1]), "'x'"]
    rows = [RowInfo("a"), RowInfo("b")]
    scores = Scores(rows, sets, np.array([[0.1, 0.2, 0.3], [0.4, 0.2, 0.1]]), {})
    plot_scores(tmp_path / "scores.png", scores, select(scores, fraction=0.5))
