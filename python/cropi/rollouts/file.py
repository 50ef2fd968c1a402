"""The file of a rollout: finished prompts go into ``OUT.part``, and into ``OUT`` in the prompts' order at the end.

The first line of ``OUT.part`` holds the settings; every line ends with its checksum. A run that is started again with
the same settings goes on with the prompts that are missing; with other settings, or where a prompt's row is another one
than it was, it raises an error that names what differs. Every record carries a hash of the settings under ``rollout``.
So a finished file can be recognised too: more prompts are added to it, and nothing is sampled twice.

What a model is beside its weights (configuration, buffers) is no part of that hash, since releases of transformers know
other keys: it stands in the first line of ``OUT.part`` and, as JSON in text, in the first record of ``OUT``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cropi.atomic import make_folder, remove, replacing, sync
from cropi.errors import CropiError, shown
from cropi.files import is_folder, is_there, open_to_read, reason, writing
from cropi.locks import is_at, try_lock
from cropi.sealed import check_sums, summed
from cropi.store.differences import first_difference

MARK = "cropi_rollout"
# Of the settings: what a model is beside its weights (``config``, ``buffers``) or beside its name (``files``).
MODEL = "rollout_model"
SCORER = "scorer"  # of a record: the version of the reward function (:class:`cropi.rollouts.rewards.Reward`)
SYNC_AFTER = 10.0  # a sync takes some milliseconds
LONGEST = 500  # characters of a model's settings in a message
REMEDY = "give the same options, another --out, or remove {path}"


class RolloutFile:
    """Records by prompt id, appended as they are finished.

    Args:
        out: the file to be written.
        settings: what the records depend on, in JSON's types; :data:`MODEL` among them is compared where a file has it.
        row_of: the row of a prompt by its id, in JSON's types; None of one that is not rolled out now.

    Raises:
        CropiError: it was begun with other settings or other rows, is written by another process, is not of a rollout,
            or cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        settings: Mapping[str, Any],
        row_of: Callable[[str], Mapping[str, Any] | None] = lambda name: None,
    ) -> None:
        self.out = Path(out)
        if self.out.suffix not in (".jsonl", ".json", ".ndjson"):
            raise CropiError(
                f"out: {out}: records are written as JSON lines; give a path that ends in .jsonl"
            )
        if is_folder(self.out):
            raise CropiError(f"out: {out} is a folder; give the path of a file")
        self.part = self.out.with_name(self.out.name + ".part")
        self.settings = json.loads(json.dumps(dict(settings)))
        self._model = self.settings.pop(MODEL, None) or None
        self._row_of = row_of
        self.mark = hash_of(self.settings)
        self.places: dict[str, int] = {}
        # By which versions of the reward function what is there was scored.
        self.scorers: Counter[str] = Counter()
        self.notes: dict[str, Any] = {}  # what the first line holds beside the settings
        self._begun, self._synced = False, time.monotonic()
        self._file: IO[bytes] | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[RolloutFile]:
        """Open the part file, and read which prompts it and the finished file hold."""
        new = not is_there(self.part)
        with writing(self.part):
            make_folder(self.out.parent)
            file = open(self.part, "a+b", buffering=0)
            if new:
                sync(self.out.parent)
        with file:
            self._file = file
            # Who finished it meanwhile has removed it: what is locked then is not a file that anybody else sees.
            if not try_lock(file.fileno(), self.part.parent) or not is_at(file.fileno(), self.part):
                raise CropiError(
                    f"out: another process writes {self.part}; wait for it, or give another --out"
                )
            try:
                with writing(self.part, self.out):
                    self._begun = self._read()
                    if is_there(self.out):
                        self._take()
            except CropiError:
                if new:
                    remove(self.part)
                raise
            yield self
            self._file = None

    def begin(self, notes: Mapping[str, Any]) -> None:
        """Write the first line, if there is none; ``notes`` are what a run that goes on should know."""
        if not self._begun:
            model = {} if self._model is None else {MODEL: self._model}
            self._append({MARK: self.settings, **model, **notes})
            self._begun = True

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a finished record. It is the operating system's when this returns, and on the disk at most
        :data:`SYNC_AFTER` seconds of work later."""
        self._append({**record, "rollout": self.mark})
        if time.monotonic() - self._synced >= SYNC_AFTER:
            self._sync()

    def finish(self, order: Sequence[str]) -> None:
        """Write the records of these prompts to the file, whole or not at all, and remove the part file."""
        assert self._file is not None
        with summed(self.out), replacing(self.out) as temporary, open(temporary, "wb") as target:
            model = self._model
            for name in order:
                if name in self.places:
                    self._file.seek(self.places[name])
                    line = _checked(_line(self._file), self.part)
                    if model is not None:
                        record = _object(line, self.part) | {MODEL: json.dumps(model, ensure_ascii=False)}
                        line, model = json.dumps(record, ensure_ascii=False).encode(), None
                    target.write(line + b"\n")
        with writing(self.part):
            self.part.unlink()

    # --------------------------------------------------------------------------------------------- inside
    def _sync(self) -> None:
        assert self._file is not None
        with writing(self.part):
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _append(self, value: Mapping[str, Any]) -> None:
        assert self._file is not None
        end = self._file.seek(0, os.SEEK_END)
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:  # NaN, or half a character
            raise CropiError(
                f"out: the record {shown(value.get('id'))} cannot be written to {self.part} ({error}); "
                f"{REMEDY.format(path=self.out)}"
            ) from error
        data = text + b"\t%08x\n" % zlib.crc32(text)
        try:
            written = 0
            while written < len(data):  # a disk that is nearly full takes a part
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            with contextlib.suppress(OSError):  # the next run cuts an unfinished line off
                self._file.truncate(end)
            raise CropiError(
                f"cannot write {self.part}: {reason(error)}; finished prompts are kept"
            ) from error
        if "id" in value:
            self.places[str(value["id"])] = end

    def _read(self) -> bool:
        """Take note of what the part file holds; a line that a kill left unfinished is cut off."""
        assert self._file is not None
        self._file.seek(0)
        first = True
        while True:
            start = self._file.tell()
            line = _line(self._file)
            if not line.endswith(b"\n"):
                self._file.truncate(start)
                return not first
            held = _object(_checked(line, self.part), self.part)
            if first:
                self._check(held.get(MARK), self.part)
                self._check_model(held.pop(MODEL, None), self.part)
                self.notes = {key: value for key, value in held.items() if key != MARK}
                first = False
            else:
                self._check_row(held, self.part)
                self.places[str(held.get("id"))] = start
                self.scorers[str(held.get(SCORER, ""))] += 1

    def _check(self, settings: Any, path: Path) -> None:
        if not isinstance(settings, dict):
            raise CropiError(f"out: {path} was not begun by a rollout; {REMEDY.format(path=path)}")
        keys = dict.fromkeys([*settings, *self.settings])
        for key in keys:
            before, now = settings.get(key), self.settings.get(key)
            if before != now:
                raise CropiError(
                    f"out: {path} was begun with {key} = {shown(before)}, and now it is {shown(now)}; "
                    f"{REMEDY.format(path=path)}"
                )

    def _check_model(self, before: Any, path: Path) -> None:
        """Check that the model is the one of the file beside its weights or name; the file's own settings are kept."""
        if before is None or self._model is None:
            return
        if differs := first_difference({"model": before}, {"model": self._model}):
            raise CropiError(
                f"out: {path} was begun with another model: {differs.field} = {shown(differs.left, LONGEST)}, and now "
                f"it is {shown(differs.right, LONGEST)}; {REMEDY.format(path=path)}"
            )
        self._model = before

    def _check_row(self, held: Mapping[str, Any], path: Path) -> None:
        """Check that a record is of the prompt that its id names now."""
        name = str(held.get("id"))
        for key, now in (self._row_of(name) or {}).items():
            if (before := held.get(key)) != now:
                raise CropiError(
                    f"out: {path} holds the prompt {name!r:.100} with {key} = {shown(before)}, and now it is "
                    f"{shown(now)}: its responses and rewards are of the one before; give a prompt that has changed an "
                    f"id of its own, give another --out, or remove {path}"
                )

    def _take(self) -> None:
        """Take the records of the finished file over."""
        self.begin({})
        check_sums(self.out)
        with open_to_read(self.out) as file:
            for number, line in enumerate(file, 1):
                held = _object(line, self.out)
                if held.get("rollout") != self.mark:
                    raise CropiError(
                        f"out: {self.out}:{number} holds a record that was not made with these settings; "
                        f"{REMEDY.format(path=self.out)}"
                    )
                self._check_model(_parsed(held.pop(MODEL, None)), self.out)
                if str(held.get("id")) not in self.places:
                    self._check_row(held, self.out)
                    self._append(held)
                    self.scorers[str(held.get(SCORER, ""))] += 1


def hash_of(settings: Mapping[str, Any]) -> str:
    """Sixteen hex digits that stand for some settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _line(file: IO[bytes]) -> bytes:
    """The next line of a file without a buffer."""
    parts = []
    while part := file.read(1 << 16):
        end = part.find(b"\n")
        if end >= 0:
            file.seek(end + 1 - len(part), os.SEEK_CUR)
            parts.append(part[: end + 1])
            break
        parts.append(part)
    return b"".join(parts)


def _checked(line: bytes, path: Path) -> bytes:
    """A line of the part file without its CRC-32, behind a tab, which JSON has nowhere."""
    text, _, check = line.rstrip(b"\n").partition(b"\t")
    if check != b"%08x" % zlib.crc32(text):
        raise CropiError(
            f"out: {path} is damaged: the checksum of a line does not match; {REMEDY.format(path=path)}"
        )
    return text


def _parsed(text: Any) -> Any:
    """What a text holds in JSON; of one that is none, itself."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


def _object(line: bytes, path: Path) -> dict[str, Any]:
    try:
        held = json.loads(line)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise CropiError(f"out: {path} holds a line that is not a record; {REMEDY.format(path=path)}")
    return held
