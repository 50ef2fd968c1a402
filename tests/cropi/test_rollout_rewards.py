"""Rewards of rollouts: functions in both forms, the verifiers, and what is said of those that are wrong."""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.made_data import make_model, make_tokenizer
from test_rollout import prompts, rolled

import cropi
from cropi.errors import CropiError, RecordError
from cropi.rollouts.formulas import latex, plain_formulas
from cropi.rollouts.job import ChangedReward, RolloutReport
from cropi.rollouts.rewards import _function, _version
from cropi.rollouts.scorer_files import files_of


def raises(prompt: Any, response: str, answer: str) -> float:
    if answer == "5":
        raise ZeroDivisionError("no such thing")
    return 0.0


def trl_style(prompts: Any, completions: Any, answer: list[str], **columns: Any) -> list[Any]:
    assert all(message["role"] == "assistant" for (message,) in completions)
    assert len(prompts) == len(completions) == len(answer) == len(columns["completion_ids"])
    return [len(message["content"]) / 10 for (message,) in completions]


async def awaited(prompts: Any, completions: Any, **columns: Any) -> list[Any]:
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (
            raises,
            r"\(prompt 'p5'\): the reward function raises raised ZeroDivisionError for responses\[0\]: 'no such",
        ),
        (lambda prompt, response: None, "returned None, which is not a number,"),
        (lambda prompt, response: float("nan"), r"returned nan for responses\[0\]"),
        (lambda prompt, response: "1", "which is not a number"),
        (lambda prompt, response: 1e31, "advantages would overflow"),
        (lambda prompts, completions, **c: [1.0], "returned 1 rewards for 4 responses"),
        (lambda prompts, completions, **c: 1.0, "in place of a list of 4 numbers"),
        (lambda prompts, completions, **c: [None] * 4, "which is not a number"),
    ],
)
def test_a_reward_that_is_none_names_the_row(tmp_path: Path, reward: Any, problem: str) -> None:
    with pytest.raises(RecordError, match=problem):
        rolled(tmp_path / "out.jsonl", make_model(), reward=reward)
    if reward is raises:  # what was finished before is kept, and the mended function goes on from there
        kept = len((tmp_path / "out.jsonl.part").read_text().splitlines()) - 1
        assert kept > 0
        records = rolled(tmp_path / "out.jsonl", make_model(), reward=raises, skip_bad=True)
        assert [record["id"] for record in records] == ["p0", "p1", "p2", "p3", "p4", "p6"]


def test_a_reward_function_that_has_changed_is_told_where_old_rewards_stay(tmp_path: Path) -> None:
    """In a finished file, and in one that an interrupted run left."""
    file, out, model = tmp_path / "reward.py", tmp_path / "out.jsonl", make_model()
    file.write_text("def f(prompt, response, answer): return 1 / (answer != '5')\n")
    with pytest.raises(RecordError, match="ZeroDivisionError"):
        rolled(out, model, reward=f"{file}:f")
    kept = len(out.with_name("out.jsonl.part").read_text().splitlines()) - 1
    file.write_text("def f(prompt, response, answer): return 0\n")
    with pytest.warns(
        ChangedReward, match=f"has changed since {kept} of the prompts in .*out.jsonl were scored"
    ):
        records = rolled(out, model, reward=f"{file}:f")
    assert sorted(record["rewards"][0] for record in records) == [0.0] * (7 - kept) + [1.0] * kept
    with pytest.warns(ChangedReward, match=f"has changed since {kept} of the prompts"):
        assert rolled(out, model, reward=f"{file}:f") == records
    out.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ChangedReward)
        for _ in range(2):
            assert {
                one for record in rolled(out, model, reward=f"{file}:f") for one in record["rewards"]
            } == {0.0}


def test_what_a_reward_function_imports_beside_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "reward.py": "import json\nimport numpy\nfrom beside import g\ndef f(prompt, response): return g(response)\n",
        "beside.py": "def g(response):\n    from rules.sums import right\n    return right(response)\n",
        "rules/__init__.py": "", "rules/sums.py": "from .numbers import ONE\ndef right(response): return ONE\n",
        "rules/numbers.py": "ONE = 1\n", "other.py": "", "alone.py": "def f(prompt, response): return 1\n",
    }  # fmt: skip
    (tmp_path / "rules").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for kept in ("beside", "rules", "rules.sums", "rules.numbers"):
        monkeypatch.delitem(sys.modules, kept, raising=False)
    counted = {
        f"{tmp_path}/reward.py:f": {"reward.py", "beside.py", "rules/__init__.py", "rules/sums.py", "rules/numbers.py"},
        "rules.sums:right": {"rules/__init__.py", "rules/sums.py", "rules/numbers.py"},
        f"{tmp_path}/alone.py:f": {"alone.py"},
    }  # fmt: skip
    for given, own in counted.items():
        first = _version(given, _function(given))
        changed = set()
        for name, text in texts.items():
            (tmp_path / name).write_text(text + "# changed\n")
            if _version(given, _function(given)) != first:
                changed.add(name)
            (tmp_path / name).write_text(text)
        assert changed == own and _version(given, _function(given)) == first
    assert first == hashlib.sha256(texts["alone.py"].encode()).hexdigest()[:16], (
        "records keep the hash of one file"
    )


def test_a_file_beside_is_found_when_the_function_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late.py").write_text(
        "def f(prompt, response):\n    from later_beside import g\n    return g()\n"
    )
    (tmp_path / "later_beside.py").write_text("def g(): return 3.0\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert _function(f"{tmp_path}/late.py:f")("", "") == 3.0


def test_of_an_installed_package_its_own_modules_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    (folder / "scoring").mkdir(parents=True)
    (folder / "scoring/__init__.py").write_text("")
    (folder / "scoring/own.py").write_text("import large_package\nfrom scoring.rest import f\n")
    (folder / "scoring/rest.py").write_text("def f(prompt, response): return 1\n")
    (folder / "large_package.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    _function("scoring.own:f")
    held = [path.relative_to(folder) for path in files_of("scoring.own")]
    assert list(map(str, held)) == ["scoring/own.py", "scoring/__init__.py", "scoring/rest.py"]
    for name in ("scoring", "scoring.own", "scoring.rest", "large_package"):
        monkeypatch.delitem(sys.modules, name)


def test_rewards_that_differ_by_rounding_are_no_gradient(tmp_path: Path) -> None:
    def parts(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [0.1 + 0.2, 0.3, 0.3, 0.3]

    report = cropi.rollout(
        make_model(), prompts(2), parts, tmp_path / "out.jsonl", make_tokenizer(chat=True), n=4, max_tokens=4,
        progress=False,
    )  # fmt: skip
    assert (report.responses, report.mixed) == (8, 0)


def test_both_forms_of_rewards_are_called_as_they_expect(tmp_path: Path) -> None:
    for number, reward in enumerate((trl_style, awaited)):
        records = rolled(tmp_path / f"{number}.jsonl", make_model(), reward=reward)
        wanted = [[len(r) / 10 if number == 0 else 1.0 for r in record["responses"]] for record in records]
        assert [record["rewards"] for record in records] == wanted
    with pytest.raises(RecordError, match="needs 'solution'.*--columns solution=NAME"):
        rolled(tmp_path / "x.jsonl", make_model(), reward=lambda prompt, response, solution: 1.0)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing.py:f", "there is no file nothing.py"),
        ("FILE:g", "has no 'g'; .*it has f"),
        ("maths", "did you mean 'math'"),
        ("no.such.module:f", "cannot be imported"),
        ("FILE:three", "takes neither"),
        ("BROKEN:f", "cannot be imported: NameError.*line 1 of broken.py"),
    ],
)
def test_rewards_that_cannot_be_had(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "reward.py").write_text("def f(prompt, response): return 1\ndef three(x): return 1\n")
    (tmp_path / "broken.py").write_text("undefined\n")
    name = name.replace("FILE", f"{tmp_path}/reward.py").replace("BROKEN", f"{tmp_path}/broken.py")
    with pytest.raises(CropiError, match=problem):
        rolled(tmp_path / "out.jsonl", make_model(), reward=name)


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("42", "so it is 42.", 1.0), ("#### 1,234", "The answer is $1234$", 1.0), ("steps\n#### 7", "7", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0), ("x^2+1", "$1 + x^2$", 1.0), ("(1,2)", r"\boxed{(1,2)}", 1.0),
        ("42", "43", 0.0), ("42", "no idea", 0.0), (7, "7", 1.0), (["7"], "7", 1.0), ("42.", "$42$", 1.0),
        ("18 dollars", r"\boxed{18}", 1.0), ("72.5 km/h", "$72.5$", 1.0), ("$18", "18", 1.0),
        (r"the end is \boxed{2\pi}", r"$2\pi$", 1.0),
        (r"2\sqrt{3}", r"so it is 2\sqrt{3}.", 1.0), ("2", r"so it is 2\sqrt{3}.", 0.0),
        ("3", r"The answer is 3\pi", 0.0),
        (r"3\pi", r"The answer is 3\pi", 1.0), ("10", "#### 10^{6}", 0.0), ("10^{6}", "#### 10^{6}", 1.0),
        ("12", r"As \sqrt{16} = 4, the total is 12.", 1.0), ("1/2", r"we get \frac{1}{2} of it", 1.0),
        ("2", "so 2*sqrt(3)", 0.0), ("2*sqrt(3)", "so 2*sqrt(3)", 1.0), ("7", r"$\pi$ or not, \boxed{7}", 1.0),
        # Formulas in plain text with a variable, of which math-verify takes a number.
        ("5x+3", "so it is 5x+3", 1.0), ("5", "so it is 5x+3", 0.0), ("5x+3", "y = 5x + 3.", 1.0),
        ("3", "y = 5x + 3.", 0.0), ("2^n", "that is 2^n", 1.0), ("2", "that is 2^n", 0.0),
        ("3", "It is 5x - 3", 0.0),
        ("2x+2", "so 2(x+1)", 1.0), ("2", "so 2(x+1)", 0.0), ("3+4i", "so 3+4i", 1.0),
        ("7", "2x+3 = 17, x = 7", 1.0),
        # Numbers with units, names and dashes, which are no formulas.
        ("12", "12 m/s", 1.0), ("12", "area 12m^2", 1.0), ("12", "12 m^2", 1.0), ("5", "5a", 1.0), ("3", "B - 3", 1.0),
        ("7", "x + 5 = 12, so 7", 1.0), ("12", "x + 5 = 12", 1.0), ("3", "3 - a prime", 1.0), ("12", "12 for x+3", 1.0),
        ("7", "a torque of 7N*m", 1.0), ("7", "it is **7** N*m", 1.0), ("5x+3", "it is **5x+3**", 1.0),
        # A letter that is no unit's is a variable; where the answer has variables, every letter.
        *((made, f"The answer is {made}.", 1.0) for made in ("5-x", "1/x", "2**n", "x**2", "x^2 - 1", "n(n-1)/2")),
        *((part, f"so it is {made}", 0.0) for part, made in (("5", "5-x"), ("1", "1/x"), ("2", "2**n"), ("1", "n-1"))),
        ("5x", "it is 5x", 1.0), ("a/b", "so a/b.", 1.0), ("k - p", "**-p + k**", 1.0), ("-x", "so -x", 1.0),
        ("12", "5 - x = -7, so x = 12", 1.0), ("12", "by x/2 we get 12 n-gons", 1.0),
        # Python's powers, functions, numbers with an exponent, mixed numbers and signs beyond ASCII.
        ("6*x**2 - 4*x + 1", "**1 - 4x + 6x^2**", 1.0), ("1", r"\boxed{6*x**2 - 4*x + 1}", 0.0),
        ("6*x**2 - 4*x + 1", r"\boxed{1}", 0.0), ("sin(x)+1", "1 + sin(x)", 1.0), ("exp(2*x)", "$e^{2x}$", 1.0),
        ("2", "2*sin(x)", 0.0), ("2*pi", "so 2π", 1.0), ("2", "2π", 0.0), ("2e-5", "It is 0.00002", 1.0),
        ("1.5e3", "It is 1500.", 1.0), ("240000", "2.4 × 10^5", 1.0), ("1 1/2", "The answer is 1 1/2.", 1.0),
        ("1", r"\boxed{1 1/2}", 0.0), ("1 1/2", "$1.5$", 1.0), ("7/3", "The answer is 7/3.", 1.0),
        ("7/3", "**7/3**", 1.0), ("2", "2e-5", 0.0),
        ("2√3", r"\boxed{\sqrt{12}}", 1.0), ("2", "so it is 2√3", 0.0), ("x²", "x*x", 1.0), ("90°", "90", 1.0),
        (r"\pi r^2", r"the area is \pi r^2.", 1.0), ("πr²", r"$\pi r^2$", 1.0), (r"\pi", r"it is \pi r^2", 0.0),
        (r"\sin x + 1", r"so \sin x + 1", 1.0), (r"\log 8", r"it is \log 8", 1.0), (r"\pi", r"\pi a day", 1.0),
        ("3½", "$3.5$", 1.0), ("7", "it is 3½, or 7", 1.0), ("10⁻⁵", "0.00001", 1.0), ("12", "12 m²", 1.0),
        ("100 000", "100,000", 1.0), ("2**-x", "$2^{-x}$", 1.0), ("3", "pages 3 and (5-x)", 1.0),
        ("2**3**2", "512", 1.0), ("2**3**2", "64", 0.0),
    ],
)  # fmt: skip
def test_answers_are_verified(answer: Any, response: str, reward: float) -> None:
    pytest.importorskip(
        "math_verify", reason="math-verify is not installed (the extra 'rollout', part of 'test')"
    )
    from cropi.rollouts.verifiers import Math

    assert Math()("question", response, answer=answer) == reward


def test_formulas_of_long_texts_take_time_in_proportion() -> None:
    """Blanks, and brackets that nothing closes: the square of their number would be minutes."""
    assert latex(" " * 10**5 + "2**n") == " " * 10**5 + "2^{n}"
    assert not list(plain_formulas("\\sqrt[" * 10**4))


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (r"2\sqrt{3}", "2"), (r"2\pi", "2"), ("10^{6}", "10"), (r"1+\sqrt{2}", "1"), ("3x", "3"), ("7!", "7"),
        (r"11\frac{1}{2}", r"\frac{1}{2}"), (r"(-\infty, 3)", "3"), (r"3 \cdot 4", "4"), ("2,3", "2.3"),
        (r"\frac 12", "12"), ("x = 5 or x = 3", "3"), ("3+4i", "3"), (r"0.\overline{3}", "0"), ("-3<x<4", "-3"),
    ],
)  # fmt: skip
def test_an_expression_that_is_not_marked_is_compared_whole(answer: str, part: str) -> None:
    pytest.importorskip(
        "math_verify", reason="math-verify is not installed (the extra 'rollout', part of 'test')"
    )
    from cropi.rollouts.verifiers import Math

    for form in (r"so it is $\boxed{%s}$.", r"\boxed{%s}", "It is $%s$."):
        assert Math()("question", form % answer, answer=answer) == 1.0
        assert Math()("question", form % part, answer=answer) == 0.0


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"reward_model": {"style": "rule", "ground_truth": "1"}, "extra_info": {"answer": "x"}},
         "reward_model.ground_truth"),
        ({"label": "1"}, "label"), ({"answers": "1"}, "answers"),
    ],
)  # fmt: skip
def test_the_column_that_may_hold_the_answer_is_named(
    tmp_path: Path, row: dict[str, Any], column: str
) -> None:
    asked = [{"id": "a", "prompt": "1=", **row}]
    with pytest.raises(
        RecordError, match=f"needs 'answer'.*did you mean --columns answer={re.escape(column)}?"
    ):
        rolled(tmp_path / "out.jsonl", make_model(), reward="exact", asked=asked)


def test_a_rollout_without_a_gradient_says_what_may_be_changed(tmp_path: Path) -> None:
    report = RolloutReport(tmp_path, prompts=1, responses=4, tokens=8, mean_reward=0.0, truncated=3)
    assert "nothing       to select from these prompts: raise --max-tokens (3 of 4 responses" in report.text()
    report.mixed = 1
    assert "nothing" not in report.text() and "most responses ended at --max-tokens" in report.text()
    report.truncated = 2
    assert "most responses" not in report.text()


@pytest.mark.parametrize("reward", ["math", "exact"])
def test_several_answers_are_named_before_work_begins(tmp_path: Path, reward: str) -> None:
    if reward == "math":
        pytest.importorskip(
            "math_verify", reason="math-verify is not installed (the extra 'rollout', part of 'test')"
        )
    rows = prompts()
    rows[1]["answer"] = ["1", "2"]
    with pytest.raises(RecordError, match=r"prompts\[1\].*the answer \['1', '2'\] is not one text or number"):
        rolled(tmp_path / "out.jsonl", make_model(), reward=reward, asked=rows)


def test_an_answer_that_is_no_formula_is_named_before_work_begins(tmp_path: Path) -> None:
    pytest.importorskip(
        "math_verify", reason="math-verify is not installed (the extra 'rollout', part of 'test')"
    )
    rows = prompts()
    rows[2]["answer"] = "the cat sat"
    with pytest.raises(
        RecordError, match=r"prompts\[2\].*the answer 'the cat sat' is not a mathematical expression"
    ):
        rolled(tmp_path / "out.jsonl", make_model(), reward="math", asked=rows)
