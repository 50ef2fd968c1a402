"""The way of one prompt through ``cropi.sketch``, as somebody reads it: how often it leads back to an earlier file.

Counted on the call graph: functions of `cropi` that are called more often where there are more prompts, in the order of
their first calls; properties are data and do not count. A stay is a run of such functions in one file.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.made_data import make_model

import cropi
from cropi.data import pieces

CODE = Path(cropi.__file__).parent
PASSED = ("<genexpr>", "<lambda>", "<listcomp>", "<dictcomp>", "<setcomp>", "<module>")
Call = tuple[str, str]  # file, qualified name


def sketch(folder: Path, prompts: int) -> None:
    """Sketch a file of so many prompts, in batches of one prompt."""
    ids = [[8, 9, 1], [10, 11, 1]]
    record = {"prompt": "1+1=", "response_ids": ids, "logprobs": [[-1.0] * 3] * 2, "rewards": [1.0, 0.0]}
    lines = [json.dumps(record | {"id": f"p{i}", "prompt_ids": [5, 6, 7 + i]}) for i in range(prompts)]
    file = folder / f"{prompts}.jsonl"
    file.write_text("\n".join(lines))
    cropi.sketch(
        make_model(), file, out=folder / f"store-{prompts}", dim=1024, tokens_per_batch=9, verify=False,
        behaviour_check="off", progress=False,
    )  # fmt: skip


def calls(work: Callable[[], None]) -> list[Call]:
    """Every call of a function of `cropi`; a generator is called once."""
    made: list[Call] = []
    generators: dict[int, FrameType] = {}  # held, so that no other frame gets the number of one

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(CODE)) and code.co_name not in PASSED:
            if id(frame) not in generators:
                made.append((code.co_filename, code.co_qualname))
            if code.co_flags & inspect.CO_GENERATOR:
                generators[id(frame)] = frame

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return made


def is_data(call: Call) -> bool:
    """Whether it is a property."""
    file, name = call
    held: Any = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == file), None)
    for part in name.split("."):
        held = inspect.getattr_static(held, part, None)
    return isinstance(held, (property, cached_property))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="co_qualname is new in Python 3.11")
def test_the_way_of_a_prompt_seldom_leads_back(tmp_path: Path) -> None:
    pytest.importorskip("msgspec", reason="records are then read another way")
    sketch(tmp_path, 1)  # imports, and what is computed once
    few, many = (calls(partial(sketch, tmp_path, prompts)) for prompts in (3, 6))
    more = Counter(many) - Counter(few)
    start = few.index((str(Path(pieces.__file__)), "Pieces.add"))  # the first line is read
    way = list(dict.fromkeys(one for one in few[start:] if more[one] >= 3 and not is_data(one)))
    stays = [file for n, (file, _) in enumerate(way) if n == 0 or way[n - 1][0] != file]
    shown = "\n".join(f"{Path(file).relative_to(CODE)} {name}" for file, name in way)
    assert 30 < len(way) < 80 and len(set(stays)) > 15, shown
    # Three of these: what a pass gave is looked at when the next one has been launched. One: a prompt's weights are
    # computed once, before its rows are filled.
    assert len(stays) - len(set(stays)) <= 15, shown
