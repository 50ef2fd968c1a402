r"""Formulas of a text that nothing marks as one, such as ``2\sqrt{3}`` in ``so it is 2\sqrt{3}.``

Readers of answers look for marks (``$``, ``\(``, ``\[``, ``\boxed``) and, where there are none, for plain numbers: of
such a formula they would take the 2, and of ``5x+3`` the 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Longest formula in marks or brackets that is looked for.
_MARKED = 500
_PIECE = re.compile(
    rf"(?P<marked>(?<!\\)\$\$.{{1,{_MARKED}}}?\$\$|(?<!\\)\$[^$\n]+\$"
    rf"|\\\([^\n]{{1,{_MARKED}}}?\\\)|\\\[.{{1,{_MARKED}}}?\\\])"
    # What stands between two formulas, or holds words.
    r"|(?P<between>\\(?:approx|sim(?:eq)?|equiv|implies|iff|(?:long)?(?:left|right)arrow|(?:Left|Right|Leftright)arrow|to"
    r"|therefore|because|qquad|quad|newline|par|item|hline)(?![A-Za-z])"
    r"|\\(?:begin|end|text\w*|mbox|emph|section\*?|subsection\*?)\s*\{[^{}\n]*\})"
    r"|(?P<join>[ \t]*(?:[-+*/^_]|\\(?:cdot|times|ast|div|pm|mp"
    r"|le(?:q|qslant)?|ge(?:q|qslant)?|lt|gt|neq?|cup|cap|in|mod|bmod)"
    r"(?![A-Za-z]))[ \t]*)"
    r"|(?P<command>\\sqrt[ \t]+\d+|\\[dt]?frac[ \t]+\d[ \t]+\d+"
    r"|\\(?!boxed)[A-Za-z]+(?:\[[^\]\n]*\])?|(?<![A-Za-z])sqrt(?=\())"
    r"|(?P<number>\d+(?:[.,]\d+)*(?:\.(?=\\overline))?)"
    r"|(?P<letter>(?<![A-Za-z])[A-Za-z](?![A-Za-z]))"
    r"|(?P<tail>!|[ \t]*\\?%)"
    r"|(?P<open>[{(])"
    r"|(?P<blank>[ \t]+|\\[,;:! ])"
    r"|(?P<other>\\?.)",
    re.DOTALL,
)
_WORD = re.compile(r"(?<![\\A-Za-z])(?!sqrt\()[A-Za-z]{2,}")
_LATEX = re.compile(r"\\[A-Za-z]|sqrt\(|[_^]\{")
# A sum, a product with a number or bracket, or an exponent, with a letter; a difference too where a letter has a
# factor. Not what may be a number with its unit, a name, a dash or bold text: 12 m/s, 12m^2, 7N*m, 5x, 5-A, B - 3.
_SUM = re.compile(
    r"[\w)}](?P<blanks>[ \t]*)\+(?P=blanks)[\w({]|[\d)}][ \t]?\*[ \t]?[\w({]|\w[ \t]?\*[ \t]?[\d({]"
    r"|\^[({]?-?\d*[A-Za-z]"
)
_DIFFERENCE = re.compile(r"[\w)}](?P<blanks>[ \t]*)-(?P=blanks)[\w({]")
_FACTOR = re.compile(r"\d[A-Za-z]")
_OTHER = re.compile(r"\d[eE][+-]?\d|\*\*")
_CLOSING = {"{": "}", "(": ")"}


def unmarked_formulas(text: str) -> Iterator[slice]:
    r"""Where formulas in LaTeX stand that are not marked, in order: at a command (``\pi``), an exponent in braces or
    ``sqrt(``, with the numbers, letters and operators that are joined to it. ``=`` and ``\approx`` stand between two.

    >>> text = r"As x = 3 we get 2 \sqrt{3} + x, not $\pi$ and not 7"
    >>> [text[place] for place in unmarked_formulas(text)]
    ['2 \\sqrt{3} + x']
    """
    return (place for place, latex in _formulas(text) if latex)


def _formulas(text: str) -> Iterator[tuple[slice, bool]]:
    """Numbers and letters with all that is joined to them, and whether there is LaTeX among it."""
    text = re.sub(r"\\(?:left|right)(?=[(\[)\]|.])", lambda found: " " * len(found[0]), text)
    start = end = place = 0
    last, formula = "", False
    while place <= len(text):
        found = _PIECE.match(text, place)
        kind, piece = (found.lastgroup or "", found[0]) if found else ("other", " ")
        after = place + len(piece)
        if kind == "open":
            after = _closed(text, place)
            kind = "group" if after else "other"
            after = after or place + 1
        latex = kind == "command" or (
            kind in ("join", "group") and _LATEX.search(text, place, after) is not None
        )
        latex |= kind == "group" and piece == "{" and place > 0 and text[place - 1] in "^_"
        if kind == "blank" and last:
            kind = f"{last} "
        elif _continues(last, kind):
            formula |= latex
            if kind != "join":
                end = after
        else:
            if last:
                yield slice(start, end), formula
            starts = kind in ("command", "number", "letter", "group") or piece.lstrip(" \t") == "-"
            start, end = after - len(piece.lstrip(" \t")) if kind == "join" else place, after
            kind, formula = (kind, latex) if starts else ("", False)
        last, place = kind, after


def plain_formulas(text: str) -> Iterator[slice]:
    """Where formulas in plain text stand that are not marked, and have a letter for a variable, in order.

    >>> text = "With y = 5x + 3, 2^n or 2(x+1) in 12 m/s it is 12m^2 (or 7)"
    >>> [text[place] for place in plain_formulas(text)]
    ['5x + 3', '2^n', '2(x+1)']
    """
    for place, latex in _formulas(text):
        piece = text[place]
        if latex or not re.search("[A-Za-z]", piece) or _OTHER.search(piece):
            continue
        if _SUM.search(piece) or _FACTOR.search(piece) and _DIFFERENCE.search(piece):
            yield place


def _continues(last: str, kind: str) -> bool:
    """Whether a piece belongs to the formula before it; ``last`` is that one's last piece, and a blank behind it."""
    if not last or kind in ("marked", "between", "other", "blank"):
        return False
    if last == "join" or kind in ("join", "tail") or not last.endswith(" "):
        return True
    return kind == "command" and last != "letter "


def _closed(text: str, start: int) -> int:
    """Where the bracket at ``start`` is closed, of a line and without words; 0: it is not."""
    depth, opening = 0, text[start]
    for place in range(start, min(len(text), start + _MARKED)):
        if text[place] == opening:
            depth += 1
        elif text[place] == _CLOSING[opening]:
            depth -= 1
            if not depth:
                inside = text[start + 1 : place]
                return 0 if opening == "(" and _WORD.search(inside) else place + 1
        elif text[place] == "\n":
            break
    return 0
