"""Reader of slime's rollout dumps: ``--dump-details DIR`` or ``--save-debug-rollout-data TEMPLATE``.

Every ``.pt`` file is ``{"rollout_id": n, "samples": [...]}``; a sample has ``tokens`` (prompt and response),
``response_length``, ``reward``, ``rollout_log_probs`` (of the response), ``loss_mask``, ``group_index``, ``index``,
``label``, ``prompt`` and ``metadata``. Nothing of slime is needed to read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.errors import CropiError
from cropi.trainers.dumps.pickled import opened_dump
from cropi.trainers.dumps.rollout import Rollout, finite, text_id


def read_dump(
    path: str | Path, *, id_key: str | None = None, temperature: float | None = None
) -> Iterator[Rollout]:
    """The rollouts in one file.

    Args:
        path: the ``.pt`` file.
        id_key: the key of a sample's ``metadata`` with the prompt's id. None: a hash of the prompt's text, because
            slime's ``group_index`` counts groups over the run and is another one in the next epoch.
        temperature: of the sampling (``--rollout-temperature``), which the file does not hold.

    Raises:
        CropiError: another layout, a sample without reward or id, or one of several turns.
    """
    path = Path(path)
    if not path.is_file():
        raise CropiError(f"there is no file {path}")
    with opened_dump(path, "a rollout dump of slime") as saved:
        step, samples = int(saved["rollout_id"]), saved["samples"]
    for number, sample in enumerate(samples):
        yield _rollout(sample, f"{path}, sample {number}", step, id_key, temperature)


def _rollout(
    sample: Mapping[str, Any], where: str, step: int, id_key: str | None, temperature: float | None
) -> Rollout:
    for key in ("tokens", "response_length", "reward"):
        if sample.get(key) is None:
            raise CropiError(f"{where}: no {key!r}")
    tokens, size = [int(t) for t in sample["tokens"]], int(sample["response_length"])
    if not 0 < size < len(tokens):
        raise CropiError(f"{where}: response_length is {size} of {len(tokens)} tokens")
    mask, logprobs = sample.get("loss_mask"), sample.get("rollout_log_probs")
    if mask is not None and not all(mask[-size:]):
        raise CropiError(
            f"{where}: some response tokens are masked (tools, several turns); a trajectory record holds one "
            "uninterrupted response"
        )
    reward, prompt = sample["reward"], sample.get("prompt")
    if isinstance(reward, Mapping):
        raise CropiError(f"{where}: the reward is {reward!r}; dump one number (slime's --reward-key)")
    if id_key is not None:
        name = (sample.get("metadata") or {}).get(id_key)
        if name is None:
            raise CropiError(
                f"{where}: its metadata has no {id_key!r}; put a stable id into the column of "
                "--metadata-key of your prompt data"
            )
    else:
        name = text_id(" ".join(map(str, tokens[:-size])))
    return Rollout(
        id=str(name), reward=finite(reward, "reward", where), step=step, where=where, prompt_ids=tokens[:-size],
        response_ids=tokens[-size:], logprobs=None if logprobs is None else [float(v) for v in logprobs][-size:],
        prompt=prompt, answer=sample.get("label"), temperature=temperature,
    )  # fmt: skip
