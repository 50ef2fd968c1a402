"""Readers of what verl writes while it trains.

==================================================  ======================================================  =======
option of verl                                      file                                                    tokens
==================================================  ======================================================  =======
``trainer.rollout_data_dir=DIR``                    ``DIR/{step}.jsonl``                                    text
``skip.rollout_tq.enable=True`` (0.8 and later)     ``.../{step}/{n}/tq_batch.pt``                          ids
``DataProto.save_to_disk`` (any)                    a pickle, ``gen_batch.dp``                              ids
==================================================  ======================================================  =======

The text is decoded without special tokens, prompt and response each on its own, so it **cannot be turned back into
the tokens that were sampled**: use it to look at, or for a first try; use token ids to select. The two binary
formats are pickles: read only what you wrote yourself.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.data.scan import LossyTokens
from cropi.errors import CropiError, optional
from cropi.files import lines_of
from cropi.trainers.dumps.pickled import opened_dump
from cropi.trainers.dumps.rollout import Rollout, finite, text_id
from cropi.trainers.dumps.verl_batch import rollouts_of_proto, rollouts_of_table
from cropi.trainers.verl.selected import ID_KEY

TEXT_KEYS = ("input", "output", "score", "step")


def read_dump(
    path: str | Path,
    *,
    id_key: str | None = None,
    temperature: float | None = None,
    prompts: Mapping[str, Any] | None = None,
) -> Iterator[Rollout]:
    """The rollouts in one file, by its ending.

    Args:
        path: ``.jsonl``, ``.pt`` or ``.dp``.
        id_key: where the prompt's id stands (default ``extra_info.index``; in text, the hash of the prompt's text).
        temperature: of the sampling, which the files do not hold.
        prompts: for text: ``(id, messages)`` by the prompt's decoded text, see :func:`prompts_by_text`.

    Raises:
        CropiError: not such a file, or of an unknown layout.
    """
    path = Path(path)
    if not path.is_file():
        raise CropiError(f"there is no file {path}")
    if path.suffix == ".jsonl":
        yield from _text(path, id_key, temperature, prompts)
    elif path.suffix == ".pt":
        yield from _table(path, id_key or ID_KEY, temperature)
    elif path.suffix == ".dp":
        yield from _proto(path, id_key or ID_KEY, temperature)
    else:
        raise CropiError(
            f"{path}: a dump of verl ends in .jsonl (text), .pt (transfer queue) or .dp (DataProto)"
        )


def prompts_by_text(rows: Any, ids: list[str], tokenizer: Any, prompt_key: str = "prompt") -> dict[str, Any]:
    """``(id, messages)`` of every row of a dataset by the text that verl's dump shows of its prompt.

    That text is the rendered prompt, tokenised and decoded without special tokens.

    Args:
        rows: dictionaries with messages under ``prompt_key``.
        ids: their prompt ids.
        tokenizer: the policy's.
    """
    found: dict[str, Any] = {}
    for name, row in zip(ids, rows, strict=True):
        messages = row[prompt_key]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if text in found:
            raise CropiError(
                f"the prompts {found[text][0]!r} and {name!r} have the same text, so the dump does not tell them apart"
            )
        found[text] = (name, messages)
    return found


def _text(
    path: Path, id_key: str | None, temperature: float | None, prompts: Mapping[str, Any] | None
) -> Iterator[Rollout]:
    warnings.warn(
        f"{path} holds text without special tokens: its responses are tokenised again, which may give other "
        "tokens than were sampled, and there are no log-probs; dump token ids to be exact (skip.rollout_tq)",
        LossyTokens,
        stacklevel=2,
    )
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            missing = [key for key in TEXT_KEYS if key not in row]
        except (ValueError, TypeError) as error:
            raise CropiError(f"{where}: not a JSON object ({error})") from None
        if missing:
            raise CropiError(
                f"{where}: no {missing[0]!r}, so this is not a rollout dump of verl ({', '.join(row)})"
            )
        name, prompt = text_id(row["input"]), row["input"]
        if id_key is not None:
            if row.get(id_key) is None:
                raise CropiError(f"{where}: no {id_key!r} in this row, which holds {', '.join(row)}")
            name = str(row[id_key])
        elif prompts is not None:
            if row["input"] not in prompts:
                raise CropiError(
                    f"{where}: no row of the dataset renders to the prompt {row['input'][:60]!r}; give the "
                    "dataset and the model that the rollouts were made with"
                )
            name, prompt = prompts[row["input"]]
        yield Rollout(
            id=name, reward=finite(row["score"], "score", where), step=int(row["step"]), where=where, prompt=prompt,
            response=row["output"], answer=row.get("gts"), temperature=temperature, extra={"lossy": True},
        )  # fmt: skip


def _table(path: Path, id_key: str, temperature: float | None) -> Iterator[Rollout]:
    optional("tensordict")  # the file is a pickle of its classes
    with opened_dump(path, "a batch of verl's transfer queue") as saved:
        table, keys, tags, step = (saved[name] for name in ("tensordict", "keys", "tags", "global_steps"))
    yield from rollouts_of_table(
        table, keys, tags, int(step), id_key=id_key, temperature=temperature, where=str(path)
    )


def _proto(path: Path, id_key: str, temperature: float | None) -> Iterator[Rollout]:
    optional("verl")  # the file is a pickle of its classes
    with open(path, "rb") as file:
        try:
            proto = pickle.load(file)
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise CropiError(f"{path} is not a DataProto of verl ({error})") from error
    if not hasattr(proto, "non_tensor_batch"):
        raise CropiError(f"{path} holds a {type(proto).__name__}, not a DataProto of verl")
    # The step is the name of the folder, as in .../{step}/gen_batch.dp.
    step = re.fullmatch(r"\d+", path.parent.name)
    yield from rollouts_of_proto(
        proto, int(step[0]) if step else 0, id_key=id_key, temperature=temperature, where=str(path)
    )
