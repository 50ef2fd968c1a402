"""Which stores may be ranked against each other: whole ones, made alike."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from support.made_data import make_model, make_records, make_tokenizer, write_lines

from cropi.cli import main
from cropi.errors import CropiError
from cropi.gradient.estimators import make_estimator
from cropi.model.policy import Policy
from cropi.ranking.influence import influence
from cropi.ranking.members import validation_means
from cropi.ranking.selection import select
from cropi.ranking.table import read_scores, write_scores
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.differences import UnlikeStores
from cropi.store.manifest import manifest_text
from cropi.store.merging import merge
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")]


def stored(
    out: Path, records: list[dict[str, Any]], *, stop_after: int | None = None, **options: Any
) -> SketchStore:
    """Sketch records into ``out``; with ``stop_after``, die by Ctrl-C twice once so many rows are stored."""
    path = write_lines(out.with_suffix(".jsonl"), records)
    job = SketchJob([path], out, spec=SketchSpec(dim=1024), shard_rows=1, tokens_per_batch=20, **options)
    if stop_after is None:
        sketch(Policy(make_model(), make_tokenizer()), job, progress=False)
    else:
        add = SketchStore.add

        def stopping(store: SketchStore, *row: Any) -> list[str]:
            if len(store) >= stop_after:
                raise KeyboardInterrupt
            return add(store, *row)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SketchStore, "add", stopping)
            sketch(Policy(make_model(), make_tokenizer()), job, progress=False)
    return SketchStore.open(out)


def test_an_unfinished_store_is_not_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, against = make_records(20), make_records(8, seed=1)
    valid = stored(tmp_path / "valid", against)
    train = stored(tmp_path / "train", records, stop_after=7)
    held = len(train)
    assert 7 <= held < 20 and train.manifest["prompts"] == 20
    with pytest.raises(CropiError, match=f"train holds {held} of 20 prompts: .*run the same command again"):
        influence(train, [valid])
    with pytest.raises(CropiError, match=f"train holds {held} of 20 prompts"):
        validation_means([valid, train])
    line = f"influence --train {tmp_path}/valid --valid {tmp_path}/train --out {tmp_path}/s.parquet"
    assert main(line.split()) == 2 and not (tmp_path / "s.parquet").exists()
    assert f"train holds {held} of 20 prompts" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "train")]) == 0
    assert f"unfinished    {held} of 20 prompts" in capsys.readouterr().out
    influence(stored(tmp_path / "train", records), [valid])
    assert main(["info", str(tmp_path / "train")]) == 0 and "unfinished    " not in capsys.readouterr().out


def test_a_limit_makes_a_smaller_store_and_no_unfinished_one(tmp_path: Path) -> None:
    records, valid = make_records(20), stored(tmp_path / "valid", make_records(8, seed=1))
    assert len(influence(stored(tmp_path / "a", records, limit=6), [valid]).rows) == 6
    cut = stored(tmp_path / "a", records, limit=12, stop_after=8)
    with pytest.raises(CropiError, match=f"holds {len(cut)} of 12 prompts"):
        influence(cut, [valid])
    again = stored(tmp_path / "a", records, limit=12)
    assert len(influence(again, [valid]).rows) == again.manifest["prompts"] == 12
    with pytest.warns(
        UserWarning, match="limit 6: the store .*a holds 12 prompts from before, and all of them"
    ):
        assert len(stored(tmp_path / "a", records, limit=6)) == 12
    # A lower limit does not make what is missing of the first run finished, until its own run went through.
    stored(tmp_path / "b", records, stop_after=9)
    cut = stored(tmp_path / "b", records, limit=15, stop_after=11)
    with pytest.raises(CropiError, match=f"holds {len(cut)} of 20 prompts"):
        influence(cut, [valid])
    again = stored(tmp_path / "b", records, limit=15)
    assert 15 <= len(influence(again, [valid]).rows) < 20
    assert stored(tmp_path / "b", records).manifest["prompts"] == 20


def test_a_part_of_a_joined_store_counts(tmp_path: Path) -> None:
    """The ranks of a trainer hold a part of the prompts each."""
    records, valid = make_records(20), stored(tmp_path / "valid", make_records(8, seed=1))
    one, two = stored(tmp_path / "one", records[:10]), stored(tmp_path / "two", records[10:], stop_after=4)
    joined = SketchStore.join([one, two])
    assert joined.manifest["prompts"] == 20 and one.manifest["prompts"] == 10
    with pytest.raises(CropiError, match=f"holds {len(joined)} of 20 prompts"):
        influence(joined, [valid])
    whole = SketchStore.join([one, stored(tmp_path / "two", records[10:])])
    assert len(influence(whole, [valid]).rows) == 20


def test_a_store_that_does_not_say_how_many_prompts_it_is_to_hold_is_ranked_and_continued(
    tmp_path: Path,
) -> None:
    records, valid = make_records(12), stored(tmp_path / "valid", make_records(8, seed=1))
    stored(tmp_path / "old", records, stop_after=6)
    manifest = dict(SketchStore.open(tmp_path / "old").manifest)
    del manifest["prompts"]
    (tmp_path / "old" / "manifest.json").write_text(manifest_text(manifest))
    old = SketchStore.open(tmp_path / "old")
    assert 6 <= len(influence(old, [valid]).rows) < 12
    assert "prompts" not in SketchStore.join([old, valid]).manifest
    assert stored(tmp_path / "old", records).manifest["prompts"] == 12


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"estimator": make_estimator("ppo")},
            ["estimator.name = 'cropi' in the first, 'ppo' in the second"],
        ),
        ({"temperature": 0.5}, ["temperature = None in the first, 0.5 in the second"]),
        (
            {"eos": False, "chat_template": "{{ messages[0]['content'] }}" + "!" * 99},
            ["tokens.eos = True in the first, False", "tokens.chat_template = 'auto' in the first, "],
        ),
    ],
)
def test_stores_that_were_made_with_other_settings_are_compared_with_a_warning(
    tmp_path: Path, options: dict[str, Any], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train = stored(tmp_path / "train", make_records(8))
    valid = stored(tmp_path / "valid", make_records(8, seed=1), **options)
    with pytest.warns(UnlikeStores, match="train and .*valid were made with different settings") as caught:
        influence(train, [valid])
    text = str(caught[0].message)
    assert all(words in text for words in named) and text.count(" in the first") == len(named)
    assert len(text) < 600, "a whole template is too much to read"
    capsys.readouterr()
    line = f"influence --train {tmp_path}/train --valid {tmp_path}/valid --out {tmp_path}/s.parquet"
    assert main(line.split()) == 0
    assert f"warning: {text}" in capsys.readouterr().err


def test_training_stores_that_are_read_as_one_are_compared_with_each_other(tmp_path: Path) -> None:
    one = stored(tmp_path / "one", make_records(8))
    two = stored(tmp_path / "two", make_records(8, seed=1), estimator=make_estimator("rloo"))
    with pytest.warns(
        UnlikeStores, match="one and .*two were made with different settings: estimator.name = "
    ):
        SketchStore.join([one, two])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnlikeStores)
        with pytest.raises(CropiError, match="one and .*two cannot be merged: estimator.name = "):
            merge(tmp_path / "merged", [one, two])


def test_a_choice_reads_all_stores_of_its_scores_and_none_of_another_model(tmp_path: Path) -> None:
    records = make_records(16)
    records[9] |= {name: records[2][name] for name in ("prompt", "responses", "rewards")}  # a copy
    parts = [stored(tmp_path / name, some) for name, some in (("one", records[:8]), ("two", records[8:]))]
    train, valid = SketchStore.join(parts), stored(tmp_path / "valid", make_records(8, seed=1))
    write_scores(tmp_path / "s.parquet", influence(train, [valid]))
    scores = read_scores(tmp_path / "s.parquet")
    chosen = select(scores, fraction=0.9, dedup=0.999)
    assert chosen.copies == select(scores, fraction=0.9, dedup=0.999, sketches=train).copies
    assert set(chosen.copies) | set(chosen.copies.values()) >= {records[2]["id"], records[9]["id"]}
    other = stored(tmp_path / "other", records, stage="1")
    with pytest.raises(
        CropiError, match="other has stage = '1', and the scores were made from '0'; give the stores"
    ):
        select(scores, fraction=0.9, dedup=0.999, sketches=other)


def test_another_tokenizer_is_warned_of(tmp_path: Path) -> None:
    train, valid = (stored(tmp_path / name, make_records(8)) for name in ("train", "valid"))
    valid.manifest["tokenizer"] = "0" * 32
    with pytest.warns(UnlikeStores, match=f"tokenizer = '{train.manifest['tokenizer']}' in the first, '000"):
        influence(train, [valid])


def test_what_may_differ_between_training_and_validation_is_not_warned_of(tmp_path: Path) -> None:
    train = stored(tmp_path / "train", make_records(8))
    valid = stored(
        tmp_path / "valid", make_records(8, seed=1), store_dtype="int8", set="x", behaviour="current", max_length=100,
        too_long="skip", notes={"model": "elsewhere"},
    )  # fmt: skip
    older = stored(tmp_path / "older", make_records(8, seed=2))
    for key in ("estimator", "tokenizer", "temperature", "tokens"):
        del older.manifest[key]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnlikeStores)
        influence(train, [valid, older])
