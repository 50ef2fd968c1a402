"""A file with a row a response, for trainers whose hooks see responses one by one: ``cropi`` reads it as it is."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cropi.data.keys import RENDERED
from cropi.trainers.dumps.fields import BadSample
from cropi.trainers.dumps.rollout import Rollout

logger = logging.getLogger(__name__)


class ResponseLog:
    """Rows of one process in a folder, appended as they come; several processes write files of their own.

    A rollout that cannot be recorded is trained on all the same: it is left out and said, the 1st, 2nd, 4th, 8th, ...
    time.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self.failures = Path(folder), 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, kind: str) -> Path:
        """The file of a kind of rows."""
        return self.folder / f"{kind}-{socket.gethostname()}-{os.getpid()}.jsonl"

    def add(self, kind: str, read: Callable[[str], Rollout]) -> None:
        """Append the row of a rollout that ``read`` makes; it is handed what messages call the place."""
        path = self.path(kind)
        try:
            row = response_row(read(str(path)))
            data = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            # One write: another task's line stands before or behind.
            with open(path, "ab", buffering=0) as file:
                if (taken := file.write(data)) < len(data):
                    # Else the next line would go on in the middle of this one.
                    file.truncate(file.tell() - taken)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (BadSample, OSError) as error:
            self.failures += 1
            if self.failures & (self.failures - 1) == 0:
                logger.warning("%s: %d rollouts were not recorded; the last: %s", path, self.failures, error)


def response_row(rollout: Rollout) -> dict[str, Any]:
    """The row of one response; rows of one id become one record."""
    ids = rollout.response_ids or []
    row = {
        "id": rollout.id, "prompt": rollout.prompt, "answer": rollout.answer, "reward": rollout.reward,
        "prompt_ids": rollout.prompt_ids, "response_ids": rollout.response_ids, "logprobs": rollout.logprobs,
        "loss_mask": rollout.loss_mask or [1] * len(ids), "temperature": rollout.temperature,
        "truncated": rollout.truncated, RENDERED: isinstance(rollout.prompt, str) or None,
    }  # fmt: skip
    return {key: value for key, value in row.items() if value is not None}
