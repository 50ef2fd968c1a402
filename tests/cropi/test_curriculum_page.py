"""The page of a curriculum: figures of every stage, a verdict that says when nothing was learnt, and links to
stages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cropi.cli import main
from cropi.curriculum.learnt import nothing_learnt
from cropi.errors import CropiError
from cropi.report.charts import line
from cropi.report.curriculum import curriculum_page


def stage(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "stage": number, "prompts": 100, "usable": 80, "selected": 8, "weights": f"w{number}", "overlap": None,
        "pass_rate": {"selected": 0.5, "pool": 0.4}, "scores": {"gsm": {"selected": 0.1 + number / 10, "pool": 0.0}},
        "training": {"reward": [0.2 + number / 10, 0.3 + number / 10], "equal_rewards": [0.3, 0.2], "steps": [0, 9]},
        "seconds": {"sketch": 10.0, "train": 40.0}, "select_seconds": 12.5, "select_share": 0.2, "cut_short": [],
    } | changes  # fmt: skip


def written(folder: Path, stages: list[dict[str, Any]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    document = {
        "settings": {"train": {"steps": 9}, "sketch": {"model": "some/model"}}, "fingerprint": "0123abcd",
        "planned": 4, "stages": stages, "warnings": nothing_learnt(stages),
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(document | changes))
    return folder


def verdict(text: str) -> list[tuple[str, str]]:
    return re.findall(r'<li><span class="level (\w+)">.*?<bdi>(.*?)</bdi>', text)


def test_figures_of_every_stage_are_on_the_page(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "c", [stage(0), stage(1, overlap=0.25, cut_short=["sketch"]), stage(2, overlap=0.75)]
    )
    (folder / "stage-01").mkdir()
    (folder / "stage-01" / "report.html").write_text("x")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text("utf-8")
    assert "3 of 4 stages of 9 steps, from <bdi>some/model</bdi>" in text
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", text)]
    assert cells[1] == ["1", "100", "80", "8", "25%", "0.3", "0.4", "20%", "12.5", "40.0"]
    assert text.count('<a href="stage-01/report.html">') == 1 and "stage-00/report.html" not in text
    said = verdict(text)
    assert ("ok", "from 0.2 at the first stage to 0.5 at the last") in said
    assert ("ok", "a stage keeps 50% of the choice before it, on average") in said
    assert ("ok", "choosing takes 20% of a stage&#39;s time") in said
    assert any("cut short and taken up again in sketch" in words for _, words in said)
    assert "http" not in re.sub(r'content="[^"]*"', "", text).replace("http-equiv", "")


def test_a_run_that_learnt_nothing_says_so(tmp_path: Path) -> None:
    flat = {"reward": [0.3, 0.3], "equal_rewards": [0.99, 0.97], "steps": [0, 9]}
    folder = written(tmp_path / "c", [stage(0, training=flat, weights="same"), stage(1, weights="same")])
    levels = verdict(curriculum_page(folder).read_text("utf-8"))
    said = " ".join(words for level, words in levels if level == "warning")
    assert "the policy is the same before and after training" in said
    assert "the reward did not rise" in said and "equal rewards for 97%" in said
    assert not [words for level, words in levels if level == "ok" and words.startswith("from 0.")]
    silent = written(tmp_path / "s", [stage(0, training={})])
    assert (
        "warning",
        "the trainer left no training.json in {out}, so that reward and learning are not known (docs/curriculum.md has "
        "its form)",
    ) in verdict(curriculum_page(silent).read_text("utf-8"))


def test_names_are_escaped(tmp_path: Path) -> None:
    odd = "<script>alert(1)</script>\u202e\x1b[31m"
    folder = written(
        tmp_path / "c", [stage(0, scores={odd: {"selected": 0.1, "pool": 0.0}})],
        settings={"train": {"steps": 9}, "sketch": {"model": odd}},
    )  # fmt: skip
    text = curriculum_page(folder).read_text("utf-8")
    assert "<script>" not in text and "\x1b" not in text and "&lt;script&gt;" in text


def test_what_is_no_curriculum(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"stages": 3}')
    with pytest.raises(CropiError, match="is not what `cropi curriculum` writes"):
        curriculum_page(tmp_path)
    with pytest.raises(CropiError, match="no stage of the curriculum has begun"):
        curriculum_page(written(tmp_path / "c", []))


def test_lines_have_gaps_where_nothing_is_known() -> None:
    text = line([0.1, None, 0.3, 0.2])
    assert text.count("<circle") == 3 and text.count('class="trend"') == 1
    assert line([None, float("nan")]).count(">not known<") == 1
    assert line([0.5]).count("<circle") == 1
