"""Reward functions: the user's own, in two forms, and the built-in verifiers; what they return is checked.

A function is named ``FILE.py:function`` or ``package.module:function``. Its parameters tell the form:

- ``f(prompt, response, **row) -> float``: one response; ``row`` holds the columns of the prompt's row.
- ``f(prompts, completions, **columns) -> list[float]``: as TRL calls it, with the responses to one prompt: lists of
  equal length; a completion is ``[{"role": "assistant", "content": ...}]`` where the prompt is a list of messages, and
  text where it is text. ``completion_ids`` is there too. The function may be a coroutine.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cropi.data.rewards import LARGEST_REWARD
from cropi.errors import CropiError, RecordError, article, did_you_mean, shown
from cropi.files import check_name, meant
from cropi.rollouts.prompts import Prompt
from cropi.rollouts.scorer_files import files_of
from cropi.rollouts.verifiers import VERIFIERS

ASSISTANT = "assistant"
# Other names of columns.
CALLED = {
    "answer": (
        "ground_truth",
        "gold",
        "target",
        "label",
        "solution",
        "final_answer",
        "expected_answer",
        "answer",
    )
}


class Reward:
    """A reward function, called in the form that its parameters tell.

    Args:
        given: a name (see above), one of :data:`cropi.rollouts.verifiers.VERIFIERS`, or the function itself.

    Attributes:
        version: a hash of the files that a name leads to (:mod:`cropi.rollouts.scorer_files`), or of the function's own
            text; "" where neither is known, and of verifiers.

    Raises:
        CropiError: the file, module or function does not exist, or its parameters are of neither form.
    """

    def __init__(self, given: str | Callable[..., Any]) -> None:
        self.name = given if isinstance(given, str) else getattr(given, "__qualname__", repr(given))
        self.function = _function(given) if isinstance(given, str) else given
        self.version = "" if isinstance(given, str) and given in VERIFIERS else _version(given, self.function)
        check_callable(self.function, self.name, "reward")
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError) as error:
            raise CropiError(f"reward: the parameters of {self.name} are not known: {error}") from error
        self.batched = "completions" in parameters
        self._all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = [p for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        ours = ("prompts", "completions", "completion_ids") if self.batched else ()
        self._places = [] if self.batched else named[:2]
        if not self.batched and (len(named) < 2 or any(p.kind is p.KEYWORD_ONLY for p in self._places)):
            raise CropiError(
                f"reward: {self.name}({', '.join(parameters)}) takes neither (prompt, response, **row) nor (prompts, "
                "completions, **columns); give it one of these forms (docs/rollout.md)"
            )
        rest = [p for p in named if p.name not in ours and p not in self._places]
        self._names = [p.name for p in named if self.batched or p not in self._places]
        self.needs = [p.name for p in rest if p.default is p.empty]
        self.needs += [name for name in getattr(self.function, "needs", ()) if name not in self.needs]

    def check(self, prompt: Prompt, *, closely: bool = True) -> None:
        """Check that a prompt has the columns that the function needs, before work begins.

        Args:
            closely: a verifier looks at the answer too.

        Raises:
            RecordError: it has not.
        """
        for name in self.needs:
            if prompt.row.get(name) is None:
                near = _near(name, prompt.row)
                raise RecordError(
                    prompt.where, f"the reward function {self.name} needs {name!r}, and the row has "
                    f"{', '.join(map(repr, list(prompt.row)[:40]))}",
                    f"{near or f'name the column with --columns {name}=NAME; '}or pass another --reward",
                )  # fmt: skip
        look = getattr(self.function, "check", None)
        if closely and callable(look):
            self._called(prompt, partial(look, **{name: prompt.row[name] for name in self.needs}))

    def __call__(self, prompt: Prompt, responses: Sequence[str], ids: Sequence[list[int]]) -> list[float]:
        """The rewards of the responses to one prompt.

        Raises:
            RecordError: the function raised, or returned something that is not a finite number for every response;
                names the row, the prompt, the response and the value.
        """
        if self.batched:
            values = self._called(prompt, lambda: self._together(prompt, responses, ids))
        else:
            values = [
                self._called(prompt, partial(self._single, prompt, r), k) for k, r in enumerate(responses)
            ]
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            raise self._bad(
                prompt, f"returned {shown(values)} in place of a list of {len(responses)} numbers"
            )
        if len(values) != len(responses):
            raise self._bad(prompt, f"returned {len(values)} rewards for {len(responses)} responses")
        return [self._number(prompt, k, value, responses[k]) for k, value in enumerate(values)]

    def _single(self, prompt: Prompt, response: str) -> Any:
        given = {k: v for k, v in prompt.row.items() if self._all or k in self._names}
        for place in self._places:  # a column of that name would be given twice
            given.pop(place.name, None)
        return self.function(prompt.row.get("prompt"), response, **given)

    def _together(self, prompt: Prompt, responses: Sequence[str], ids: Sequence[list[int]]) -> Any:
        talk = isinstance(prompt.row.get("prompt"), list)
        columns: dict[str, Any] = {
            "prompts": prompt.row.get("prompt"), **{k: v for k, v in prompt.row.items() if k != "prompt"}
        }  # fmt: skip
        given = {k: [v] * len(responses) for k, v in columns.items() if self._all or k in self._names}
        given["completions"] = [[{"role": ASSISTANT, "content": r}] if talk else r for r in responses]
        if self._all or "completion_ids" in self._names:
            given["completion_ids"] = [list(one) for one in ids]
        made = self.function(**given)
        return asyncio.run(_awaited(made)) if inspect.isawaitable(made) else made

    def _called(self, prompt: Prompt, call: Callable[[], Any], k: int | None = None) -> Any:
        try:
            return call()
        except RecordError:
            raise
        except Exception as error:  # it is the user's code
            where = "" if k is None else f" for responses[{k}]"
            last = _last_line(error)
            raise self._bad(
                prompt, f"raised {type(error).__name__}{where}: {shown(str(error), 200)}{last}"
            ) from error

    def _number(self, prompt: Prompt, k: int, value: Any, response: str) -> float:
        if hasattr(value, "item") and getattr(value, "size", 1) is not None:
            try:
                value = value.item()
            except (ValueError, RuntimeError):
                pass
        problem = ""
        if isinstance(value, str) or not isinstance(value, (bool, int, float)):
            problem = f"returned {shown(value)}, which is not a number,"
        elif not math.isfinite(value):
            problem = f"returned {value}"
        elif abs(value) > LARGEST_REWARD:
            problem = f"returned {value:g}, beyond {LARGEST_REWARD:g}, so that advantages would overflow,"
        if problem:
            raise self._bad(prompt, f"{problem} for responses[{k}] ({shown(response)})")
        return float(value)

    def _bad(self, prompt: Prompt, problem: str) -> RecordError:
        return RecordError(
            f"{prompt.where} (prompt {prompt.id!r:.100})", f"the reward function {self.name} {problem}",
            "mend it and run the same command again (finished prompts are kept), or pass --skip-bad to leave such "
            "prompts out and count them",
        )  # fmt: skip


def _near(name: str, row: Mapping[str, Any]) -> str:
    """Which column of a row, or of the objects in it, may be what is missing."""
    flat = list(row) + [
        f"{key}.{inner}" for key, held in row.items() if isinstance(held, Mapping) for inner in held
    ]
    called = next((column for column in flat if column.rpartition(".")[2] in CALLED.get(name, ())), None)
    shown = f"--columns {name}={{}}"
    return f"did you mean {shown.format(called)}? " if called else did_you_mean(name, flat, shown)


def _version(given: str | Callable[..., Any], function: Any) -> str:
    """A hash of the files that a name leads to, or of a function's text."""
    while isinstance(function, partial):
        function = function.func
    made = function if inspect.isroutine(function) else type(function)
    try:
        if not isinstance(given, str):
            return _hash(inspect.getsource(made))
        files = files_of(given.rpartition(":")[0])
        source = inspect.getsourcefile(made)
        if source and (path := Path(os.path.realpath(source))) not in files:
            files.append(path)
        texts = {os.path.relpath(file, files[0].parent): file.read_text("utf-8") for file in files}
    except (OSError, TypeError, ValueError):  # typed in, built in, or of a file that is gone
        return ""
    # Of one file as always: records keep the hash.
    return _hash("".join(texts.values()) if len(texts) < 2 else json.dumps(texts)) if texts else ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


async def _awaited(made: Any) -> Any:
    return await made


def _last_line(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" (line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name})" if trace else ""


def _function(name: str) -> Callable[..., Any]:
    if name in VERIFIERS:
        return VERIFIERS[name]()
    if ":" not in name:
        hint = did_you_mean(name, VERIFIERS)
        raise CropiError(
            f"reward {name!r}: give FILE.py:function, package.module:function, or one of {', '.join(VERIFIERS)}"
            f"{'; ' + hint.strip() if hint else ''}"
        )
    return named_function(name, "reward")


def named_function(name: str, what: str) -> Callable[..., Any]:
    """The function that ``FILE.py:function`` or ``package.module:function`` names; ``what`` begins messages.

    Raises:
        CropiError: there is none, or the user's code cannot be imported.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise CropiError(f"{what}: {name!r} should be FILE.py:function or package.module:function")
    module = _file(place, what) if place.endswith(".py") else _module(place, what)
    function = getattr(module, attribute, None)
    if function is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise CropiError(
            f"{what}: {place} has no {attribute!r}; {did_you_mean(attribute, known)}it has {', '.join(known) or 'none'}"
        )
    return check_callable(function, name, what)


def check_callable(function: Any, name: str, what: str) -> Callable[..., Any]:
    """The function; a CropiError where it is none."""
    if not callable(function):
        raise CropiError(
            f"{what}: {name} is {article(type(function).__name__)}, which cannot be called; name a function"
        )
    made: Callable[..., Any] = function
    return made


def _file(path: str, what: str = "reward") -> Any:
    """The module in a file, run as a script's neighbours would import it: its own folder comes first.

    Behind all others, the folder stays there for what is imported when the function is called.
    """
    if not os.path.isfile(path):  # also for links in a circle and for names that no system takes
        check_name(path)
        raise CropiError(f"{what}: there is no file {path}; {meant(path)}give the path of one")
    file = Path(os.path.realpath(path))
    folder = str(file.parent)
    spec = importlib.util.spec_from_file_location(f"cropi_reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code
        raise _unloaded(path, what, error) from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    return module


def _module(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # it is the user's code, or no name of a module
        raise _unloaded(repr(name), what, error) from error


def _unloaded(name: str, what: str, error: Exception) -> CropiError:
    told = f"{type(error).__name__}: {shown(str(error), 200)}{_last_line(error)}"
    return CropiError(f"{what}: {name} cannot be imported: {told}")
