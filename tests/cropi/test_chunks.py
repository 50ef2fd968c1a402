"""A job cut into chunks: each prompt in one of them, with all that its row needs, whoever computes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import content, equal

import cropi
from cropi.cli import main
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.gradient.estimators import ESTIMATORS
from cropi.gradient.layout import Layout
from cropi.gradient.tokenize import Tokenize
from cropi.model.policy import Policy
from cropi.sketching import chunks as chunks_module
from cropi.sketching.chunks import Chunk, Dealt, make_chunks
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec


def cut(path: Path, tokens: int | None, budget: int, window: int = 16, shared: bool = False) -> list[Chunk]:
    groups = list(read([path]))
    tokenize = Tokenize(make_tokenizer(), 10**6)
    items = [
        RowInfo(group.id, "skipped", "equal rewards") if len(set(group.rewards)) == 1 else tokenize(group)
        for group in groups
    ]
    return list(make_chunks(items, Layout(shared), budget=budget, tokens=tokens, window=window))


def test_two_prompts_of_one_id_are_named(tmp_path: Path) -> None:
    """Their gradients would be added to one row."""
    group = next(group for group in read([write_lines(tmp_path / "t.jsonl", make_records(2))]))
    made = Tokenize(make_tokenizer(), 10**6)(group)
    with pytest.raises(CropiError, match="groups holds the prompt 'p0-000' twice"):
        list(make_chunks([made, made], Layout(False), budget=100))


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
@pytest.mark.parametrize("tokens", [1, 30, 200])
@pytest.mark.parametrize("budget", [12, 40, 150])
def test_every_row_is_in_one_chunk_with_all_its_batches(
    tmp_path: Path, tokens: int, budget: int, shared: bool
) -> None:
    path = write_lines(tmp_path / "t.jsonl", make_records(50, responses=5))
    whole, found = cut(path, None, budget, shared=shared), cut(path, tokens, budget, shared=shared)
    assert [chunk.number for chunk in found] == list(range(len(found)))
    names = [name for chunk in found for name in (*chunk.prompts, *(row.id for row in chunk.rows))]
    assert Counter(names) == Counter(f"p0-{i:03d}" for i in range(50)), "none lost, none twice"
    batches = {
        w: [[(r.group.id, r.chosen) for r in b] for b in chunk.batches] for w, chunk in enumerate(whole)
    }
    for chunk in found:
        mine = [[(row.group.id, row.chosen) for row in batch] for batch in chunk.batches]
        wanted = [batch for batch in batches[chunk.window] if any(name in chunk.prompts for name, _ in batch)]
        assert mine == wanted, "the micro-batches of one process, in their order"
        assert len(chunk.batches) > 0 or chunk.rows
        done = frozenset(sorted(chunk.prompts)[::2])
        left = [
            {group.id for group in batch.groups} for batch in chunk.built(ESTIMATORS["cropi"], False, done)
        ]
        assert all(names & (chunk.prompts - done) for names in left), "nothing is computed again"
        assert chunk.prompts - done <= set().union(*left)
        ends = np.cumsum([len(batch) * max(row.length for row in batch) for batch in chunk.batches])
        enough = [size >= tokens and batch[-1].last for size, batch in zip(ends, chunk.batches)]
        assert not any(enough[:-1]), "a chunk ends where it may: longer ones are dealt less evenly"
    assert len({chunk.cut for chunk in found if chunk.window == 0}) == 1
    sizes = [chunk.tokens for chunk in found if chunk.window == 0][:-1]
    assert all(size >= tokens for size in sizes)


def test_a_prompt_is_cut_rather_than_a_chunk_without_end(tmp_path: Path) -> None:
    """Rows that never end with their batch: 3 to a batch, 5 to a prompt."""
    records = make_records(40, responses=5)
    for record in records:
        record |= {
            "prompt": "1+1=",
            "responses": ["1111", "2222", "3333", "4444", "5555"],
            "rewards": [1, 0, 1, 0, 0],
        }
    found = cut(write_lines(tmp_path / "t.jsonl", records), 24, 24)
    batches = sum(len(chunk.batches) for chunk in found)
    assert max(chunk.tokens for chunk in found) <= chunks_module.LONGEST * 24 + 24
    assert len(found) > 5 and batches - sum(
        len(c.batches) for c in cut(tmp_path / "t.jsonl", None, 24)
    ) < len(found)


def test_a_window_of_many_tokens_ends_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of a window are in memory together: 256 prompts of 64 responses of 32,000 tokens took 18 GB."""
    groups = [
        Tokenize(make_tokenizer(), 10**6)(group)
        for group in read([write_lines(tmp_path / "t.jsonl", make_records(30))])
    ]
    sizes = {group.id: len(group.prompt) + sum(map(len, group.responses)) for group in groups}
    monkeypatch.setattr(chunks_module, "MOST_TOKENS", 3 * max(sizes.values()))
    taken: list[str] = []
    items = (taken.append(group.id) or group for group in groups)
    given: list[str] = []
    for chunk in make_chunks(items, Layout(False), budget=100):
        assert sum(sizes[name] for name in taken if name not in given) < 4 * max(sizes.values())
        given += [*chunk.prompts]
    assert sorted(given) == sorted(sizes) and len(given) == 30


def test_rows_alone_come_in_chunks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "MOST_ROWS", 10)
    rows = [RowInfo(str(i), "skipped", "equal rewards") for i in range(25)]
    for tokens in (None, 100):
        found = list(make_chunks(rows, Layout(False), budget=10, tokens=tokens))
        assert [len(chunk.rows) for chunk in found] == [10, 10, 5]
        assert [row.id for chunk in found for row in chunk.rows] == [row.id for row in rows]


@pytest.mark.long
@pytest.mark.parametrize("longest", [1, 4], ids=["prompts cut between shares", "at ends of batches"])
def test_shares_hold_the_rows_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    monkeypatch.setattr(chunks_module, "LONGEST", longest)
    policy = Policy(make_model(), make_tokenizer())
    path = write_lines(tmp_path / "t.jsonl", make_records(60))

    def job(out: str, **changes: Any) -> SketchJob:
        return SketchJob([path], tmp_path / out, SketchSpec(dim=1024), **({"tokens_per_batch": 24} | changes))

    sketch(policy, job("whole"), progress=False)
    for i in (1, 2, 3):
        sketch(policy, job(f"part-{i}", shard=(i, 3)), progress=False)
    stores = [SketchStore.open(tmp_path / f"part-{i}") for i in (1, 2, 3)]
    joined = SketchStore.join(stores)
    joined.check_finished()
    assert equal(content(tmp_path / "whole"), content(joined))
    assert main(["store", "merge", str(tmp_path / "merged"), *(str(store.path) for store in stores)]) == 0
    merged = SketchStore.open(tmp_path / "merged")
    merged.check_finished()
    assert equal(content(tmp_path / "whole"), content(merged)) and "share" not in merged.manifest
    train = cropi.sketch(policy, make_records(9, seed=1), dim=1024, progress=False)
    by_shares, by_whole = (
        cropi.influence(train, valid, max_valid=20)
        for valid in (stores, SketchStore.open(tmp_path / "whole"))
    )
    for name in ("table", "stderr", "p_selected"):
        np.testing.assert_array_equal(getattr(by_shares, name), getattr(by_whole, name))
    with pytest.raises(
        CropiError, match="part-1, .*part-3 hold only a share of the 60 prompts of a job: the share 2/3"
    ):
        cropi.influence(train, [stores[0], stores[2]])
    sketch(policy, job("part-2", shard=(2, 3)), progress=False)
    assert len(SketchStore.open(tmp_path / "part-2")) == len(stores[1]), "nothing is computed again"
    for few, missing in ((stores[:1], "the shares 2/3, 3/3 must"), (stores[1:], "the share 1/3 must")):
        with pytest.raises(CropiError, match=missing):
            SketchStore.join(few).check_finished()
    with pytest.raises(CropiError, match="with --shard 1/3 and holds a share of the 60 prompts"):
        stores[0].check_finished()
    for wanted, words in (
        ((2, 3), "with --shard 2/3"),
        ((1, 4), "with --shard 1/4"),
        (None, "without --shard"),
    ):
        with pytest.raises(
            CropiError, match=f"was made with --shard 1/3, but this run is {words}; give another"
        ):
            sketch(policy, job("part-1", shard=wanted), progress=False)
    with pytest.raises(
        CropiError, match="--shard 1/3 and tokens_per_batch = 24, but this run has 40: other shares"
    ):
        sketch(policy, job("part-1", shard=(1, 3), tokens_per_batch=40), progress=False)
    for wrong in ((0, 3), (4, 3)):
        with pytest.raises(CropiError, match="1 <= i <= n"):
            job("x", shard=wrong)


def test_chunks_are_dealt_by_tokens() -> None:
    sizes = [(7919 * i) % 97 + 1 for i in range(300)]
    every = [Chunk(number, 0, tokens=tokens) for number, tokens in enumerate(sizes)]
    loads = [sum(chunk.tokens for chunk in Dealt(i, 7).take(iter(every))) for i in range(1, 8)]
    assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= max(sizes)
    chunks = [Chunk(number, 0, tokens=100 if number == 0 else 10) for number in range(21)]
    taken = [sorted(c.number for c in Dealt(i, 3).take(iter(chunks))) for i in (1, 2, 3)]
    assert sorted(sum(taken, [])) == list(range(21)) and taken[0] == [0]


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "1", "a/b", "1/0", "1/2/3"])
def test_a_wrong_share_is_named(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sketch", "--model", "m", "--trajectories", "t", "--out", "o", "--shard", wrong])
    assert "give i/n with 1 <= i <= n" in capsys.readouterr().err
