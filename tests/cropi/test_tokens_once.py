"""Texts are tokenised once in a run, and a template that prints the date prints one date for all that is compared."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines

import cropi
from cropi.data.readers import read
from cropi.data.scan import scan
from cropi.gradient.kept import KeptTokens
from cropi.gradient.tokenize import Tokenize
from cropi.model.policy import Policy
from cropi.pipeline import Part, one_date
from cropi.sketching import job as jobs
from cropi.sketching import run
from cropi.sketching.job import SketchJob

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DATED = "{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m['content'] }}{% endfor %}"


def store_of(kept: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """The vectors of a job on texts, and how often a group was tokenised."""
    calls: list[str] = []
    whole = Tokenize.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Tokenize, "__call__", lambda self, group: calls.append(group.id) or whole(self, group))
        if not kept:
            patch.setattr(KeptTokens, "get", lambda *rest: None)
        store = cropi.sketch(make_model(), make_records(12), make_tokenizer(), dim=512, progress=False)
    return torch.cat([vectors for _, vectors in store.shards()]), len(calls)


def test_a_text_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = sum(len(set(record["rewards"])) > 1 for record in make_records(12))
    (vectors, count), (again, twice) = store_of(True, monkeypatch), store_of(False, monkeypatch)
    assert count == usable and twice == 2 * usable and torch.equal(vectors, again)


def test_tokens_are_kept_whole(tmp_path: Path) -> None:
    record = {"id": "a", "prompt": "1+1=", "response_ids": [[20, 21, 1], [22, 1]], "rewards": [1, 0],
              "temperature": 0.5, "logprobs": [[-1.0, -2.5, -0.125], [-3.0, -1e-9]],
              "loss_mask": [[1, 0, 1], [1, 1]]}  # fmt: skip
    (group,) = read([record])
    tokens = Tokenize(make_tokenizer(), 97)
    kept, made = KeptTokens(tokens), tokens(group)
    kept.put(made)
    assert kept.get(group, tokens) == made and kept.get(group, Tokenize(tokens.tokenizer, 97)) == made
    assert kept.get(group, Tokenize(tokens.tokenizer, 97, eos=False)) is None  # by other rules


@pytest.mark.parametrize("progress", [True, False])
def test_the_first_pass_is_shown_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], progress: bool
) -> None:
    save_policy(tmp_path / "model")
    path, real = write_lines(tmp_path / "t.jsonl", make_records(12)), run.bar_of
    monkeypatch.setattr(run, "bar_of", lambda *given, **options: real(*given, **(options | {"delay": 0.0})))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    policy = Policy(str(tmp_path / "model"), progress=progress)
    assert run.scan_groups(policy, SketchJob([path], None)).prompts == 12 and not policy.loaded
    assert ("reading: 0prompt" in capsys.readouterr().err) == progress


class Days(datetime.date):
    """A calendar that turns a page at every look."""

    looks = 0

    @classmethod
    def today(cls) -> datetime.date:
        cls.looks += 1
        return datetime.date(2026, 1, cls.looks)


def test_stores_that_are_compared_have_one_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "datetime", type("calendar", (), {"date": Days}))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    model, options = make_model(), {"dim": 512, "progress": False, "draws": 0}
    for _ in range(2):  # also a run that goes on on another day
        cropi.score(model, make_records(6), make_records(6, seed=1), tokenizer, out=tmp_path, **options)
        dates = {
            cropi.SketchStore.open(tmp_path / name).manifest["tokens"]["template_date"]
            for name in ("train", "valid")
        }
        assert dates == {"2026-01-01"}
    # A later stage of a curriculum: a store of its own, the date of the first.
    groups = read(make_records(6))
    part = Part("train", groups, scan(groups), None)
    policy = cropi.Policy(model, tokenizer)
    job = one_date(policy, SketchJob(groups, tmp_path / "later"), [part], [tmp_path / "train"])
    assert job.template_date == "2026-01-01"
    assert one_date(policy, SketchJob(groups, tmp_path / "alone"), [part], []).template_date == "2026-01-02"
