"""Dumps of trainers and engines given as they are: told by what stands in them, and read to the same trajectories."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines
from support.made_dumps import KINDS, MORE, ROLLOUTS, logprobs, made, messages, trl, write

import cropi
from cropi.cli import main
from cropi.data.readers import read
from cropi.data.scan import LossyTokens
from cropi.errors import CropiError
from cropi.trainers.dumps.auto import opened
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.recognise import SOURCES, recognise

ALL = KINDS | MORE
# vLLM, servers and open-instruct know no tools' tokens.
MASKED = ("slime", "nemo-rl", "verl", "prime-rl", "prime-rl traces", "nemo-gym", "atropos")
EXACT = (*MASKED, "vllm", "openai", "open-instruct")
TEXT = ("verl text", "trl", "trl lines", "openrlhf", "skyrl", "areal", "ms-swift", "roll")
pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")


def records(masked: bool) -> list[dict[str, Any]]:
    """The rollouts as records, by whose sketches those of every dump are held."""
    found = []
    for k in (0, 2):
        (prompt, _, _, _), group = ROLLOUTS[k], ROLLOUTS[k : k + 2]
        record = {
            "id": f"m{k // 2}", "prompt_ids": prompt, "response_ids": [ids for _, ids, *_ in group],
            "rewards": [reward for *_, reward in group], "temperature": 0.7,
            "logprobs": [logprobs(ids) for _, ids, *_ in group],
        }  # fmt: skip
        if masked and k:
            record["loss_mask"] = [mask for _, _, mask, _ in group]
        found.append(record)
    return found


def dump(kind: str, folder: Path, content: Any = None) -> Path:
    return write(folder / ALL[kind][0], made(kind) if content is None else content)


def reading(kind: str) -> Reading:
    return Reading(id_key=ALL[kind][3], temperature=0.7)


def same(store: Any, other: Any) -> None:
    """Two stores hold the same sketches, to the bit."""
    for (rows, vectors), (their_rows, theirs) in zip(store.shards(), other.shards(), strict=True):
        assert [row.id for row in rows] == [row.id for row in their_rows]
        assert torch.equal(vectors, theirs) and bool((vectors != 0).any())


# ------------------------------------------------------------------------------------------------ all formats
@pytest.mark.parametrize("kind", list(ALL))
def test_a_file_is_told_by_what_stands_in_it(kind: str, tmp_path: Path) -> None:
    path = dump(kind, tmp_path)
    found = recognise(path.rename(tmp_path / f"renamed{path.suffix}"))
    assert found == kind.split()[0]


def test_every_source_is_known_everywhere() -> None:
    from cropi.options import SOURCES as CHOICES

    assert set(CHOICES) == {"auto", *SOURCES} and {kind.split()[0] for kind in ALL} | {"records"} == set(
        SOURCES
    )


@pytest.mark.parametrize("kind", EXACT)
def test_token_level_dumps_give_the_same_sketches_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, options = make_model(), {"dim": 512, "progress": False, "behaviour_check": "off"}
    want = cropi.sketch(model, records(kind in MASKED), **options)
    given = opened(dump(kind, tmp_path), reading=reading(kind))
    same(cropi.sketch(model, given, **options), want)


@pytest.mark.parametrize("kind", TEXT)
def test_text_dumps_give_the_sketches_of_their_text(kind: str, tmp_path: Path) -> None:
    model, tokenizer, options = make_model(), make_tokenizer(), {"dim": 512, "progress": False}
    plain = [
        {"id": f"m{n}", "prompt": f"q{n}", "responses": [f"r{2 * n}", f"r{2 * n + 1}"], "temperature": 0.7,
         "rewards": [ROLLOUTS[2 * n + k][3] for k in (0, 1)]} for n in (0, 1)
    ]  # fmt: skip
    if ALL[kind][3] == "prompt":  # which names no prompt
        plain = [record | {"id": record["prompt"]} for record in plain]
    if kind == "areal":  # whose text holds the end token of a response that was not cut
        plain = [record | {"truncated": [True, True]} for record in plain]
    with pytest.warns(LossyTokens, match="holds text.*tokenised again"):
        given = opened(dump(kind, tmp_path), reading=reading(kind))
    same(cropi.sketch(model, given, tokenizer, **options), cropi.sketch(model, plain, tokenizer, **options))


@pytest.mark.parametrize("kind", list(ALL))
def test_convert_writes_records_and_says_what_it_took_the_file_for(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = dump(kind, tmp_path), tmp_path / "out.jsonl"
    assert (
        main(["convert", str(path), "--out", str(out), "--id-key", ALL[kind][3], "--temperature", "0.7"]) == 0
    )
    assert f"read as       {SOURCES[kind.split()[0]].words}" in capsys.readouterr().out
    groups = list(read(out))
    assert [group.rewards for group in groups] == [[1.0, 0.0], [0.5, 1.0]]
    steps = {"atropos": ["step 0", "step 1"]}.get(kind, ["step 7"] * 2)  # whose lines name none
    assert [group.policy for group in groups] == steps and all(group.temperature == 0.7 for group in groups)
    if kind in EXACT:
        assert [group.response_ids for group in groups] == [
            record["response_ids"] for record in records(True)
        ]
        assert [group.loss_mask for group in groups] == [r.get("loss_mask") for r in records(kind in MASKED)]


@pytest.mark.long
def test_commands_take_dumps_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(tmp_path / "model")
    path = dump("slime", tmp_path)
    words = [
        "sketch",
        "--model",
        str(tmp_path / "model"),
        "--dim",
        "512",
        "--no-progress",
        "--behaviour-check",
        "off",
    ]
    assert main([*words, "--trajectories", str(path), "--out", str(tmp_path / "store")]) == 0
    told = capsys.readouterr().out
    assert (
        f"read as       a rollout dump of slime: {path} (2 prompts, 4 responses; token ids, log-probs)"
        in told
    )
    # The same again goes on with the store.
    assert main([*words, "--trajectories", str(path), "--out", str(tmp_path / "store")]) == 0
    assert main(["info", str(path)]) == 0
    assert "2 prompts, 4 responses, 2 prompts usable" in capsys.readouterr().out
    # A folder stands for its files, and steps of one run are put together: the newest rollouts count.
    (tmp_path / "run").mkdir()
    for step in (2, 10):
        write(tmp_path / f"run/{step}.pt", made("slime") | {"rollout_id": step})
    assert main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "all.jsonl")]) == 0
    assert {group.policy for group in read(tmp_path / "all.jsonl")} == {"step 10"}
    write_lines(tmp_path / "records.jsonl", make_records(2))
    assert (
        main(["convert", str(path), str(tmp_path / "records.jsonl"), "--out", str(tmp_path / "x.jsonl")]) == 2
    )
    assert "the files are of several kinds" in capsys.readouterr().err
    assert main(["info", str(path), "--source", "records"]) == 2  # what is named is not guessed at
    assert "is a zip archive" in capsys.readouterr().err


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = made("openrlhf")
    content[1]["reward"] = None
    path = dump("openrlhf", tmp_path, content)
    assert main(["info", str(path)]) == 2
    assert "reward: is missing: the responses are not scored" in capsys.readouterr().err
    assert main(["info", str(path), "--skip-bad"]) == 0
    told = capsys.readouterr().out
    assert "1 sample left out" in told and "left out    1 by reward, the first" in told


# ---------------------------------------------------------------------------------------------- prompts alone
@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"data_source": "x", "prompt": messages(0), "reward_model": {"ground_truth": "g"}},
            "prompts of verl",
        ),
        ({"prompt": "q", "label": "7"}, "prompts of slime or OpenRLHF without responses"),
        ({"input": "q", "label": "7"}, "prompts of slime or OpenRLHF without responses"),
        ({"question": "q", "answer": "7"}, "these are prompts without responses"),
        (
            {"custom_id": "a", "method": "POST", "url": "/v1", "body": {"messages": messages(0)}},
            "input of a batch",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_prompts_alone_are_said_to_be_prompts(
    row: dict[str, Any], words: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / f"p.{ending}", [row, row])
    assert main(["convert", str(path), "--out", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err
    assert words in error and "`cropi rollout`" in error
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"prompts       {path}: 2 " in out and "`cropi rollout`" in out and "columns       " in out


# -------------------------------------------------------------------------------------------------------- TRL
def test_rewards_of_trl_are_held_to_its_advantages(tmp_path: Path) -> None:
    rows = trl()
    for k, row in enumerate(rows):
        row["length"] = float(100 * k)  # a column of numbers that is no reward
    path = dump("trl", tmp_path, rows)
    with pytest.raises(
        CropiError, match="advantages do not follow the sum of the columns 'accuracy', 'form', 'length'"
    ):
        opened(path)
    for named, want in (("accuracy", [0.75, -0.25]), ("advantage", [rows[k]["advantage"] for k in (0, 1)])):
        (held,) = opened(path, columns=f"reward={named}")
        assert next(iter(read(held))).rewards == want
        # What is converted has the names of records, and the others of the list still theirs.
        assert next(iter(read([held], columns=f"reward={named}"))).rewards == want
    with pytest.raises(CropiError, match="there is no column 'x'"):
        opened(path, columns="reward=x")
    rows = [
        row | {"prompt": messages(0), "completion": [{"role": "assistant", "content": "a"}]}
        for row in trl()[:2]
    ]
    (held,) = opened(dump("trl", tmp_path, rows))
    (group,) = read(held)
    assert group.prompt == messages(0) and group.responses == [[{"role": "assistant", "content": "a"}]] * 2


# -------------------------------------------------------------------------------------------------- prime-rl
def test_turns_of_prime_rl_that_are_no_single_sequence(tmp_path: Path) -> None:
    content = made("prime-rl")
    content[2]["trajectory"][1]["tokens"]["prompt_ids"] = [8, 9, 99, 40]
    path = dump("prime-rl", tmp_path, content)
    with pytest.raises(CropiError, match=r"trajectory\[1\].tokens: does not go on from the turns before it"):
        opened(path)
    (held,) = opened(path, skip_bad=True)
    assert held.left.counts == {"trajectory": 1}
    for row in content:
        del row["trajectory"]  # saved without tokens: messages are left
    with pytest.warns(LossyTokens, match="holds text"):
        (held,) = opened(dump("prime-rl", tmp_path, content))
    group = next(iter(read(held)))
    assert group.id == "sums-0" and group.responses == [
        [{"role": "assistant", "content": f"r{k}"}] for k in (0, 1)
    ]
    packed = tmp_path / "rank_0.bin"
    packed.write_bytes(b"\x93\x91\x9a\x01\x02\x03")
    with pytest.raises(CropiError, match="packed batch of prime-rl.*train_rollouts.jsonl"):
        opened(packed)


def test_traces_of_verifiers(tmp_path: Path) -> None:
    """What is left out, what is not a single sequence, and text where no tokens are saved."""
    content = made("prime-rl traces")
    content[2]["traces"].append(
        copy.deepcopy(content[2]["traces"][0]) | {"agent": {"name": "judge", "trainable": False}}
    )
    content[0]["errors"] = [{"type": "Timeout", "message": "of an attempt that was repeated"}]
    (held,) = opened(dump("prime-rl traces", tmp_path, content))
    first, second = sorted(read(held), key=lambda group: len(group.prompt_ids or ()), reverse=True)
    assert held.left.counts == {"agent": 1} and second.loss_mask == [[1, 0, 1], [1, 0, 0, 1]]
    assert first.prompt == messages(0) and first.answer == "g" and second.task == "sums"
    assert second.truncated == [False, True] and second.temperature == 0.7
    content[1]["ok"] = False
    assert opened(dump("prime-rl traces", tmp_path, content))[0].left.counts == {"agent": 1, "error": 1}

    def refused(words: str, change: Callable[[dict[str, Any]], Any]) -> None:
        content = made("prime-rl traces")
        change(content[2]["traces"][0])
        with pytest.raises(CropiError, match=r"step_7.jsonl:3, traces\[0\], " + words):
            opened(dump("prime-rl traces", tmp_path, content))

    refused(r"nodes\[2\]: begins another branch", lambda trace: trace["nodes"][2].update(parent=0))
    refused(r"nodes\[1\]: has 2 tokens, 2 entries of the mask, 1 of them sampled, and 0 log-probs",
            lambda trace: trace["nodes"][1].update(logprobs=[]))  # fmt: skip
    refused("reward: is missing", lambda trace: trace.update(rewards={"correct": None}))
    refused(
        r"rewards\['correct'\]: should be a finite number",
        lambda trace: trace.update(rewards={"correct": "x"}),
    )
    refused("calls: the turns were sampled at the temperatures", lambda trace: trace["calls"].append({}))
    call = {"id": "c", "name": "f", "arguments": "{}"}
    for row in (one for entry in content for one in entry.get("traces", [entry])):
        for node in row["nodes"]:
            node["token_ids"] = node["mask"] = node["logprobs"] = []
        row["nodes"][1]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(CropiError, match="tools: are missing: the response calls tools"):
        opened(dump("prime-rl traces", tmp_path, content))
    for row in (one for entry in content for one in entry.get("traces", [entry])):
        row["tool_defs"] = [{"name": "f", "parameters": {"type": "object"}}]
    with pytest.warns(LossyTokens, match="holds text"):
        (held,) = opened(dump("prime-rl traces", tmp_path, content))
    said = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    group = next(group for group in read(held) if group.task == "sums")
    assert group.tools == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert group.responses[0] == [  # type: ignore[index]
        {"role": "assistant", "content": "", "tool_calls": [said]}, {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "r2"},
    ]  # fmt: skip


def test_pickles_of_others_are_named(tmp_path: Path) -> None:
    for content, words in (({"sequences": 1, "a": 2}, "is a pickle, but none of slime, verl or vLLM"),):
        path = tmp_path / "x.pt"
        torch.save(content, path)
        with pytest.raises(CropiError, match=words):
            opened(path)
    with pytest.raises(CropiError, match="source must be one of auto, records, verl"):
        opened(path, "trlx")
