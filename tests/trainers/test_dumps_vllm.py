"""Dumps of vLLM and of chat completions: log-probs and tokens in the forms that engines write."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from support.made_data import write_lines
from support.made_dumps import KINDS, MORE, chat, logprobs, made, messages, vllm
from test_recognised import dump, reading, records

from cropi.cli import main
from cropi.data.readers import read
from cropi.data.scan import LossyTokens
from cropi.errors import CropiError
from cropi.trainers.dumps.auto import opened
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.recognise import recognise
from cropi.trainers.dumps.vocabulary import bytes_of_tokens

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")


def test_log_probs_of_vllm_in_every_form(tmp_path: Path) -> None:
    rows = vllm()
    for row in rows:
        for output in row["outputs"]:
            output["logprobs"] = logprobs(output["token_ids"])  # as numbers
    rows[1]["rewards"] = [output.pop("reward") for output in rows[1]["outputs"]]
    (held,) = opened(dump("vllm", tmp_path, rows), reading=reading("vllm"))
    want = [group.to_record() for group in read(held)]
    assert [record["logprobs"] for record in want] == [record["logprobs"] for record in records(False)]
    for output in rows[0]["outputs"]:  # the flat form of newer releases
        ids = output["token_ids"]
        output["logprobs"] = {
            "start_indices": [2 * t for t in range(len(ids))], "end_indices": [2 * t + 2 for t in range(len(ids))],
            "token_ids": [n for token in ids for n in (3, token)],
            "logprobs": [n for p in logprobs(ids) for n in (-1, p)],
        }  # fmt: skip
    (held,) = opened(dump("vllm", tmp_path, rows), reading=reading("vllm"))
    assert [group.to_record() for group in read(held)] == want


def test_only_the_likeliest_tokens_are_no_log_probs_of_the_sampled_ones(tmp_path: Path) -> None:
    rows = vllm()
    del rows[0]["outputs"][1]["logprobs"][0]["12"]
    path = dump("vllm", tmp_path, rows)
    with pytest.raises(
        CropiError, match=r"logprobs\[0\]: holds the 1 likeliest tokens, and not the sampled one \(12\)"
    ):
        opened(path)
    (held,) = opened(path, skip_bad=True)
    assert held.left.counts == {"logprobs": 1} and sorted(group.size for group in read(held)) == [1, 2]


def test_a_pickle_of_vllm_is_read_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm.outputs")
    for name in ("RequestOutput", "CompletionOutput", "Logprob"):
        setattr(module, name, type(name, (), {"__module__": "vllm.outputs", "__qualname__": name}))
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.outputs", module)

    def instance(name: str, fields: dict[str, Any]) -> Any:
        held = getattr(module, name)()
        vars(held).update(fields)
        return held

    requests = []
    for row in vllm():
        for output in row["outputs"]:
            output["logprobs"] = [
                {int(k): instance("Logprob", v) for k, v in table.items()} for table in output["logprobs"]
            ]
        outputs = [instance("CompletionOutput", output) for output in row["outputs"]]
        requests.append(instance("RequestOutput", row | {"outputs": outputs}))
    path = tmp_path / "outputs.pkl"
    path.write_bytes(pickle.dumps(requests))
    monkeypatch.delitem(sys.modules, "vllm.outputs")
    monkeypatch.delitem(sys.modules, "vllm")
    assert recognise(path) == "vllm"
    (held,) = opened(path, reading=reading("vllm"))
    assert [group.logprobs for group in read(held)] == [record["logprobs"] for record in records(False)]


# ------------------------------------------------------------------------------------------- chat completions
def bytes_tokenizer() -> Any:
    """Byte-level BPE: a token a byte, and a few longer ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate(letters)}
    vocabulary |= {"\u0120a": 300, "ab": 301}
    merges = [("\u0120", "a"), ("a", "b")]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def as_text(text: str, pieces: list[bytes], reward: float) -> dict[str, Any]:
    content = [
        {"token": piece.decode(errors="replace"), "bytes": list(piece), "logprob": -0.5 - n}
        for n, piece in enumerate(pieces)
    ]
    choice = {"message": {"role": "assistant", "content": text}, "logprobs": {"content": content},
              "finish_reason": "stop", "reward": reward}  # fmt: skip
    return {"messages": messages(0), "response": {"object": "chat.completion", "choices": [choice]}}


def test_tokens_as_text_become_ids_by_their_bytes(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    vocabulary = tokenizer.get_vocab()
    # Not the tokens that the tokenizer would give for the text, and one of them half of a letter.
    pieces = [b"a", b"b", b" a", b"\xc3", b"\xa9", b"<eos>"]
    ids = [vocabulary["a"], vocabulary["b"], 300, vocabulary["\u00c3"], vocabulary["\u00a9"], 1]
    assert tokenizer("ab a\u00e9")["input_ids"] != ids[:-1]
    rows = [as_text("ab a\u00e9", pieces, 1.0), as_text("ab", [b"ab"], 0.0)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    (held,) = opened(path, reading=Reading(tokenizer=lambda: tokenizer))
    (group,) = read(held)
    assert group.response_ids == [ids, [301]] and group.prompt == messages(0) and group.rewards == [1.0, 0.0]
    assert group.logprobs == [[-0.5 - n for n in range(6)], [-0.5]]
    with pytest.warns(
        LossyTokens, match="2 responses hold their tokens as text.*the log-probs of 2 are left out"
    ):
        (held,) = opened(path)
    (group,) = read(held)
    assert group.response_ids is None and group.logprobs is None and group.responses == ["ab a\u00e9", "ab"]
    assert bytes_of_tokens(tokenizer)[b"ab"] == 301
    # Every byte's letter is that of the tokenizers library: what it makes of all characters of one and two bytes.
    spelled = {
        tokenizer.convert_ids_to_tokens(token): data for data, token in bytes_of_tokens(tokenizer).items()
    }
    for character in map(chr, range(0x800)):
        ((word, _),) = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(character)
        assert b"".join(spelled[letter] for letter in word) == character.encode()


def test_a_batch_finds_its_prompts_in_its_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = chat()
    for k, row in enumerate(rows):
        del row["messages"], row["response"]["body"]["prompt_token_ids"]
        row["custom_id"] = f"m{k // 2}-{k}"
    path = dump("openai", tmp_path, rows)
    convert = ["convert", str(path), "--out", str(tmp_path / "o.jsonl")]
    assert main(convert) == 2
    assert "give the input file of the batch as --dataset" in capsys.readouterr().err
    asked = [
        {"custom_id": row["custom_id"], "method": "POST", "url": "/v1/chat/completions",
         "body": {"messages": messages(k // 2), "temperature": 0.7, "tools": [{"name": "f"}]}}
        for k, row in enumerate(rows)
    ]  # fmt: skip
    rows.append({"custom_id": "m1-9", "response": {"status_code": 500, "body": {}}, "error": {"code": "x"}})
    dump("openai", tmp_path, rows)
    assert main([*convert, "--dataset", str(write_lines(tmp_path / "in.jsonl", asked))]) == 0
    assert "left out      1 sample: 1 by error" in capsys.readouterr().out
    groups = {json.dumps(group.prompt): group for group in read(tmp_path / "o.jsonl")}
    assert groups.keys() == {json.dumps(messages(0)), json.dumps(messages(1))}
    group = groups[json.dumps(messages(0))]
    assert (
        group.temperature == 0.7
        and group.tools == [{"name": "f"}]
        and group.response_ids == [[10, 11, 1], [12, 1]]
    )


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_a_reward_function_scores_what_the_file_does_not(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def single(prompt, response, answer, **row):\n"
        "    if response == 'r3': raise ValueError('no')\n"
        "    return float(response == answer)\n"
        "def many(prompts, completions, answer, **columns):\n"
        "    last = [c if isinstance(c, str) else c[-1]['content'] for c in completions]\n"
        "    return [float(c == a) for c, a in zip(last, answer)]\n"
    )
    rows = made(kind)
    for row in rows:
        row["answer"] = "r2"
        row.pop("reward", None)
        for output in row.get("outputs", ()):
            del output["reward"]
    convert = [
        "convert",
        str(dump(kind, tmp_path, rows)),
        "--out",
        str(tmp_path / "o.jsonl"),
        "--id-key",
        (KINDS | MORE)[kind][3],
    ]
    assert main(convert) == 2
    assert "reward: is missing: the responses are not scored" in capsys.readouterr().err
    assert main([*convert, "--reward", f"{tmp_path}/mine.py:many"]) == 0
    assert [group.rewards for group in read(tmp_path / "o.jsonl")] == [[0.0, 0.0], [1.0, 0.0]]
    assert main([*convert, "--reward", f"{tmp_path}/mine.py:single"]) == 2
    assert "raised ValueError" in capsys.readouterr().err
    assert main([*convert, "--reward", f"{tmp_path}/mine.py:single", "--skip-bad"]) == 0
    assert [group.rewards for group in read(tmp_path / "o.jsonl")] == [[0.0, 0.0], [1.0]]
    assert "1 by reward" in capsys.readouterr().out
    path = dump("slime", tmp_path)
    assert main(["convert", str(path), "--out", str(tmp_path / "o.jsonl"), "--reward", "exact"]) == 2
    assert "--reward is for vLLM's outputs and chat completions" in capsys.readouterr().err
