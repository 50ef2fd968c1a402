"""The command line end to end, on a small random model: results, resuming, and every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.commands import json_lines
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines
from support.oracle import flat_gradient, objective, stored_logprobs, with_token_ids
from support.stores import sketches_of

from cropi.cli import main
from cropi.ranking.table import read_scores
from cropi.store.store import SketchStore

SMALL = "--dim 1024 --no-progress"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and trajectory files."""
    folder = tmp_path_factory.mktemp("made")
    save_policy(folder / "model")
    save_policy(folder / "other", seed=1)
    write_lines(folder / "train.jsonl", make_records(40))
    write_lines(folder / "valid.jsonl", make_records(12, seed=1, sets=["x", "y"]))
    return folder


def cropi(line: str) -> int:
    return main(line.split())


def sketch(made: Path, out: Path, more: str = "", *, file: object = "train.jsonl") -> int:
    return cropi(f"sketch --model {made}/model --trajectories {made / str(file)} --out {out} {SMALL} {more}")


def rows(store: Path) -> dict[str, torch.Tensor]:
    return sketches_of(store)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, sketch in expected.items():
        assert float((got[name] - sketch).norm()) <= 1e-4 * float(sketch.norm()), name


@pytest.mark.long
def test_four_commands_rank_as_exact_gradients_do(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = "--dim 32768 --width full --vocab-width full"
    hot = [record | {"temperature": 0.5} for record in make_records(12, seed=1, sets=["x", "y"])]
    assert sketch(made, tmp_path / "train", wide) == 0
    summary = capsys.readouterr().out
    assert sketch(made, tmp_path / "valid", wide, file=write_lines(tmp_path / "valid.jsonl", hot)) == 0
    stores = f"--train {tmp_path}/train --valid {tmp_path}/valid"
    near = tmp_path / "near.jsonl"
    assert cropi(f"influence {stores} --out {tmp_path}/s.parquet --neighbours {near} -k 3") == 0
    selected = tmp_path / "selected.jsonl"
    assert cropi(f"select --scores {tmp_path}/s.parquet --fraction 0.1 --out {selected}") == 0

    model = make_model()
    records = {r["id"]: r for r in make_records(40) + hot}
    usable = {name: r for name, r in records.items() if len(set(r["rewards"])) > 1}
    exact = {name: flat_gradient(model, objective(model, with_token_ids(r))) for name, r in usable.items()}
    scores = read_scores(tmp_path / "s.parquet")
    train = [name for name in scores.ids if name in usable]
    means = [
        torch.stack([exact[n] for n in usable if records[n].get("set") == s]).mean(0) for s in ("x", "y")
    ]
    cosine = torch.nn.functional.cosine_similarity
    expected = np.array([[float(cosine(exact[n], mean, dim=0)) for mean in means] for n in train])
    assert scores.sets == ["x", "y"] and np.flatnonzero(scores.usable).size == len(train)
    # A cosine's standard error is at most 1 / sqrt(dim) = 0.0055; 5 of them for the largest of 60.
    assert np.abs(scores.table[scores.usable] - expected).max() < 5 / 32768**0.5

    for row in json_lines(near):
        own = {name: float(cosine(exact[name], exact[row["id"]], dim=0)) for name in train}
        highest = sorted(own.values(), reverse=True)
        assert row["set"] == records[row["id"]]["set"]
        for kind, want in (("helpful", highest[:3]), ("harmful", highest[:-4:-1])):
            for one, value in zip(row[kind], want, strict=True):
                assert max(abs(one["cosine"] - own[one["id"]]), abs(one["cosine"] - value)) < 5 / 32768**0.5
    assert {row["id"] for row in json_lines(near)} == {r["id"] for r in hot} & usable.keys()
    assert cropi(f"info {near}") == 0
    shown = capsys.readouterr().out
    assert "of the chosen prompts stay chosen when the validation prompts are drawn anew" in shown
    assert f"neighbours    {near}: of {len(json_lines(near))} validation prompts" in shown

    skipped = 40 - len(train)
    assert f"40 read, {len(train)} sketched, {skipped} skipped ({skipped} equal rewards), 0 failed" in summary
    for word in ("tokens/s", "forward", "backward", "for sketching", "peak memory", "parameters    sketched"):
        assert word in summary, word
    chosen = json_lines(selected)
    assert len(chosen) == 4 and {row["id"] for row in chosen} <= set(train)


@pytest.mark.long
def test_run_does_all_four_from_a_config_file_too(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = f"--model {made}/model --train {made}/train.jsonl --valid {made}/valid.jsonl"
    assert cropi(f"run {files} --out {tmp_path}/a --fraction 0.2 {SMALL}") == 0
    shown = capsys.readouterr().out
    for name in "scores.parquet scores.png selected.jsonl selected_trajectories.jsonl sketches/train".split():
        assert (tmp_path / "a" / name).exists() and str(tmp_path / "a" / name) in shown
    selected = (tmp_path / "a" / "selected.jsonl").read_text()
    assert len(selected.splitlines()) == 8
    records = [
        json.loads(line)["id"]
        for line in (tmp_path / "a" / "selected_trajectories.jsonl").read_text().splitlines()
    ]
    assert records == [json.loads(line)["id"] for line in selected.splitlines()]

    values = {key: made / f"{key}.jsonl" for key in ("train", "valid")}
    values |= {"model": made / "model", "out": tmp_path / "b"}
    toml = "".join(f'{key} = "{value}"\n' for key, value in values.items())
    (tmp_path / "run.toml").write_text(
        toml + "[sketch]\ndim = 1024\nno_progress = true\n[select]\nfraction = 0.5\n"
    )
    assert cropi(f"run --config {tmp_path}/run.toml --fraction 0.2") == 0, "the command line wins"
    assert (tmp_path / "b" / "selected.jsonl").read_text() == selected
    yaml = "".join(f"{key}: {value}\n" for key, value in values.items())
    (tmp_path / "run.yaml").write_text(yaml + "dim: 1024\nno-progress: true\nfraction: 0.2\n")
    capsys.readouterr()
    assert cropi(f"run --config {tmp_path}/run.yaml") == 0
    assert "40 read, 0 sketched" in capsys.readouterr().out, "the sketches are there already"
    for text, named in (
        ("fractoin = 0.1\n", "'fractoin' is not an option of `cropi run`"),
        ("fraction = [0.1, 0.2]\n", "'fraction' takes one value"),
        ("skip-bad = 3\n", "'skip_bad' must be true or false"),
        ("dim = \n", "not valid TOML"),
        ("dim = 1\n[a]\ndim = 2\n", "'dim' is given twice"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        assert cropi(f"run --config {tmp_path}/bad.toml") == 2
        assert named in capsys.readouterr().err


@pytest.mark.long
def test_layouts_budgets_and_dtypes_give_the_same_sketches(made: Path, tmp_path: Path) -> None:
    sketch(made, tmp_path / "a")
    sketch(made, tmp_path / "b", "--layout padded --tokens-per-batch 24")
    assert_same(rows(tmp_path / "b"), rows(tmp_path / "a"))
    sketch(made, tmp_path / "c", "--store-dtype int8")
    for name, expected in rows(tmp_path / "a").items():
        got = rows(tmp_path / "c")[name]
        assert float(torch.nn.functional.cosine_similarity(got, expected, dim=0)) > 0.9995


@pytest.mark.long
def test_behaviour_model_and_stored_log_probs_agree(made: Path, tmp_path: Path) -> None:
    """Log-probs that are computed by the behaviour model equal the same ones read from the file."""
    records, beta = [with_token_ids(r) | {"temperature": 0.5} for r in make_records(10)], make_model(seed=1)
    plain = write_lines(tmp_path / "plain.jsonl", records)
    stored = write_lines(
        tmp_path / "stored.jsonl", [r | {"logprobs": stored_logprobs(beta, r, 0.5)} for r in records]
    )
    sketch(made, tmp_path / "model", f"--behaviour-model {made}/other", file=plain)
    sketch(made, tmp_path / "file", file=stored)
    sketch(made, tmp_path / "current", "--behaviour current", file=stored)
    assert_same(rows(tmp_path / "file"), rows(tmp_path / "model"))
    first = next(iter(rows(tmp_path / "file").values()))
    assert float((first - next(iter(rows(tmp_path / "current").values()))).norm()) > 0.05 * float(
        first.norm()
    )
    assert SketchStore.open(tmp_path / "file").manifest["behaviour"] == {"source": "file", "model": None}


@pytest.mark.long
def test_the_policy_is_taken_at_the_temperature_of_the_rollouts(made: Path, tmp_path: Path) -> None:
    """Log-probs of the policy itself at the rollouts' temperature give ratios of 1, and only at that one."""
    records, model = [with_token_ids(r) | {"temperature": 0.5} for r in make_records(8)], make_model()
    stored = write_lines(
        tmp_path / "stored.jsonl", [r | {"logprobs": stored_logprobs(model, r, 0.5)} for r in records]
    )
    sketch(made, tmp_path / "file", file=stored)
    sketch(made, tmp_path / "current", "--behaviour current", file=stored)
    sketch(made, tmp_path / "warm", "--behaviour current --temperature 1", file=stored)
    ratios = [row.extra["ratio"] for row in SketchStore.open(tmp_path / "file").rows() if row.status == "ok"]
    np.testing.assert_allclose(ratios, 1.0, rtol=1e-4)
    assert_same(rows(tmp_path / "file"), rows(tmp_path / "current"))
    for name, warm in rows(tmp_path / "warm").items():
        assert float((warm - rows(tmp_path / "current")[name]).norm()) > 0.05 * float(warm.norm())


def test_a_prompt_that_fails_is_named_and_leaves_the_others_right(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, tokenizer = make_records(8), make_tokenizer()
    for record in records:
        record["response_ids"] = [tokenizer(text)["input_ids"] + [1] for text in record["responses"]]
        record["logprobs"] = [[-2.0] * len(ids) for ids in record["response_ids"]]
    good = write_lines(tmp_path / "good.jsonl", records)
    bad = next(record for record in records if len(set(record["rewards"])) > 1)
    bad["logprobs"][0][0] = -500.0  # the ratio overflows
    made_up = "--behaviour-check off"
    sketch(made, tmp_path / "good", made_up, file=good)
    capsys.readouterr()
    assert sketch(made, tmp_path / "bad", made_up, file=write_lines(tmp_path / "bad.jsonl", records)) == 0
    shown = capsys.readouterr().out
    assert "1 failed" in shown and f"{bad['id']}: NaN or infinity in its gradient" in shown
    expected = rows(tmp_path / "good")
    del expected[bad["id"]]
    assert_same(rows(tmp_path / "bad"), expected)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("--estimator ppo", "estimator.name"),
        ("--eps 0.1", "estimator.eps"),
        ("--behaviour-model {made}/other", "behaviour.source"),
        ("--temperature 0.5", "temperature"),
        ("--no-eos", "tokens.eos"),
        ("--max-length 100", "tokens.max_length"),
        ("--too-long skip", "tokens.too_long"),
        ("--chat-template none", "tokens.chat_template"),
        ("--set x", "set"),
        ("--stage 1", "stage"),
        ("--store-dtype int8", "dtype"),
        ("--exclude *norm*", "parameters.covered"),
    ],
)
def test_a_store_is_not_continued_under_an_option_that_changes_its_rows(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, field: str
) -> None:
    assert sketch(made, tmp_path / "s", "--limit 5") == 0
    before = sorted((path.name, path.stat().st_size) for path in (tmp_path / "s").glob("shard-*"))
    assert sketch(made, tmp_path / "s", words.format(made=made)) == 2
    assert f"was made with {field} = " in capsys.readouterr().err
    assert sorted((p.name, p.stat().st_size) for p in (tmp_path / "s").glob("shard-*")) == before


def test_a_store_is_not_continued_with_another_tokenizer(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sketch(made, tmp_path / "s", "--limit 5") == 0
    save_policy(tmp_path / "chatty", chat=True)
    line = f"sketch --model {tmp_path}/chatty --trajectories {made}/train.jsonl --out {tmp_path}/s {SMALL}"
    assert cropi(line) == 2
    assert "was made with tokenizer = " in capsys.readouterr().err


@pytest.mark.long
def test_a_template_file_counts_by_content(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert sketch(made, tmp_path / "s", f"--limit 10 --chat-template {template}") == 0
    template.rename(tmp_path / "moved.jinja")
    assert sketch(made, tmp_path / "s", f"--limit 20 --chat-template {tmp_path}/moved.jinja") == 0
    template.write_text("Q: {% for m in messages %}{{ m['content'] }}{% endfor %}")
    capsys.readouterr()
    assert sketch(made, tmp_path / "s", f"--chat-template {template}") == 2
    assert 'was made with tokens.chat_template = "{% for m' in capsys.readouterr().err
    assert len(SketchStore.open(tmp_path / "s")) == 20


@pytest.fixture(scope="module")
def mistaken(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names for the lines of MISTAKES: files that are wrong, a store that is right, folders that nobody may write."""
    folder = tmp_path_factory.mktemp("mistakes")
    sketch(made, folder / "store")
    long = make_records(3)
    long[1]["prompt"], long[1]["rewards"] = "x" * 200, [1, 0, 0, 0]
    beyond = make_records(3)
    beyond[2]["response_ids"] = [[5], [6], [7], [98]]
    (folder / "broken.jsonl").write_text((made / "train.jsonl").read_text() + "{\n")
    equal = [record | {"rewards": [1, 1, 1, 1]} for record in make_records(3, seed=1, sets=["z"])]
    return {
        "folder": str(folder), "made": str(made), "out": str(folder / "out"), "store": str(folder / "store"),
        "broken": str(folder / "broken.jsonl"), "train": f"--trajectories {made}/train.jsonl",
        "sketch": f"sketch --model {made}/model {SMALL}", "small": SMALL,
        "long": str(write_lines(folder / "long.jsonl", long)),
        "beyond": str(write_lines(folder / "beyond.jsonl", beyond)),
        "equal": str(write_lines(folder / "equal.jsonl", equal)),
    }  # fmt: skip


MISTAKES = {
    "no file": ("there is no such file", "{sketch} --trajectories {folder}/no.jsonl --out {out}"),
    "near a file": (
        "file; did you mean 'long.jsonl'? give",
        "{sketch} --trajectories {folder}/lnog.jsonl --out {out}",
    ),
    "near a model": ("moddel); did you mean 'model'?", "sketch --model {made}/moddel {train} --out {out}"),
    "no model": ("no such folder", "sketch --model ./nowhere {train} --out {out}"),
    "dim": ("dim=1000", "{sketch} --dim 1000 {train} --out {out}"),
    "other weights": ("model.weights", "sketch --model {made}/other {small} {train} --out {store}"),
    "other seed": ("spec.seed = 0, but this run has 5", "{sketch} --seed 5 {train} --out {store}"),
    "exclude": ("matches no trainable parameter", "{sketch} --exclude *bananas* {train} --out {out}"),
    "other files": ("trajectories = ", "{sketch} --trajectories {made}/valid.jsonl --out {store}"),
    "no log-probs": ("no 'logprobs' in this record", "{sketch} --behaviour file {train} --out {out}"),
    "too long": ("the model's context of 128", "{sketch} --trajectories {long} --out {out}"),
    "token id": (
        "token id 98 is beyond the model's vocabulary of 98",
        "{sketch} --trajectories {beyond} --out {out}",
    ),
    "no score table": ("is not a score table", "select --scores {made}/train.jsonl --out {out}"),
    "no store": (
        "there is no sketch store",
        "influence --train {folder}/no --valid {folder}/no --out {out}",
    ),
    "bad record": (
        "{broken}:41: not a JSON object",
        "run --model ./nowhere --valid {made}/valid.jsonl {small} --out {out} --train {broken}",
    ),
    "useless set": (
        "the validation set 'z' usefully: none of its 3 prompts has a gradient",
        "run --model {made}/model --train {made}/train.jsonl {small} --out {out} --valid {equal}",
    ),
    "neighbours as a table": (
        "near.csv: give the path of JSON lines, which ends in .jsonl",
        "influence --train {store} --valid {store} --out {out} --neighbours near.csv",
    ),
    "how many neighbours": (
        "-k 3 is for --neighbours FILE.jsonl",
        "influence --train {store} --valid {store} --out {out} -k 3",
    ),
    "folder as file": (
        "is a folder; give the path of a file",
        "influence --train {store} --valid {store} --out {folder}",
    ),
    "file as store": (
        "is a file; give the folder",
        "influence --train {broken} --valid {broken} --out {out}",
    ),
    "below a file": ("is a file; give a folder", "{sketch} {train} --out {broken}/below"),
    "unused behaviour model": (
        "does not use the behaviour model",
        "{sketch} {train} --behaviour current --behaviour-model {made}/other --out {out}",
    ),
    "no behaviour model": (
        "name it with --behaviour-model",
        "{sketch} {train} --behaviour model --out {out}",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_one_clear_line(
    mistake: str, mistaken: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    named, line = (text.format_map(mistaken) for text in MISTAKES[mistake])
    capsys.readouterr()
    assert cropi(line) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    problem = [line for line in error.splitlines() if line.startswith("cropi ")]
    assert len(problem) == 1 and named in problem[0] and error.endswith(problem[0] + "\n"), error
    assert not Path(mistaken["out"]).exists(), "found after something was written"


def test_debug_shows_where_an_error_was_raised(mistaken: dict[str, str]) -> None:
    line = "{sketch} --debug --trajectories {folder}/no.jsonl --out {out}".format_map(mistaken)
    with pytest.raises(ValueError, match="there is no such file"):
        cropi(line)


def test_no_progress_shows_no_bar_at_all(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("progress", "model.load"):
        monkeypatch.setattr(f"cropi.{module}.in_log", lambda: False)  # as on a terminal
    transformers.utils.logging.enable_progress_bar()
    assert sketch(made, tmp_path / "store") == 0
    assert "%|" not in capsys.readouterr().err


def test_run_that_has_nothing_to_select_ends_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, valid = make_records(8), make_records(8, seed=1, sets=["x", "y"])
    equal = [record | {"rewards": [1.0] * 4} for record in good]
    half = [record | ({"rewards": [1.0] * 4} if record["set"] == "y" else {}) for record in valid]
    for train, against, words in (
        (equal, valid, "train.jsonl: there is nothing to select: none of the 8 training prompts"),
        (good, half, "no trajectory covers the validation set 'y' usefully: none of its 4 prompts"),
        ([{**good[0], "id": None}], valid, "train.jsonl:1: the key 'id' is null: the record has "),
    ):
        files = {"train": write_lines(tmp_path / "train.jsonl", train)}
        files["valid"] = write_lines(tmp_path / "valid.jsonl", against)
        given = f"--train {files['train']} --valid {files['valid']}"
        assert cropi(f"run --model no/such-model {given} --out {tmp_path}/out") == 2
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_skip_bad_goes_on_and_says_what_was_left_out(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = make_records(12)
    records[3]["rewards"] = [1, 0]
    records[4]["prompt"], records[4]["rewards"] = "x" * 200, [1, 0, 0, 0]
    records[5]["rewards"] = [1, 0, 0, 0]
    records[5]["response_ids"] = [[98], [5], [5], [5]]
    path = write_lines(tmp_path / "t.jsonl", records)
    path.write_text(path.read_text() + "{broken\n")
    assert sketch(made, tmp_path / "s", "--skip-bad --too-long skip", file=path) == 0
    shown = capsys.readouterr().out
    assert "bad records   2 left out" in shown and f"{path}:4" in shown and "1 too long" in shown
    assert "pass --skip-bad" not in shown
    assert f"{records[5]['id']}: token id 98" in shown
    assert cropi(f"info {tmp_path}/s") == 0
    assert "skipped       1 prompt (too long)" in capsys.readouterr().out
    assert cropi(f"info {made}/train.jsonl") == 0 and "40 prompts, 160 responses" in capsys.readouterr().out


# Runs the command in forked children, so that everything is imported once. The first child is killed when a shard is
# there, the second one gets Ctrl-C after one more; each prints its exit status.
STOPPER = """
import gc, os, signal, sys, time
import torch, transformers
import cropi.sketching.run, cropi.model.load
from cropi.cli import main
out, words = sys.argv[1], sys.argv[2:]
gc.freeze()  # a child that collects garbage would go through all modules

def shards():
    return len([n for n in os.listdir(out) if n.endswith(".sha256")]) if os.path.isdir(out) else 0

for number in (signal.SIGKILL, signal.SIGINT):
    before, child = shards(), os.fork()
    if child == 0:
        os._exit(main(words))
    while shards() == before:
        ended, status = os.waitpid(child, os.WNOHANG)
        assert ended == 0, f"ended by itself: {status}"
        time.sleep(0.005)
    os.kill(child, number)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shards(), flush=True)
"""


@pytest.mark.long
def test_kill_and_interrupt_lose_nothing_and_the_rest_is_computed(made: Path, tmp_path: Path) -> None:
    many = write_lines(tmp_path / "many.jsonl", make_records(300, seed=2))
    out = tmp_path / "cut"
    words = f"sketch --model {made}/model --trajectories {many} --out {out} {SMALL} --tokens-per-batch 20"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STOPPER, str(out), *words.split()]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (killed, first), (interrupted, second) = (
        map(int, line.split()) for line in done.stdout.splitlines() if line[0] in "-0123456789"
    )
    assert (killed, interrupted) == (-9, 130) and second > first
    assert "To go on with the rest:\n  cropi sketch --model" in done.stderr
    middle = rows(out)
    assert 64 <= len(middle) < len(SketchStore.open(out)) < 300

    assert sketch(made, out, file=many) == 0, "another batch size may finish the job"
    assert sketch(made, tmp_path / "whole", file=many) == 0
    assert len(SketchStore.open(out)) == 300
    finished = rows(out)
    assert_same(finished, rows(tmp_path / "whole"))
    assert {name: finished[name].tolist() for name in middle} == {
        name: kept.tolist() for name, kept in middle.items()
    }


def test_help_is_quick() -> None:
    code = (
        "import sys; import cropi.cli as c; c.make_parser().format_help();"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_info_of_a_curriculum_inside_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"stage": 0, "step": 0, "dataset": 40, "selected": 40},
        {"stage": 1, "step": 200, "dataset": 40, "pool": 32, "usable": 30, "unknown": 0, "selected": 3, "seconds": 5.1},
    ]  # fmt: skip
    (tmp_path / "cropi").mkdir()
    stages = write_lines(tmp_path / "cropi" / "stages.jsonl", rows)
    for path in (tmp_path, tmp_path / "cropi", stages):
        assert main(["info", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"curriculum    {stages}: 2 stages begun, inside TRL"
        assert lines[2].endswith("from step 200: 3 prompts of 32, 30 with a gradient")
    live = {"stage": 1, "step": 2, "dataset": 40, "pool": 40, "selected": 6, "seen": 4}
    write_lines(stages, [rows[0], live])
    assert main(["info", str(stages)]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("from step 2: 6 prompts of 40, 4 seen before")
    write_lines(stages, [rows[0], {"stage": None}])
    assert main(["info", str(stages)]) == 0
