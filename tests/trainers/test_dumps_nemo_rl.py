"""What NeMo-RL's `train_data_step*.jsonl` says in ways of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.made_dumps import ROLLOUTS, made, words, write

from cropi.cli import main
from cropi.data.readers import read
from cropi.data.records import PromptGroup


def converted(tmp_path: Path, content: Any) -> list[PromptGroup]:
    path = write(tmp_path / "train_data_step7.jsonl", content)
    assert main(words("nemo-rl", path, tmp_path / "out.jsonl")) == 0
    return list(read(tmp_path / "out.jsonl"))


def test_rewards_beside_filtered_ones_are_those_of_other_rollouts(tmp_path: Path) -> None:
    """NeMo-RL's dynamic sampling: ``rewards`` counts on over the prompts that were dropped."""
    content = made("nemo-rl")
    right = [line["rewards"] for line in content]
    for line, others in zip(content, [[0.5], [0.5], *right], strict=False):
        line |= {"filtered_rewards": line["rewards"], "rewards": others}
    found = [reward for group in converted(tmp_path, content) for reward in group.rewards]
    assert found == [reward for one in right for reward in one]


def test_ids_may_be_nested_and_one_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a line and of every rollout in it; the file is NeMo-RL's all the same."""
    content = made("nemo-rl")
    names = [line["name"][0] for line in content]
    for line, name in zip(content, names, strict=True):
        line["extra"] = {"key": name} if name == names[0] else [{"key": name}]
    path = write(tmp_path / "train_data_step7.jsonl", content)
    convert = words("nemo-rl", path, tmp_path / "out.jsonl")
    at = convert.index("--id-key") + 1
    assert main([*convert[:at], "extra.key", *convert[at + 1 :]]) == 0
    assert [group.id for group in read(tmp_path / "out.jsonl")] == sorted(set(names))
    assert main([*convert[:at], "extra.no", *convert[at + 1 :]]) == 2
    error = capsys.readouterr().err
    assert (
        "extra.no: is missing, which --id-key names; there are 'key'" in error
        and "not training data" not in error
    )
    assert main([*convert[:at], "nothing", *convert[at + 1 :]]) == 2
    error = capsys.readouterr().err
    assert "jsonl:1, nothing: is missing, which --id-key names; there are 'content', 'rewards'" in error
    assert "'idx'" in error, "of the line, too"


def test_turns_of_the_assistant_in_a_prompt_are_part_of_it(tmp_path: Path) -> None:
    """NeMo-RL marks them too, with log-probs of 0: prompts that begin with one example are not one prompt."""
    content, example = made("nemo-rl"), [9, 20, 21, 22]  # a question, and an answer that nobody sampled
    for line in content:
        line["input_lengths"] = [line["input_lengths"][0] + len(example)]
        line["token_ids"] = [example + line["token_ids"][0]]
        line["token_loss_mask"] = [[0, 1, 1, 1] + line["token_loss_mask"][0]]
        line["generation_logprobs"] = [[0.0] * len(example) + line["generation_logprobs"][0]]
    for number, group in enumerate(converted(tmp_path, content)):
        expected = ROLLOUTS[2 * number : 2 * number + 2]
        assert group.prompt_ids == example + expected[0][0]
        assert group.response_ids == [ids for _, ids, *_ in expected]
