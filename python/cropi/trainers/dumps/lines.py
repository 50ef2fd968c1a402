"""Dumps of JSON lines: every line an object, or a bad sample."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi.data.lines import lines_of
from cropi.data.opened import unpacked
from cropi.data.records import parse_json
from cropi.errors import RecordError
from cropi.trainers.dumps.fields import BadSample, Left


def json_lines(path: Path, left: Left) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(file:line, object)`` of every line that is not empty, of a file that may be packed; a byte order mark at the
    beginning is not part of it.

    Raises:
        BadSample: a line is not UTF-8, not JSON, or no object.
    """
    with unpacked(path) as file:
        for where, offset, data in lines_of(file, path):
            if offset == 0:
                data = data.removeprefix(codecs.BOM_UTF8)
            if data.strip():
                yield from left.each([(where, data)], _parsed)


def _parsed(line: tuple[str, bytes]) -> tuple[str, dict[str, Any]]:
    where, data = line
    try:
        return where, parse_json(data, where)
    except RecordError as error:
        raise BadSample(where, "line", error.problem) from None
