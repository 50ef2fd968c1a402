r"""Formulas of a text that nothing marks as one, such as ``2\sqrt{3}`` in ``so it is 2\sqrt{3}.``

Readers of answers look for marks (``$``, ``\(``, ``\[``, ``\boxed``) and, where there are none, for plain numbers: of
such a formula they would take the 2, and of ``5x+3`` the 5. What is written as in Python (``x**2``, ``sin(x)``,
``2e-5``) they do not read, or take for a product of letters: :func:`latex` writes it in LaTeX.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Names that a plain text may have where LaTeX has a command: of a function before its bracket, of a number.
_FUNCTION = r"(?<![\\A-Za-z])(?:arc)?(?:sqrt|sinh?|cosh?|tanh?|cot|sec|csc|exp|log|ln)(?=\()"
_PI = r"(?<![\\A-Za-z])pi(?![A-Za-z])"
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
    rf"|\\(?!boxed)[A-Za-z]+(?:\[[^\]\n]{{0,50}}\])?|{_FUNCTION}|{_PI})"
    r"|(?P<number>\d{1,3}[ \t]\d{1,2}/\d{1,3}(?![\w/])|\d+(?:[.,]\d+)*(?:[eE][+-]?\d+(?!\w)|\.(?=\\overline))?)"
    r"|(?P<letter>(?<![A-Za-z])[A-Za-z](?![A-Za-z]))"
    r"|(?P<tail>!|[ \t]*\\?%)"
    r"|(?P<open>[{(])"
    r"|(?P<blank>[ \t]+|\\[,;:! ])"
    r"|(?P<other>\\?.)",
    re.DOTALL,
)
_WORD = re.compile(rf"(?!{_FUNCTION}|{_PI})(?<![\\A-Za-z])[A-Za-z]{{2,}}")
_LATEX = re.compile(rf"\\[A-Za-z]|{_FUNCTION}|{_PI}|[_^]\{{")
# A sum, a product with a number or bracket, or an exponent, with a letter; a difference too where a letter has a
# factor. Not what may be a number with its unit, a name or a dash: 12 m/s, 12m^2, 7N*m, 5x, 5-A, B - 3.
_SUM = re.compile(
    r"[\w)}](?P<blanks>[ \t]*)\+(?P=blanks)[\w({]|[\d)}][ \t]?\*[ \t]?[\w({]|\w[ \t]?\*[ \t]?[\d({]"
    r"|\^[({]?-?\d*[A-Za-z]"
)
_DIFFERENCE = re.compile(r"[\w)}](?P<blanks>[ \t]*)-(?P=blanks)[\w({]")
_FACTOR = re.compile(r"\d[A-Za-z]")
# Letters that are no unit's and no name's, so that 5-x, 1/n and x^2 are formulas.
_VARIABLE = re.compile(r"[xyzn][ \t]*[-+*/^]|[-+*/^][ \t]*\d*[xyzn]")
# Of numbers alone; digits and a sign or a decimal point are read as they are.
_OPERATION = re.compile(r"\d[ \t]*[-+*/^]|\d[eE]|\d[ \t]+\d")
_BOLD = re.compile(r"(?<![\w)*])\*\*(?=[^\s*])(.{1,500}?)(?<![\s*])\*\*(?![\w(*])")
_SIGNS = str.maketrans({
    "√": "sqrt", "π": r"\pi ", "×": "*", "·": "*", "÷": "/", "−": "-", "½": "1/2", "¼": "1/4", "¾": "3/4",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ",
})  # fmt: skip
_POWER = re.compile(r"\^([-+]?(?:\d+(?:\.\d+)?|[A-Za-z]))(?:\^([-+]?(?:\d+(?:\.\d+)?|[A-Za-z])))?")
_ARTICLE = re.compile(r"[aAI][ \t]+[A-Za-z]{2}")
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
        elif _continues(last, kind) and not (last == "command " and _ARTICLE.match(text, place)):
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


def plain_formulas(text: str, *, symbolic: bool = False) -> Iterator[slice]:
    """Where formulas in plain text stand that are not marked, in order.

    Args:
        symbolic: every letter is a variable; else those that may be a unit, a name or a dash are none.

    >>> text = "With y = 5x + 3, 2^n, 5-x or 2(x+1) in 12 m/s it is 12m^2 (or 7)"
    >>> [text[place] for place in plain_formulas(text)]
    ['5x + 3', '2^n', '5-x', '2(x+1)']
    >>> text = "so a/b or 2b, not c"
    >>> [text[place] for place in plain_formulas(text, symbolic=True)]
    ['a/b', '2b']
    """
    for place, latex in _formulas(text):
        piece = text[place]
        if latex:
            continue
        found: object
        if not re.search("[A-Za-z]", re.sub(r"\d[eE][+-]?\d", "", piece)):
            alone = place.start == 0 or text[place.start - 1] in " \t\n="
            found = alone and "," not in piece and _OPERATION.search(piece)
        else:
            found = _VARIABLE.search(piece) or _SUM.search(piece) or symbolic and piece[1:]
            found = found or _FACTOR.search(piece) and _DIFFERENCE.search(piece)
        if found:
            yield place


def plain(text: str) -> str:
    """A text without the signs beyond ASCII that stand for formulas, and without the ``**`` around bold words.

    >>> plain("**Answer:** **2√3 × x⁻¹⁰** and 2**n, 3½/√(x+1)")
    'Answer: 2sqrt(3) * x^-10 and 2**n, 3 1/2/sqrt(x+1)'
    """
    text = _BOLD.sub(r"\1", text)
    text = re.sub(r"(?<=\d)(?=[½¼¾])", " ", text)
    text = re.sub(r"[⁻⁺]?[⁰¹²³⁴-⁹]+", lambda found: f"^{unicodedata.normalize('NFKC', found[0])}", text)
    return re.sub(r"√[ \t]*(\d+(?:\.\d+)?|[A-Za-z])", r"sqrt(\1)", text).translate(_SIGNS)


def latex(formula: str) -> str:
    r"""A formula as LaTeX: powers, functions, the number pi, 2e-5 and 1 1/2 as plain text has them.

    >>> latex("2**-x + sin(x)/pi"), latex("x^(n+1)"), latex("3*exp(2*x)"), latex("2e-5"), latex("1 1/2")
    ('2^{-x} + \\sin(x)/\\pi', 'x^{n+1}', '3*\\exp(2*x)', '2\\cdot10^{-5}', '1\\frac{1}{2}')
    """
    formula = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", formula)
    formula = re.sub(r"(?<![\d.])(\d{1,3})((?: \d{3})+)(?![\d.])", lambda d: d[0].replace(" ", ""), formula)
    formula = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]\+?(-?\d+)(?![\w.])", r"\1\\cdot10^{\2}", formula)
    formula = re.sub(r"(?<![\d.])(\d+)[ \t]+(\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}", formula)
    formula = re.sub(rf"{_FUNCTION}|{_PI}", lambda found: f"\\{found[0]}", formula)
    formula = re.sub(r"(?<![ \t])[ \t]*\*\*[ \t]*", "^", formula)
    # 2^3^2 is 2^(3^2), and LaTeX takes no second exponent without braces.
    formula = _POWER.sub(
        lambda power: f"^{{{power[1]}^{{{power[2]}}}}}" if power[2] else f"^{{{power[1]}}}", formula
    )
    for opening in (r"\^\(", r"\\sqrt\("):
        while (found := re.search(opening, formula)) and (end := _closed(formula, found.end() - 1)):
            inside = formula[found.end() : end - 1]
            formula = f"{formula[: found.end() - 1]}{{{inside}}}{formula[end:]}"
    return formula


def _continues(last: str, kind: str) -> bool:
    """Whether a piece belongs to the formula before it; ``last`` is that one's last piece, and a blank behind it."""
    if not last or kind in ("marked", "between", "other", "blank"):
        return False
    if last == "join" or kind in ("join", "tail") or not last.endswith(" "):
        return True
    # In LaTeX a blank ends a command's name: \pi r, \sin x.
    return (
        kind == "command"
        and last != "letter "
        or last == "command "
        and kind in ("letter", "number", "group")
    )


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
