"""Reader of slime's rollout dumps: ``--dump-details DIR`` or ``--save-debug-rollout-data TEMPLATE``.

Every ``.pt`` file is ``{"rollout_id": n, "samples": [...]}``, the samples flat or in lists by group. A sample has
``tokens`` (prompt and response), ``response_length``, ``reward``, ``rollout_log_probs`` and ``loss_mask`` (of the
response), ``status``, ``remove_sample``, ``label``, ``prompt`` and ``metadata``. Nothing of slime is needed to read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.checked import is_id
from cropi.data.forms import hashed
from cropi.errors import CropiError
from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    finite,
    is_bit,
    listed,
    log_probs,
    loss_mask,
    names,
    only_tokens,
    prompt_id,
    shown,
    token_ids,
    whole,
)
from cropi.trainers.dumps.pickled import contents, items_of, load_dump
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked, messages, plain_answer
from cropi.trainers.dumps.rows import named_reward

WHAT = "a rollout dump of slime"
ROLLOUT = ("group_id", "rollout_id")  # of a sample: slime's two names of it
ID_KEY = "id"  # of the metadata: where `cropi select --format slime` puts it


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one ``.pt`` file. Samples that were aborted, or that slime does not train on, are left out.

    Prompt ids: ``reading.id_key``, a key of a sample's ``metadata``, or ``id`` where there is one, else a hash of the
    prompt's tokens, because slime's ``group_index`` counts groups over the run and is another one in the next epoch.
    ``reading.columns`` may be ``{"reward": name}``, the reward to take of samples whose reward is a table.
    """
    saved = load_dump(path, WHAT, allow_pickle=reading.allow_pickle, largest=reading.largest, by_items=True)
    if not isinstance(saved, Mapping) or "samples" not in saved or "rollout_id" not in saved:
        held = names(saved) if isinstance(saved, Mapping) else shown(saved)
        raise CropiError(f"{path} is not {WHAT}, which has 'rollout_id' and 'samples', but holds {held}")
    try:
        step = whole(saved["rollout_id"], "rollout_id", str(path))
        samples = listed(saved["samples"], "samples", str(path))
    except BadSample as error:  # of the file, so that leaving out a sample is no remedy
        raise CropiError(f"{path} is not {WHAT}: {error.where}: {error.problem}") from error
    yield from rollouts_of(lambda: items_of(samples, path, WHAT), str(path), step, reading, left)


def rollouts_of(
    samples: Callable[[], Iterable[Any]], where: str, step: int, reading: Reading, left: Left
) -> Iterator[Rollout]:
    """The rollouts of ``samples()``, slime's, flat or in lists by group, as :func:`read_dump` reads them.

    Args:
        samples: is asked twice.
        where: named in messages.
        step: the number of the rollout.
        reading, left: as there.

    Raises:
        BadSample: a sample without reward or id, or with a field of another form.
    """
    numbers = (_of_rollout(contents(held)) for held, _ in _flat(samples(), where))
    counts = Counter(number for number in numbers if number is not None)
    several = {number for number, count in counts.items() if count > 1}
    yield from left.each(_flat(samples(), where), lambda pair: _rollout(*pair, step, reading, several))


def _of_rollout(sample: Any) -> tuple[str, int | str] | None:
    """The rollout that a sample is a part of, as (field, number), where slime's user has set one."""
    held = [(key, sample.get(key)) for key in ROLLOUT] if isinstance(sample, Mapping) else []
    return next(((key, value) for key, value in held if isinstance(value, (int, str))), None)


def _flat(samples: Iterable[Any], where: str) -> Iterator[tuple[Any, str]]:
    """The samples one by one, whether they stand in lists by group or not, and what each is called."""
    for number, entry in enumerate(samples):
        if isinstance(entry, (list, tuple)):
            yield from ((sample, f"{where}, group {number}, sample {k}") for k, sample in enumerate(entry))
        else:
            yield entry, f"{where}, sample {number}"


def _rollout(
    held: Any, where: str, step: int, reading: Reading, several: set[tuple[str, int | str]]
) -> Rollout:
    sample = contents(held)
    if not isinstance(sample, Mapping):
        raise BadSample(where, "sample", f"should be a table of fields, got {shown(held)}")
    status = _used(sample, where)
    for key in ("tokens", "response_length", "reward"):
        if sample.get(key) is None:
            raise BadSample(where, key, "is missing")
    only_tokens(sample, where)
    if (rollout := _of_rollout(sample)) is not None and rollout in several:
        key, number = rollout
        raise BadSample(
            where, key, f"{shown(number)} is that of several samples, so they are one rollout of several sequences "
            "with one reward; a trajectory record holds one prompt and one response",
        )  # fmt: skip
    tokens = token_ids(sample["tokens"], "tokens", where)
    size = whole(sample["response_length"], "response_length", where)
    if size == 0:
        raise Unused(where, "response_length", "is 0")
    if not 0 < size < len(tokens):
        raise BadSample(where, "response_length", f"is {shown(size)} of {len(tokens)} tokens")
    key = "loss_mask" if sample.get("loss_mask") is not None else "loss_masks"
    mask = loss_mask(sample.get(key), size, key, where)
    return checked(Rollout(
        id=_id(sample, tokens[:-size], reading.id_key, where), step=step,
        reward=_reward(sample["reward"], reading.columns.get("reward"), where), where=where, prompt_ids=tokens[:-size],
        response_ids=tokens[-size:], loss_mask=mask,
        logprobs=log_probs(sample.get("rollout_log_probs"), size, mask, "rollout_log_probs", where),
        prompt=messages(sample.get("prompt")), answer=plain_answer(sample.get("label"), "label", where),
        truncated={"truncated": True, "completed": False}.get(status), temperature=reading.temperature,
    ))  # fmt: skip


def _used(sample: Mapping[str, Any], where: str) -> str:
    """The status of a sample that slime trains on; "" where it is no text."""
    status = contents(sample.get("status"))
    status = getattr(status, "value", status)
    status = status if isinstance(status, str) else ""
    if status in ("aborted", "pending"):
        raise Unused(where, "status", f"is {status!r}")
    if is_bit(sample.get("remove_sample")) and sample["remove_sample"]:
        raise Unused(where, "remove_sample", "is set")
    return status


def _reward(held: Any, key: str | None, where: str) -> float:
    if isinstance(held, Mapping):
        if key is None:
            raise BadSample(
                where, "reward", f"is a table: {names(held)}",
                "name the one that is trained on (slime's --reward-key) with --columns reward=NAME, or pass --skip-bad",
            )  # fmt: skip
        held = named_reward(held, key, where)
    elif key is not None:
        raise BadSample(
            where, "reward", f"is {shown(held)}, no table with the {shown(key)} that --columns reward= names",
            "leave --columns out, or pass --skip-bad",
        )  # fmt: skip
    return finite(held, "reward", where)


def _id(sample: Mapping[str, Any], prompt: list[int], key: str | None, where: str) -> str:
    """The prompt's id: what ``key`` names in the metadata, or a hash of the prompt's tokens."""
    metadata = sample.get("metadata")
    name = metadata.get(key or ID_KEY) if isinstance(metadata, Mapping) else None
    if key is None and not is_id(name):
        return hashed(" ".join(map(str, prompt)))
    key = key or ID_KEY
    if name is None:
        raise BadSample(
            where, "metadata", f"has no {shown(key)}",
            "put a stable id into the column of --metadata-key of your prompt data, or pass --skip-bad",
        )  # fmt: skip
    return prompt_id(name, f"metadata.{key}"[:80], where)
