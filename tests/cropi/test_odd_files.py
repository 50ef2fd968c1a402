"""Odd files that are legal, through every reader: the rows that stand in them, or an error that names the file."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from data.make_formats import records
from support import fuzz
from support.made_dumps import KINDS, MORE, made
from test_long_values import NO_MODEL, OF_LINES, READERS, written

from cropi.cli.contents import describe_rows
from cropi.data.export import read_dataset
from cropi.data.readers import read
from cropi.errors import printable
from cropi.rollouts.prompts import read_prompts
from cropi.trainers.dumps.auto import Dumps
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.recognise import recognise

pytestmark = pytest.mark.long

# Characters at which str.splitlines() breaks, and others that stand in JSON as they are.
TEXT = "a\u2028b\u2029c\x85d\x7fe\ufefff é \U0001f600"


def plain(value: Any) -> Any:
    """In types that compare as their values do."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in ("where", "line", "policy")}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


def of_dump(kind: str) -> Callable[[Any], Any]:
    def records_of(path: Path) -> Any:
        return plain(
            list(read(Dumps({str(path): [path]}, kind.split()[0], Reading(temperature=0.7), False).sources))
        )

    return records_of


def rows() -> list[dict[str, Any]]:
    return [record | {"prompt": TEXT + str(i)} for i, record in enumerate(records()[:3])]


def texts(content: Any) -> Any:
    """The content, with odd characters where it holds text of a prompt or a response."""
    if isinstance(content, dict):
        return {key: texts(one) for key, one in content.items()}
    if isinstance(content, list):
        return [texts(one) for one in content]
    return (
        f"{content}{TEXT}"
        if isinstance(content, str) and content[:1] in "qr" and content[1:].isdigit()
        else content
    )


# By the names of test_long_values.py: a file's name, its lines, what reads them.
LINES: dict[str, list[tuple[str, list[Any], Callable[[Any], Any]]]] = {
    "data.readers.read": [
        ("r.jsonl", rows(), lambda path: plain(list(read(path)))),
        ("r.jsonl", rows(), lambda path: plain(list(read(path, columns={"answer": "level"})))),
    ],
    "data.export.read_dataset": [("d.jsonl", rows(), lambda path: list(read_dataset(path)))],
    "rollouts.prompts.read_prompts": [
        (
            "q.jsonl",
            rows(),
            lambda path: [(one.id, one.row, list(one.ids)) for one in read_prompts(path, NO_MODEL)[0]],
        )
    ],
    "cli.contents.describe_rows": [
        ("i.jsonl", [{"id": "a", "prompt": TEXT}] * 2, lambda path: plain(describe_rows(Path(path))))
    ],
    "trainers.dumps.recognise.recognise": [("d.jsonl", rows(), recognise)],
    "trainers.dumps.auto.read_rollouts": [
        (name, texts(made(kind)), of_dump(kind))
        for kind, (name, *_) in (KINDS | MORE).items()
        if ".json" in name
    ],
}


# ------------------------------------------------------------------------------------------------ ways to write lines
class Kept(io.BytesIO):
    """Bytes that stay when the stream is closed."""

    def close(self) -> None:
        pass


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


def zstd_stream(data: bytes) -> bytes:
    """Without the size of the content."""
    held = Kept()
    with pyarrow.CompressedOutputStream(held, "zstd") as stream:
        for start in range(0, len(data), 50):
            stream.write(data[start : start + 50])
    return held.getvalue()


def twice(pack: Callable[[bytes], bytes]) -> Callable[[list[bytes]], bytes]:
    """Two packed files, one behind the other."""
    return lambda lines: pack(joined(lines[:1])) + pack(joined(lines[1:]))


def later_damaged(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The first line packed, and behind it the others, whose stream has another first byte."""

    def made(data: bytes) -> bytes:
        first, *others = data.splitlines(keepends=True)
        return pack(first) + b"?" + pack(b"".join(others))[1:]

    return made


def joined(lines: list[bytes], end: bytes = b"\n") -> bytes:
    return b"".join(line + end for line in lines)


MARK = b"\xef\xbb\xbf"
# The same lines, written in another way.
SAME: dict[str, Callable[[list[bytes]], bytes]] = {
    "byte order mark": lambda lines: MARK + joined(lines),
    "CRLF": lambda lines: joined(lines, b"\r\n"),
    "mark and CRLF": lambda lines: MARK + joined(lines, b"\r\n"),
    "no newline at the end": b"\n".join,
    "blank lines": lambda lines: b"\n \n\r\n" + joined(lines, b"\n\n\t\n") + b"  ",
    "blanks around": lambda lines: joined([b" " + line + b"\t" for line in lines]),
    "escaped": lambda lines: joined([json.dumps(json.loads(line)).encode() for line in lines]),
    "gzip": lambda lines: gzip.compress(joined(lines)),
    "gzip of several members": twice(gzip.compress),
    "gzip with an empty member": lambda lines: gzip.compress(b"") + gzip.compress(joined(lines)),
    "zstd": lambda lines: zstd(joined(lines)),
    "zstd without a size": lambda lines: zstd_stream(joined(lines)),
    "zstd of several frames": twice(zstd),
    "bz2 of several streams": twice(bz2.compress),
    "xz of several streams": twice(lzma.compress),
    "xz with padding": lambda lines: lzma.compress(joined(lines)) + bytes(8),
}
# No line can be read in these.
NONE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "blank": lambda data: b" \n\t\r\n\n",
    "a mark": lambda data: MARK,
    "empty gzip": lambda data: gzip.compress(b""),
    "blank gzip": lambda data: gzip.compress(b"\n\n"),
    "empty zstd": lambda data: zstd_stream(b""),
    "UTF-16": lambda data: data.decode("utf-8", "replace").encode("utf-16"),
    "UTF-16 without a mark": lambda data: data.decode("utf-8", "replace").encode("utf-16-le"),
    "UTF-32": lambda data: data.decode("utf-8", "replace").encode("utf-32"),
    "Latin-1": lambda data: data.replace(b'"', b'"\xe9', 1),
    "half of a pair": lambda data: data.replace(b'": ', b'\\ud83d": ', 1),
    "zeros": lambda data: bytes(4096),
    "zeros behind": lambda data: data + bytes(4096),
    "cut": lambda data: data[:-9],
    "gzip, cut": lambda data: gzip.compress(data)[:-9],
    "bz2, a later stream damaged": later_damaged(bz2.compress),
    "xz, a later stream damaged": later_damaged(lzma.compress),
    "lines of old Macs": lambda data: data.replace(b"\n", b"\r"),
}
NAMES = (
    "a b.jsonl",
    "\u00e9\u2028\u6f22.jsonl",
    "R.JSONL",
    "r",
    "r.txt",
    "-r.jsonl",
    "r.jsonl.gz",
    "'r\";.json",
    "a=b,c.jsonl",
)


def ended(work: Callable[[], Any], path: Path) -> tuple[str, Any]:
    """The value, or the message, which names the file."""
    return fuzz.ended(work, path.name, printable(path.name))


ALL = [(name, number) for name, some in LINES.items() for number in range(len(some))]


EVERY = [(name, number) for name, some in READERS.items() for number in range(len(some))]


def lines_of(content: list[Any]) -> list[bytes]:
    return [json.dumps(line, ensure_ascii=False).encode() for line in content]


@pytest.mark.parametrize(("name", "number"), ALL)
def test_the_same_lines_written_in_another_way(name: str, number: int, tmp_path: Path) -> None:
    file, content, reader = LINES[name][number]
    path, lines = tmp_path / file, lines_of(content)
    path.write_bytes(joined(lines))
    told, right = ended(lambda: reader(path), path)
    assert not told and right, told
    wrong = {}
    for way, make in SAME.items():
        path.write_bytes(make(lines))
        told, found = ended(lambda: reader(path), path)
        if found != right:
            wrong[way] = told or found
    assert not wrong


@pytest.mark.parametrize(("name", "number"), ALL)
def test_a_file_under_another_name(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content says what a file is; a reader that goes by the name says so."""
    monkeypatch.chdir(tmp_path)
    file, content, reader = LINES[name][number]
    path = Path(file)
    path.write_bytes(joined(lines_of(content)))
    right, wrong = reader(path), {}
    Path("link.jsonl").symlink_to(path)
    for other in (*NAMES, "link.jsonl", "f f/\u2028/x.jsonl"):
        given = Path(other)
        if other != "link.jsonl":
            given.parent.mkdir(parents=True, exist_ok=True)
            given.write_bytes(path.read_bytes())
        told, found = ended(lambda given=given: reader(given), given)
        if found != right and " end in" not in told and "ends in" not in told:
            wrong[other] = told or found
    assert not wrong


@pytest.mark.parametrize(("name", "number"), ALL)
def test_files_without_a_line_that_can_be_read(name: str, number: int, tmp_path: Path) -> None:
    file, content, reader = LINES[name][number]
    path, lines = tmp_path / file, lines_of(content)
    path.write_bytes(joined(lines))
    right, found = reader(path), {}
    for way, make in NONE.items():
        path.write_bytes(make(joined(lines)))
        told, held = ended(lambda: reader(path), path)
        # A description says that a file holds something else; a dataset may have any text, which its writers refuse.
        if (
            not told
            and held not in (right, None)
            and (way, name) != ("half of a pair", "data.export.read_dataset")
        ):
            found[way] = held
    assert not found


# ------------------------------------------------------------------------------------------------ values
REWARDS: dict[str, Any] = {
    "1": 1.0, "true": 1.0, "false": 0.0, "-0.0": -0.0, "1e-320": 1e-320, "1e30": 1e30, "-1E+5": -1e5, "0.1": 0.1,
}  # fmt: skip
NO_REWARDS = ('"1"', "null", "NaN", "Infinity", "1e31", "1e400", "[1]", "{}", '"x"', "1" * 400, "1" * 5000)
IDS = {
    "3": "3",
    "-3": "-3",
    "0": "0",
    '"3"': "3",
    '" a\\u2028"': " a\u2028",
    '"\\ud83d\\ude00"': "\U0001f600",
    "12345678901234567890": "12345678901234567890",
}
NO_IDS = ("3.0", "true", "null", "[]", '"\\ud83d"', "{}")


def line(**changes: str) -> str:
    values = {"id": '"a"', "prompt": '"q"', "responses": '["r", "s"]', "rewards": "[0, 1]"} | changes
    return "{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}\n"


def test_odd_numbers_and_ids(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"

    def of(text: str) -> tuple[str, Any]:
        path.write_text(text)
        return ended(lambda: list(read(path)), path)

    for number, reward in REWARDS.items():
        told, (group,) = of(line(rewards=f"[{number}, 0]"))
        assert repr(group.rewards[0]) == repr(reward) or group.rewards[0] == reward, (number, told)
    for given, name in IDS.items():
        told, (group,) = of(line(id=given))
        assert group.id == name
    for text in [line(rewards=f"[{one}, 0]") for one in NO_REWARDS] + [line(id=one) for one in NO_IDS]:
        assert of(text)[0], text
    # Of a key that is there twice the last value, as JSON's readers do.
    for key, last in {"id": '"b"', "rewards": "[0.5, 1]", "prompt": '"p"'}.items():
        told, (group,) = of(line(**{f'{key}": [3], "{key}': last}))
        assert getattr(group, key) == json.loads(last)
    memory = {
        "id": np.int64(3),
        "prompt": np.str_("q"),
        "responses": np.array(["r", "s"]),
        "rewards": np.float32([0.5, 1]),
    }
    (group,) = read([memory])
    assert (group.id, group.responses, group.rewards) == ("3", ["r", "s"], [0.5, 1.0])


@pytest.mark.parametrize(("name", "number"), EVERY)
def test_a_pipe_is_read_or_refused(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never waited for."""
    monkeypatch.chdir(tmp_path)
    file, content, reader = READERS[name][number]
    path = written(tmp_path, file, content)
    held = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    # A writer that is always there: what waits for more would wait for ever, and an alarm ends it.
    writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, held[:4096])
    alarm = signal.signal(
        signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("it waits for the pipe"))
    )
    signal.alarm(5)
    try:
        ended(lambda: reader(path), path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        os.close(writer)


def test_every_reader_of_lines_is_in_the_table() -> None:
    assert set(LINES) == set(OF_LINES)
