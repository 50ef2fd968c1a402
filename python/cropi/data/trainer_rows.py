"""Prompts in the columns that a trainer reads, so that its own command line takes the file.

==========  ========  =================================================================================================
trainer     file      columns
==========  ========  =================================================================================================
verl        parquet   ``data_source``, ``prompt`` (messages), ``ability``, ``reward_model`` (``style``,
                      ``ground_truth``), ``extra_info`` (``index``, the prompt's id; ``split``; the record's other keys)
slime       jsonl     ``prompt`` (messages), ``label``, ``metadata`` (``id`` and the record's other keys), ``tools``
openrlhf    jsonl     ``input`` (messages), ``label``, ``datasource``, ``id``
==========  ========  =================================================================================================

slime: ``--input-key prompt --label-key label --apply-chat-template``. OpenRLHF: ``--data.input_key input
--data.label_key label --data.apply_chat_template``. verl needs no option.
"""

from __future__ import annotations

import json
import re
from typing import Any

from cropi.data.chat import as_messages
from cropi.data.keys import RENDERED
from cropi.data.records import PromptGroup
from cropi.data.rewards import final_answer
from cropi.errors import CropiError

# The format of the file that each trainer's rows are written to.
FILES = {"verl": "parquet", "slime": "jsonl", "openrlhf": "jsonl"}


def check_text(group: PromptGroup) -> None:
    """Check that a record has the text of its prompt.

    Raises:
        CropiError: it has token ids alone.
    """
    if group.prompt is None:
        raise CropiError(
            f"{group.where}: the record {group.id!r:.100} has prompt_ids but no text, which trainers read; "
            "give --dataset"
        )


def trainer_row(trainer: str, group: PromptGroup, data_source: str | None = None) -> dict[str, Any]:
    """The row of one prompt.

    Args:
        trainer: one of :data:`FILES`.
        group: the prompt's record.
        data_source: the name by which verl finds its reward function; None: the record's ``data_source``, else its
            ``task``.

    Raises:
        CropiError: the record has no text, text that was rendered already, no answer, or (verl) no data source.
    """
    check_text(group)
    if group.answer is None:
        raise CropiError(
            f"format {trainer}: {group.where}: the record {group.id!r:.100} has no 'answer', which {trainer} hands to "
            "its reward function; add it to the records, name its column with --columns answer=NAME, or give --dataset"
        )
    if isinstance(group.prompt, str) and group.extra.get(RENDERED) is True:
        raise CropiError(
            f"format {trainer}: {group.where}: the prompt of the record {group.id!r:.100} is text as the policy read "
            f"it (from a dump), and {trainer} would apply its chat template to it; give its own --dataset with "
            f"--format {FILES[trainer]}, or --format jsonl and train on 'prompt' without a template"
        )
    prompt = as_messages(group.prompt)
    source = data_source or group.extra.get("data_source") or group.task
    extra = {key: value for key, value in group.extra.items() if key != "data_source"}
    if trainer == "verl":
        return _verl(group, prompt, source, extra)
    if trainer == "slime":
        row = {"prompt": prompt, "label": answer_text(group.answer), "metadata": {"id": group.id, **extra}}
        return row if group.tools is None else row | {"tools": group.tools}
    return {
        "input": prompt, "label": answer_text(group.answer), "datasource": str(source or "default"), "id": group.id
    }  # fmt: skip


def answer_text(answer: Any) -> str:
    """A reference answer as the string that reward functions compare with: text as it is, anything else as JSON; of a
    solution that ends in ``#### 1,234`` (GSM8K) the number, without commas, as the trainers' own preparation has it."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, str):
        return json.dumps(answer, ensure_ascii=False)
    final = final_answer(answer) if "####" in answer else answer
    return final.replace(",", "") if final != answer and re.fullmatch(r"-?[\d,]+(\.\d+)?", final) else final


def _verl(group: PromptGroup, prompt: list[Any], source: Any, extra: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(source, str) or not source:
        raise CropiError(
            f"format verl: {group.where}: the record {group.id!r:.100} has neither 'data_source' nor 'task', and verl "
            "finds its reward function by data_source; give --data-source NAME"
        )
    held = extra.pop("extra_info", None)
    held = {**(held if isinstance(held, dict) else {}), **extra}
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": group.task or source,
        "reward_model": {"style": "rule", "ground_truth": answer_text(group.answer)},
        "extra_info": {**held, "index": group.id, "split": str(held.get("split") or "train")},
    }
