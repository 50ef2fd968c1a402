"""For the site: docstrings as Markdown. Examples become code blocks, and roles like ``:func:`x.y` `` become code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")
CODE = re.compile(r"``([^`\n]+)``")


def as_markdown(text: str) -> str:
    """A docstring in which no example is taken for prose."""
    text = CODE.sub(r"`\1`", ROLE.sub(r"`\1`", text))
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        example = line.lstrip().startswith((">>>", "...")) or (inside and line.strip() != "")
        if example and not inside:
            lines += ["", "```pycon"]
        elif inside and not example:
            lines.append("```")
        inside = example
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object that is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
