"""Records without rewards: the gradient of supervised fine-tuning, against plain autograd, and every form they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from support.commands import json_lines
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines
from support.oracle import response_logprobs
from support.stores import sketches_of

import cropi
from cropi.cli import main
from cropi.cli.info import token_lines
from cropi.curriculum.plan import Plan
from cropi.data.export import export
from cropi.data.readers import HashedIds, read
from cropi.data.scan import scan
from cropi.data.share import without
from cropi.errors import CropiError, RecordError
from cropi.gradient.estimators import make_estimator
from cropi.gradient.tokenize import Tokenize
from cropi.options import Selecting
from cropi.pipeline.checks import Setup
from cropi.report.html import _overlap
from cropi.sketching.job import SketchJob
from cropi.store.rows import RowInfo
from cropi.trainers.dumps.auto import opened
from cropi.trainers.trl.options import Curriculum
from cropi_kernels import SketchSpec, canonical_name
from cropi_kernels.testing import sketch_gradients

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.readers.HashedIds")
SPEC = SketchSpec(1024)
GIVEN: dict[str, Any] = dict(estimator="sft", dim=SPEC.dim, progress=False)
SUMS = [(f"{i}+{i + 3}=", str(2 * i + 3)) for i in range(6)]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


FORMS: dict[str, list[dict[str, Any]]] = {
    "records": [{"id": f"r{i}", "prompt": q, "responses": [a]} for i, (q, a) in enumerate(SUMS)],
    "completion": [{"prompt": q, "completion": a} for q, a in SUMS],  # TRL's, as text
    "messages": [{"prompt": user(q), "completion": assistant(a)} for q, a in SUMS],
    "conversation": [{"messages": user(q) + assistant(a)} for q, a in SUMS],
}
TASK = [{"messages": user(f"{i}+5=") + assistant(str(i + 5))} for i in (20, 30)]


def in_float64(prompt: list[int], responses: list[list[int]]) -> tuple[torch.Tensor, float]:
    """The sketch of mean_k mean_t grad log pi by autograd in float64, and what float32 costs plain torch."""
    made = []
    for dtype in (torch.float64, torch.float32):
        model = make_model().to(dtype)
        torch.stack([response_logprobs(model, prompt, ids).mean() for ids in responses]).mean().backward()
        grads = {
            canonical_name(n): p.grad.double() for n, p in model.named_parameters() if p.grad is not None
        }
        made.append(sketch_gradients(model, grads, SPEC))
    return made[0], float((made[0] - made[1]).norm())


# ---------------------------------------------------------------------------------------------------- the gradient
def test_the_sketch_is_that_of_the_mean_log_prob() -> None:
    """Of one response and of several, of other lengths; equal ones count as often as they are there."""
    records = [
        {"id": "one", "prompt_ids": [5, 6, 7], "response_ids": [[20, 21, 22, 1]]},
        {"id": "some", "prompt_ids": [9, 10], "response_ids": [[30, 1], [31, 32, 33, 1], [30, 1]]},
    ]
    store = cropi.sketch(make_model(), records, **GIVEN)
    found = sketches_of(store)
    for record in records:
        want, own = in_float64(record["prompt_ids"], record["response_ids"])
        assert float((found[record["id"]].double() - want).norm()) <= 2 * own
    assert [row.pass_rate for row in store.rows()] == [1.0, 1.0] and store.manifest["estimator"][
        "centred"
    ] is False


def test_a_trainers_batch_has_the_same_sketch() -> None:
    """`score_batch` takes rewards of 1, and one row alone is a prompt."""
    ids = [5, 6, 7, 20, 21, 22, 1]
    batch = cropi.score_batch(
        make_model(), torch.tensor([ids]), response_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), prompt_ids=["one"],
        rewards=torch.ones(1), estimator="sft", spec=SPEC,
    )  # fmt: skip
    want, own = in_float64(ids[:3], [ids[3:]])
    assert float((batch.sketches[0].double() - want).norm()) <= 2 * own
    with pytest.raises(
        CropiError, match="rewards: the estimator 'sft' takes demonstrations, whose rewards are 1"
    ):
        cropi.score_batch(
            make_model(), torch.tensor([ids] * 2), response_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2),
            prompt_ids=["one", "other"], rewards=torch.tensor([1.0, 0.5]), estimator="sft", spec=SPEC,
        )  # fmt: skip


def test_of_a_conversation_the_assistants_turns_are_learnt() -> None:
    marked = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\n"
        "{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = marked
    turns = user("1+1") + assistant("2") + user("ok") + assistant("yes")
    store = cropi.sketch(make_model(), [{"messages": turns}], tokenizer, **GIVEN)
    ((rows, table),) = store.shards()
    pieces = [("<user>1+1\n<assistant>", 0), ("2\n", 1), ("<user>ok\n<assistant>", 0), ("yes\n", 1)]
    ids = [(token, learnt) for text, learnt in pieces for token in tokenizer(text)["input_ids"]]
    found = []
    for dtype in (torch.float64, torch.float32):
        model = make_model().to(dtype)
        logprobs = response_logprobs(model, [ids[0][0]], [token for token, _ in ids[1:]])
        logprobs[torch.tensor([learnt for _, learnt in ids[1:]]).bool()].mean().backward()
        grads = {
            canonical_name(n): p.grad.double() for n, p in model.named_parameters() if p.grad is not None
        }
        found.append(sketch_gradients(model, grads, SPEC))
    assert rows[0].tokens == 6
    assert float((table[0].double() - found[0]).norm()) <= 2 * float((found[0] - found[1]).norm())


# -------------------------------------------------------------------------------------------------------- the forms
@pytest.mark.long
def test_all_forms_have_the_same_scores(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    tables = {}
    for name, rows in FORMS.items():
        frame = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), frame)
        for source in (rows, str(write_lines(tmp_path / f"{name}.jsonl", rows)), str(frame)):
            scores = cropi.score(model, source, {"task": TASK}, tokenizer, verify=False, draws=0, **GIVEN)
            tables[name, type(source), str(source)[-5:]] = sorted(scores.table[:, 0].tolist())
    first = next(iter(tables.values()))
    assert len(set(first)) == 6 and all(table == first for table in tables.values())


def test_rows_of_one_prompt_are_its_demonstrations_and_records_are_copied_without_rewards() -> None:
    rows = [
        {"prompt": "a", "completion": "1"},
        {"prompt": "b", "completion": "2"},
        {"prompt": "a", "completion": "3"},
    ]
    with pytest.warns(HashedIds):
        groups = list(read(rows, rewards=False))
    assert [(group.prompt, group.responses, group.size) for group in groups] == [
        ("a", ["1", "3"], 2),
        ("b", ["2"], 1),
    ]
    assert all(group.no_gradient is None and "rewards" not in group.to_record() for group in groups)


def test_what_is_missing_or_too_much_is_an_error_that_names_the_estimator() -> None:
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    for rows in FORMS.values():
        with pytest.raises(CropiError, match=r"--estimator sft .*\(in Python .*estimator="):
            cropi.sketch(model, rows, tokenizer, dim=1024, progress=False)
    scored = make_records(3)
    with pytest.raises(
        RecordError, match=r"there are rewards, and the estimator takes demonstrations.*--columns"
    ):
        cropi.sketch(model, scored, tokenizer, **GIVEN)
    assert len(cropi.sketch(model, scored, tokenizer, columns="rewards=", **GIVEN)) == 3
    with pytest.raises(RecordError, match="demonstrations, without rewards.*sft"):
        list(read(list(read(FORMS["records"], rewards=False))))
    with pytest.raises(CropiError, match="'responses' must be a list with at least one response"):
        list(read([{"id": "a", "prompt": "q", "responses": []}], rewards=False))
    with pytest.raises(CropiError, match="noise is that of sampled responses"):
        cropi.sketch(model, FORMS["records"], tokenizer, noise=True, **GIVEN)


def test_groups_that_were_read_for_the_other_kind_of_estimator_are_an_error() -> None:
    """Rewards would weigh demonstrations, and demonstrations have no advantage."""
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    for rewards in (True, None):
        with pytest.raises(RecordError, match="there are rewards, and the estimator takes demonstrations"):
            cropi.sketch(model, read(make_records(3), rewards=rewards), tokenizer, **GIVEN)
    two = [{"id": "a", "prompt": "1+1=", "responses": ["2", "3"]}]
    for rewards in (False, None):
        with pytest.raises(CropiError, match="'rewards' is missing"):
            cropi.sketch(model, read(two, rewards=rewards), tokenizer, dim=1024, progress=False)
    assert len(cropi.sketch(model, read(two, rewards=None), tokenizer, **GIVEN)) == 1


def test_a_share_of_demonstrations_is_read_as_all_of_them_are() -> None:
    """As a rank of several does."""
    groups = read(FORMS["records"], rewards=False)
    share = without(groups, scan(groups), {"r0", "r3"})
    store = cropi.sketch(make_model(), share, make_tokenizer(chat=True), **GIVEN)
    assert sorted(row.id for row in store.rows()) == ["r1", "r2", "r4", "r5"]


def test_what_needs_rewards_takes_no_demonstrations(tmp_path: Path) -> None:
    files: dict[str, Any] = dict(
        train=["a"], valid=["b"], job=SketchJob((), "", estimator=make_estimator("sft"))
    )
    for trainer in ("trl", "train {records} {rollouts}"):
        with pytest.raises(CropiError, match="'sft' is for demonstrations, and this trainer makes rollouts"):
            Plan("m", tmp_path, 1, 1, trainer, **files)
    assert Plan("m", tmp_path, 1, 1, "train {records}", **files).job.estimator.name == "sft"
    for method in ("learnability", "pass_rate"):
        with pytest.raises(CropiError, match=f"method '{method}' ranks by rewards, and the estimator 'sft'"):
            Setup(files["job"], selecting=Selecting(method=method))
    # A table of them that was finished before, by its estimator.
    table, meta = np.arange(6.0)[:, None], {"train": {"estimator": files["job"].estimator.to_dict()}}
    scores = cropi.Scores([RowInfo(f"r{i}", pass_rate=1.0) for i in range(6)], ["sums"], table, meta)
    scores.save(tmp_path / "scores.parquet")
    for method in ("learnability", "pass_rate"):
        with pytest.raises(CropiError, match=f"method '{method}' ranks by rewards, and the estimator 'sft'"):
            cropi.Scores.open(tmp_path / "scores.parquet").select(0.5, method=method)
    page = _overlap(scores, scores.select(0.5))
    assert page["names"] == ["this choice", "max", "random"]
    for given in ("sft", make_estimator("sft")):
        with pytest.raises(
            CropiError, match="'sft' is for demonstrations, and this trainer learns from rewards"
        ):
            Curriculum(10, estimator=given)


# --------------------------------------------------------------------------------------------------- what is written
@pytest.mark.parametrize("form", sorted(FORMS))
def test_chosen_demonstrations_are_written_with_their_responses(tmp_path: Path, form: str) -> None:
    rows = [{"id": f"r{i}"} | row for i, row in enumerate(FORMS[form])]
    chosen = cropi.Scores([RowInfo(f"r{i}") for i in range(6)], ["sums"], np.arange(6.0)[:, None], {}).select(
        0.34
    )
    file = write_lines(tmp_path / "rows.jsonl", rows)
    # As a trainer's rows, which are copied; the rows are those of the records whose ids they have.
    assert chosen.to_dataset(rows).to_list() == [rows[5], rows[4]]
    out = tmp_path / "out.jsonl"
    assert export(out, chosen.ids, trajectories=str(file), dataset=str(file)) == 2
    assert json_lines(out) == [rows[5], rows[4]]
    # As records.
    assert export(out, chosen.ids, trajectories=str(file)) == 2
    assert json_lines(out) == [group.to_record() for group in read(rows, rewards=False).take(chosen.ids)]
    assert all(group.responses for group in read(out, rewards=False))


def test_rows_with_other_prompts_or_answers_first_are_not_those_of_the_records(tmp_path: Path) -> None:
    rows = [{"id": "a", "messages": user("1+1=") + assistant("2")}]
    for messages in (user("1+2=") + assistant("2"), user("1+1=") + user("and") + assistant("2"), user("1")):
        with pytest.raises(CropiError, match="row 0 is the prompt 'a', but it holds"):
            export(
                tmp_path / "o.jsonl", ["a"], trajectories=rows, dataset=[{"id": "a", "messages": messages}]
            )


def test_files_with_numbers_are_parts_of_a_data_set_and_no_steps_of_a_run(tmp_path: Path) -> None:
    """Of steps the newest responses to a prompt would count, and the others be left out."""
    for number in range(2):
        write_lines(tmp_path / f"{number}.jsonl", [{"prompt": f"1+{number}=", "completion": str(number + 1)}])
    assert [group.responses for group in read(opened(str(tmp_path)), rewards=False)] == [["1"], ["2"]]
    write_lines(tmp_path / "2.jsonl", [{"prompt": "1+1=", "completion": "two"}])
    with pytest.raises(
        RecordError, match=r"2\.jsonl:1: the prompt id 'text-.*' was used before, at .*1\.jsonl:1"
    ):
        list(read(opened(str(tmp_path)), rewards=False))


def test_token_ids_of_one_response_a_row_are_grouped() -> None:
    """Without a reward nothing but their nesting tells them from those of a whole record."""
    rows = [{"id": "a", "prompt_ids": [5], "response_ids": ids} for ids in ([6, 7], [8])]
    for given in (rows, [rows[0] | {"response_ids": [[6, 7], [8]]}]):
        assert [group.response_ids for group in read(given, rewards=False)] == [[[6, 7], [8]]]


def test_tokens_of_demonstrations_are_shown_without_a_reward() -> None:
    (group,) = read([{"id": "a", "prompt_ids": [5], "response_ids": [[6, 7]]}], rewards=None)
    tokens = Tokenize(None, vocabulary=98)(group)
    assert list(token_lines(tokens, None))[2:] == ["  response 0", "    scored  [6, 7]"]


@pytest.mark.long
def test_the_commands_choose_demonstrations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From two files to the chosen rows, and a job that finds all of it done."""
    save_policy(tmp_path / "m", chat=True)
    train = write_lines(tmp_path / "train.jsonl", FORMS["records"])
    valid = write_lines(tmp_path / "task.jsonl", TASK)
    words = [
        "run",
        "--model",
        str(tmp_path / "m"),
        "--train",
        str(train),
        "--valid",
        str(valid),
        "--estimator",
        "sft",
    ]
    words += ["--dim", "1024", "--fraction", "0.5", "--out", str(tmp_path / "o"), "--no-progress"]
    assert main(words) == 0 and "tokenised again" not in capsys.readouterr().err
    chosen = json_lines(tmp_path / "o" / "selected_trajectories.jsonl")
    assert len(chosen) == 3 and all(record in FORMS["records"] for record in chosen)
    assert main([*words, "--fraction", "0.34", "--no-report"]) == 0
    said = capsys.readouterr().out
    assert (
        "6 from before" in said
        and "report.html is of an earlier run, and perhaps of another selection" in said
    )
    assert main(["info", str(train)]) == 0
    assert "no rewards    in 6 records: demonstrations, for --estimator sft" in capsys.readouterr().out
    assert main([word for word in words if word not in ("--estimator", "sft")]) == 2
    assert "--estimator sft" in capsys.readouterr().err
