"""The report page of a real run's folder: written by ``cropi run``, and again by ``cropi report``."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.made_data import make_records, save_policy, write_lines
from test_report_page import data_of

import cropi
from cropi.cli import main, make_parser
from cropi.cli.influence import sure
from cropi.errors import CropiError
from cropi.ranking.selection_files import read_selection
from cropi.report.folder import report_folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ran")
    save_policy(folder / "model")
    write_lines(folder / "train.jsonl", make_records(40))
    write_lines(folder / "sums.jsonl", make_records(16, seed=1))
    write_lines(folder / "more.jsonl", make_records(16, seed=2))
    words = f"run --model {folder}/model --train {folder}/train.jsonl --valid {folder}/sums.jsonl {folder}/more.jsonl"
    assert (
        main(
            [
                *words.split(),
                "--out",
                str(folder / "out"),
                "--dim",
                "4096",
                "--fraction",
                "0.2",
                "--no-progress",
            ]
        )
        == 0
    )
    return folder / "out"


@pytest.mark.long
def test_a_run_writes_the_page(ran: Path) -> None:
    page = (ran / "report.html").read_text("utf-8")
    data, chosen = data_of(page), read_selection(ran / "selected.jsonl")
    ranks = data["columns"]["rank"]
    shown = sorted(
        (rank, name) for rank, name in zip(ranks, data["columns"]["id"]) if rank and rank <= len(chosen)
    )
    assert [name for _, name in shown] == chosen and data["sets"] == ["more", "sums"]
    detail = data["details"][chosen[0]]
    assert detail["text"].endswith("=") and len(detail["responses"]) == 4
    assert "standard error" in page and "Nearest training prompts" in page and "cropi run --model" in page
    assert '"level open">open' in page and "not measured on this model: run <code>cropi check" in page
    # The command is whole.
    named = re.search("<code>cropi (check [^<]*)</code>", page)
    advised = make_parser().parse_args(shlex.split(html.unescape(named[1]))) if named else None
    assert advised is not None and advised.command == "check"
    assert advised.model == str(ran.parent / "model") and advised.trajectories == [
        str(ran.parent / "train.jsonl")
    ]
    assert re.search(r"Model: <bdi>[^<(]+ \(xxh3:\w+\)</bdi>", page)
    names = re.findall(r'<th class="text" scope="row">([^<]*)', page.split('id="run"')[1])
    assert len(set(names)) == len(names) > 9
    run = html.unescape(page.split('id="run"')[1].split("<pre>")[0])
    assert not set('{"') & set(re.sub("<[^>]*>", "", run)) and "null" not in run and "None" not in run
    assert "<bdi>dim 4096, kind slab, width 64, vocab_width 8192, keep 1, seed 0, version 1</bdi>" in run
    assert "<bdi>name cropi, ratio yes, std yes, eps 0.0001, length response, constant 1</bdi>" in run


@pytest.mark.long
def test_draws_are_shown_for_the_choice_that_they_are_of_alone(ran: Path, tmp_path: Path) -> None:
    """`cropi select` chooses others from the same table, whose chances and shares are those of the run's choice.
    Standard errors and signals are those of the scores, whatever is chosen."""
    folder = tmp_path / "out"
    shutil.copytree(ran, folder)
    fraction, other_choice = 0.2, "the draws are of another choice, of "
    no_score = "a choice by random, which looks at no score, so that no draw of validation prompts changes it"
    verdict = re.compile("warning</span><span>validation</span><span><bdi>(.*?)</bdi>")
    weak = verdict.findall((ran / "report.html").read_text("utf-8"))
    for words, said in (
        (["--fraction", "0.5"], f"{other_choice}8 prompts, and this one has 20"),
        (["--method", "max"], f"{other_choice}as many prompts"),
        (["--method", "random"], no_score),
    ):
        words = ["--fraction", str(fraction), *words]
        select = [
            "select",
            "--scores",
            str(folder / "scores.parquet"),
            "--out",
            str(folder / "selected.jsonl"),
        ]
        assert main([*select, *words]) == 0 and main(["report", str(folder)]) == 0
        page = (folder / "report.html").read_text("utf-8")
        assert page.count(said) == 2 and "p" not in data_of(page)["columns"]
        assert len(weak) == 2 and verdict.findall(page) == weak and "se1" in data_of(page)["columns"]
    scores = cropi.Scores.open(folder)
    assert sure(scores, scores.select(fraction, method="random")).endswith(no_score)
    assert "not resampled" not in sure(scores, scores.select(fraction))
    # As many prompts by the same ranking are the same choice, whatever option says how many.
    for given, shown in (
        ({"fraction": 0.5}, False), ({"fraction": fraction, "method": "max"}, False),
        (scores.meta["selection"], True), ({"count": 8}, True), ({"fraction": fraction, "seed": 3}, True),
    ):  # fmt: skip
        chosen = scores.select(**given)
        cropi.write_report(chosen, tmp_path / "p.html")
        page = (tmp_path / "p.html").read_text("utf-8")
        assert (
            (other_choice not in page)
            == shown
            == ("stay chosen when the validation prompts are drawn anew" in page)
        )


@pytest.mark.long
@pytest.mark.parametrize("form", ["files", "dumps"])
def test_texts_of_several_files_and_of_dumps_are_shown(ran: Path, tmp_path: Path, form: str) -> None:
    """By the run, and by the command later."""
    records, folder = make_records(12), tmp_path / "given"
    folder.mkdir()
    for step, some in enumerate((records[:6], records[6:])):
        if form == "dumps":  # as verl writes them
            some = [
                {"input": one["prompt"], "output": text, "gts": one["answer"], "score": reward, "step": step}
                for one in some
                for text, reward in zip(one["responses"], one["rewards"])
            ]
        write_lines(folder / f"{step}.jsonl", some)
    train = [str(folder)] if form == "dumps" else [str(folder / f"{step}.jsonl") for step in (0, 1)]
    words = f"--valid {ran.parent}/sums.jsonl --out {tmp_path}/out --dim 1024 --no-progress".split()
    assert main(["run", "--model", f"{ran.parent}/model", "--train", *train, *words]) == 0
    pages = [(tmp_path / "out" / "report.html").read_text("utf-8")]
    assert main(["report", str(tmp_path / "out")]) == 0
    pages.append((tmp_path / "out" / "report.html").read_text("utf-8"))
    for page in pages:
        texts = {detail["text"] for detail in data_of(page)["details"].values()}
        assert len(texts) > 6 and texts <= {record["prompt"] for record in records}


@pytest.mark.long
def test_relative_paths_are_found_from_any_folder(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run was started; in the folder of the process, when a project has moved."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    for name in ("train", "sums"):
        shutil.copy(ran.parent / f"{name}.jsonl", project)
    monkeypatch.chdir(project)
    words = "--train train.jsonl --valid sums.jsonl --out out --dim 1024 --no-progress".split()
    assert main(["run", "--model", f"{ran.parent}/model", *words]) == 0
    monkeypatch.chdir(elsewhere)
    # A file of the same name is not the run's.
    shutil.copy(ran.parent / "more.jsonl", elsewhere / "train.jsonl")
    expected = {record["prompt"] for record in make_records(40)}

    def texts(folder: Path) -> set[str]:
        assert main(["report", str(folder)]) == 0
        data = data_of((folder / "report.html").read_text("utf-8"))
        return {detail["text"] for detail in data["details"].values()}

    found = texts(project / "out")
    assert len(found) > 6 and found <= expected
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert texts(moved / "out") == found


@pytest.mark.long
def test_the_command_takes_a_check(ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = tmp_path / "c.json"
    finding = {"name": "sketch error", "level": "ok", "text": "scores are off by 0.0123"}
    check.write_text(
        json.dumps({"findings": [finding], "by_type": {"mlp.up_proj": 1.0}, "by_layer": {"0": 1.0}})
    )
    assert main(["report", str(ran), "--out", str(tmp_path / "r.html"), "--check", str(check)]) == 0
    assert capsys.readouterr().out == f"report        {tmp_path / 'r.html'}\n"
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "scores are off by 0.0123" in page and "mlp.up_proj" in page


def test_what_is_not_there_any_more_is_left_out_in_words(ran: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ran, copy)
    store = copy / "sketches" / "train"
    last = sorted(store.glob("shard-*.safetensors"))[-1]
    last.unlink()
    Path(f"{last}.sha256").unlink()
    page = report_folder(copy).read_text("utf-8")
    assert "This run is not finished" in page and "prompts: its sketching run was interrupted" in page
    shutil.rmtree(copy / "sketches")
    page = report_folder(copy).read_text("utf-8")
    assert data_of(page)["nodetail"] == "(the trajectory files were not given)"
    assert "Nearest training prompts" not in page


@pytest.mark.long
def test_a_check_of_another_sketch_is_not_shown_as_this_runs(ran: Path, tmp_path: Path) -> None:
    folder = ran.parent
    words = f"check --model {folder}/model --trajectories {folder}/train.jsonl -n 4 --no-progress --dim"
    for dim, name in ((4096, "same"), (2048, "other")):
        assert main([*words.split(), str(dim), "--out", str(tmp_path / f"{name}.json")]) == 0
    assert "rms over 4 prompts" in report_folder(
        ran, tmp_path / "p.html", check=tmp_path / "same.json"
    ).read_text("utf-8")
    with pytest.raises(
        CropiError, match="other.json is of spec.dim = 2048, and this run has 4096; check this run's"
    ):
        report_folder(ran, tmp_path / "p.html", check=tmp_path / "other.json")
    shutil.copytree(ran, tmp_path / "out")
    shutil.copy(tmp_path / "other.json", tmp_path / "out" / "check.json")
    with pytest.warns(UserWarning, match="spec.dim = 2048, and this run has 4096.*the page leaves it out"):
        assert "rms over 4 prompts" not in report_folder(tmp_path / "out").read_text("utf-8")


@pytest.mark.long
def test_stores_that_are_left_of_an_earlier_run_are_left_out(ran: Path, tmp_path: Path) -> None:
    """A run with one validation file more, or less, names its stores otherwise."""
    shutil.copytree(ran, tmp_path / "out")
    right = report_folder(tmp_path / "out").read_text("utf-8")
    shutil.copytree(ran / "sketches" / "valid-sums", tmp_path / "out" / "sketches" / "valid")
    assert report_folder(tmp_path / "out").read_text("utf-8") == right


def test_folders_that_are_no_run(ran: Path, tmp_path: Path) -> None:
    with pytest.raises(CropiError, match="is not a folder"):
        report_folder(tmp_path / "none")
    with pytest.raises(CropiError, match="holds no scores.parquet: give what `cropi run --out` or"):
        report_folder(tmp_path)
    (tmp_path / "half" / "sketches").mkdir(parents=True)
    with pytest.raises(CropiError, match="half holds no scores.parquet yet: run the same command again"):
        report_folder(tmp_path / "half")
    live = tmp_path / "live" / "cropi"
    live.mkdir(parents=True)
    (live / "stages.jsonl").write_text('{"stage": 0, "step": 0, "dataset": 9, "selected": 3, "seen": 0}\n')
    for folder in (live.parent, live):
        with pytest.raises(
            CropiError, match="inside TRL without a table of scores, .* `cropi info .*` lists"
        ):
            report_folder(folder)
    for stage in ("stage-0001", "stage-0002"):
        shutil.copytree(ran, tmp_path / "trl" / "cropi" / stage)
    for folder in (tmp_path / "trl", tmp_path / "trl" / "cropi"):
        with pytest.raises(
            CropiError, match=r"holds 2 stages: give the folder of one, such as .*cropi/stage-0002$"
        ):
            report_folder(folder)
    shutil.copy(ran / "scores.parquet", tmp_path)
    with pytest.raises(CropiError, match="holds no selected.jsonl: choose first"):
        report_folder(tmp_path)
    (tmp_path / "selected.jsonl").write_text("somebody\n")
    with pytest.raises(CropiError, match="holds 'somebody', which has no score in the table"):
        report_folder(tmp_path)
    shutil.copy(ran / "selected.jsonl", tmp_path)
    (tmp_path / "check.json").write_text("[]")
    with pytest.raises(CropiError, match="check.json is not what `cropi check --out` writes"):
        report_folder(tmp_path)
