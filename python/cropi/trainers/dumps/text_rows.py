"""Readers of dumps that hold a row a response as text: OpenRLHF's batch inference, SkyRL, AReaL.

==========  ===============================================================  ==========================================
source      file                                                             columns
==========  ===============================================================  ==========================================
openrlhf    ``openrlhf.cli.batch_inference`` (``--eval_task generate``, then  ``input``, ``output``, ``reward``
            ``rm``)
skyrl       ``trainer.dump_eval_results``: ``{data_source}.jsonl``           ``input_prompt``, ``output_response``,
                                                                             ``score``, ``stop_reason``, ``env_extras``
areal       ``dump_to_file``: ``{version}/{task_id}.jsonl``                  ``prompt``, ``completion``, ``reward``,
                                                                             ``tail_version`` (the policy's; of the
                                                                             prompt's tokens it is -1, so that
                                                                             ``head_version``, the smallest, is too)
==========  ===============================================================  ==========================================

Text cannot be turned back into the tokens that were sampled with certainty, and none of these holds log-probs.

AReaL's rollouts of several turns are refused: as ``segments``, or because it takes the last tokens of the text, as
many as the policy sampled, for the completion. Then samples of one task begin with different prompts. SkyRL's
step-wise rollouts are refused too: every turn is a row, whose prompt begins with that of the turn before, and the
last one alone has the reward.

AReaL and SkyRL write special tokens as text. A response without one at its end (that ends in ``>``) was cut by a limit:
no end token is appended to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cropi.data.keys import was_cut
from cropi.data.scan import LossyTokens
from cropi.errors import warn
from cropi.form import nested
from cropi.trainers.dumps.fields import BadSample, Left, Unused, check_keys, whole
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_dump, text_of

TURNS = "record the tokens with their loss_mask in the workflow (docs/trajectories.md), or pass --skip-bad"


@dataclass(frozen=True)
class Columns:
    """Where a source's rows hold what a record is made of; ``special``: special tokens stand in its text."""

    prompt: str
    response: str
    reward: str
    answer: str | None = None
    step: str | None = None
    stop: str | None = None
    task: str | None = None
    special: bool = False


COLUMNS = {
    "openrlhf": Columns("input", "output", "reward", answer="label"),
    "skyrl": Columns(
        "input_prompt", "output_response", "score", answer="env_extras.reward_spec.ground_truth",
        stop="stop_reason", task="data_source", special=True,
    ),
    "areal": Columns("prompt", "completion", "reward", step="tail_version", special=True),
}  # fmt: skip


def read_dump(path: Path, source: str, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file of one of :data:`COLUMNS`. Prompt ids: ``reading.id_key``, a column, dots leading into
    nested ones, or a hash of the prompt's text.
    """
    columns = COLUMNS[source]
    warn_text(path, left)
    step = step_of(path)

    def read(one: tuple[str, dict[str, Any], bool]) -> Rollout:
        where, row, alike = one
        check_keys(row, (columns.prompt, columns.response), where, f"a dump of {source}")
        if row.get("segments"):
            raise BadSample(
                where, "segments", "are several turns of the policy and what stands between them, which text without "
                "token ids does not tell apart", TURNS,
            )  # fmt: skip
        if not alike:
            raise BadSample(
                where, columns.prompt, "differs from that of a row beside it that is of the same task or goes on with "
                "it, so these are several turns, and text does not tell their tokens apart", TURNS,
            )  # fmt: skip
        if row[columns.response] == "":
            raise Unused(where, columns.response, "is empty")
        prompt = text_of(row[columns.prompt], columns.prompt, where)
        stop = row.get(columns.stop) if columns.stop else None
        task = row.get(columns.task) if columns.task else None
        response = text_of(row[columns.response], columns.response, where)
        cut = was_cut(stop)
        if cut is None and columns.special:
            cut = not response.endswith(">")
        extra: dict[str, Any] = {"lossy": True}
        if isinstance(task, str) and task:
            extra["task"] = task
        return checked(Rollout(
            id=id_of(row, reading.id_key, prompt, where),
            reward=reward_of(row.get(columns.reward), columns.reward, where),
            step=step if columns.step not in row else whole(row[str(columns.step)], str(columns.step), where),
            where=where, prompt=prompt, response=response, truncated=cut,
            answer=nested(row, columns.answer) if columns.answer else None, temperature=reading.temperature,
            extra=extra,
        ))  # fmt: skip

    yield from left.each(_alike(rows_of_dump(path, left), columns.prompt if columns.special else None), read)


def _alike(
    pairs: Iterable[tuple[str, dict[str, Any]]], prompt: str | None
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Every row, and whether the rows beside it that are of the same task or rollout have the same ``prompt``.

    None: the text holds no special tokens, so that a prompt may begin with another one.
    """
    some: list[tuple[str, dict[str, Any]]] = []
    for pair in chain(pairs, [None]):
        if some and (pair is None or not _goes_on(some[-1][1], pair[1], prompt)):
            alike = all(_asked(row, prompt) == _asked(some[0][1], prompt) for _, row in some)
            yield from ((where, row, alike) for where, row in some)
            some = []
        if pair is not None:
            some.append(pair)


def _asked(row: dict[str, Any], prompt: str | None) -> Any:
    return None if prompt is None else row.get(prompt)


def _goes_on(row: dict[str, Any], after: dict[str, Any], prompt: str | None) -> bool:
    """Whether a row is the next sample of the same task, or the next turn of the same rollout.

    Samples have rising numbers; those of a run that was restarted begin anew. A turn's prompt is longer than that of
    the turn before, and begins with it.
    """
    number, next_one = row.get("sample_idx"), after.get("sample_idx")
    if row.get("task_id") is not None and isinstance(number, int) and isinstance(next_one, int):
        return bool(row["task_id"] == after.get("task_id") and number < next_one)
    before, asked = _asked(row, prompt), _asked(after, prompt)
    return isinstance(before, str) and isinstance(asked, str) and before != asked and asked.startswith(before)


def warn_text(
    path: Path, left: Left, held: str = "text", remedy: str = "store token ids to be exact"
) -> None:
    """Say, once for all files that ``left`` is of, that a file holds text."""
    if left.told:
        return
    left.told = True
    warn(
        f"{path} holds {held}: its responses are tokenised again, which may give other tokens than were sampled, and "
        f"there are no log-probs; {remedy}",
        LossyTokens,
    )


def step_of(path: Path) -> int:
    """The training step that the name of a file or of its folder says, or 0."""
    for name in (path.name, path.parent.name):
        if match := re.search(r"(?:step|completions)[_-]?(\d{1,18})", name):
            return int(match[1])
        if match := re.fullmatch(r"(\d{1,18})(\.\w+)*", name):
            return int(match[1])
    return 0
