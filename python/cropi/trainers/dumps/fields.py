"""The fields of one dumped sample: what is not of the form that it must have is named, with the sample and the file."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from cropi.errors import RecordError, article, printable

REMEDY = "mend it, or pass --skip-bad to leave such samples out and count them"
LARGEST_ID = 2**31 - 1
# Where trainers and engines keep what a policy sees besides tokens.
MEDIA = (
    "images", "image_data", "multi_modal_data", "multi_modal_inputs", "multi_modal_placeholders", "multimodal_inputs",
    "multimodal_train_inputs", "mm_train_inputs", "pixel_values", "image_grid_thw",
)  # fmt: skip
T = TypeVar("T")
U = TypeVar("U")


class BadSample(RecordError):
    """One sample of a dump that cannot be used. ``--skip-bad`` goes on without it.

    Attributes:
        field: of the sample; what samples that are left out are counted by.
    """

    def __init__(self, where: str, field: str, problem: str, remedy: str = REMEDY) -> None:
        super().__init__(f"{where}, {field}", problem[:1000], remedy)
        self.field = field


class Unused(BadSample):
    """A sample that its trainer does not train on either (aborted, removed): left out and counted in any case."""


class NotFinite(Unused):
    """A reward or log-prob that is NaN or infinite: the sample was not scored, or not sampled, as it should have been.

    No gradient can be formed from such a sample, but the rest of a run's dumps can be used.
    """


class Left:
    """Which samples were left out, by reason, and the first of each.

    Args:
        skip_bad: leave bad samples out too, instead of raising.

    Attributes:
        told: it was said that the files hold text; it is said once for all of them.
        evaluated: the steps of runs with an evaluation, by the file that says so; none once they were said.
    """

    def __init__(self, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self.counts: Counter[str] = Counter()
        self.first: dict[str, RecordError] = {}
        self.told = False
        self.evaluated: dict[Path, set[int]] = {}

    def note(self, error: RecordError) -> None:
        """Count a sample that is left out.

        Raises:
            BadSample: it is a bad one, and they are not to be skipped.
        """
        if not self.skip_bad and not isinstance(error, Unused):
            raise error
        name = error.field.partition("[")[0] if isinstance(error, BadSample) else "form"
        self.counts[name] += 1
        self.first.setdefault(name, error)

    def each(self, samples: Iterable[T], read: Callable[[T], Any]) -> Iterator[Any]:
        """``read`` of every sample, without those that are left out."""
        for sample in samples:
            try:
                yield read(sample)
            except BadSample as error:
                self.note(error)

    def flat(self, samples: Iterable[T], read: Callable[[T], Iterable[U]]) -> Iterator[U]:
        """What ``read`` finds in every sample, one after the other, without those that are left out."""
        for found in self.each(samples, read):
            yield from found


def shown(value: Any) -> str:
    """A value in a message: short, however large or deep it is, and without control characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 3
    short.maxlevel = 2
    try:
        text = short.repr(value) if not isinstance(value, torch.Tensor) else f"a tensor {list(value.shape)}"
    except Exception:  # an object's own repr may raise anything
        text = article(type(value).__name__)
    return printable(text[:200])[:200]


def names(keys: Iterable[Any]) -> str:
    """Some of the keys that there are, for a message."""
    listed = [shown(key) for key, _ in zip(keys, range(12))]
    return ", ".join(listed) or "nothing"


def check_keys(row: Mapping[str, Any], keys: Iterable[str], where: str, what: str) -> None:
    """Check that a row has some keys.

    Raises:
        BadSample: it lacks one, so that it is not ``what`` ("a rollout of prime-rl").
    """
    for key in keys:
        if key not in row:
            raise BadSample(where, key, f"is missing, so this is not {what} (it has {names(row)})")


def from_json(text: Any, field: str, where: str) -> Any:
    """A value that is written as JSON text.

    Raises:
        BadSample: it is not.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise BadSample(where, field, f"should be JSON, got {shown(text)}") from None


def whole(value: Any, field: str, where: str) -> int:
    """An integer. A float with an integer's value is refused: it was rounded somewhere.

    Raises:
        BadSample: it is not one.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise BadSample(where, field, f"should be an integer, got {shown(value)}")
    return int(value)


def finite(value: Any, field: str, where: str) -> float:
    """A finite number.

    Raises:
        NotFinite: it is NaN or infinite.
        BadSample: it is not a number.
    """
    number: float | None = None
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = value.item() if value.size == 1 else value if isinstance(value, np.ndarray) else _item(value)
    if isinstance(value, (int, float, np.number, np.bool_)) and not isinstance(value, np.complexfloating):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if number is None or not math.isfinite(number):
        kind = BadSample if number is None else NotFinite
        raise kind(where, field, f"should be a finite number, got {shown(value)}")
    return number


def _item(value: torch.Tensor) -> Any:
    return value.item() if value.numel() == 1 and not value.is_complex() else value


def listed(value: Any, field: str, where: str) -> list[Any]:
    """A flat list of Python values out of a list, a tuple, an array or a tensor of one dimension.

    Raises:
        BadSample: it is something else.
    """
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim != 1 or (isinstance(value, torch.Tensor) and (value.is_nested or value.is_quantized)):
            raise BadSample(where, field, f"should have one dimension, got {shown(value)}")
        return list(value.tolist())
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise BadSample(where, field, f"should be a list, got {shown(value)}")
    return list(value)


def token_ids(value: Any, field: str, where: str) -> list[int]:
    """Token ids.

    Raises:
        BadSample: no list, or an entry that is not an integer from 0 to 2^31 - 1.
    """
    ids = listed(value, field, where)
    for t, token in enumerate(ids):
        if type(token) is not int:
            token = ids[t] = whole(token, f"{field}[{t}]", where)
        if not 0 <= token <= LARGEST_ID:
            raise BadSample(where, f"{field}[{t}]", f"should be a token id, got {shown(token)}")
    return ids


def is_bit(value: Any) -> bool:
    """Whether a value is 0 or 1, as an integer, a float or a truth value."""
    return isinstance(value, (int, float, np.number, np.bool_)) and value in (0, 1)


def _beside_tokens(value: Any, size: int, field: str, where: str) -> list[Any]:
    """A list with an entry for each of ``size`` response tokens."""
    values = listed(value, field, where)
    if len(values) != size:
        raise BadSample(where, field, f"has {len(values)} entries for {size} response tokens")
    return values


def loss_mask(value: Any, size: int, field: str, where: str) -> list[int] | None:
    """A mask of 0 and 1 over ``size`` response tokens, None where all of them count.

    Raises:
        BadSample: another length or other values.
        Unused: no token counts.
    """
    if value is None:
        return None
    mask = _beside_tokens(value, size, field, where)
    for t, entry in enumerate(mask):
        if not is_bit(entry):
            raise BadSample(where, f"{field}[{t}]", f"should be 0 or 1, got {shown(entry)}")
    plain = [int(entry) for entry in mask]
    if not any(plain):
        raise Unused(where, field, "no response token counts")
    return None if all(plain) else plain


def log_probs(
    value: Any, size: int, mask: Sequence[int] | None, field: str, where: str
) -> list[float] | None:
    """Log-probs of ``size`` response tokens. Those of tokens that do not count are set to 0.

    Raises:
        NotFinite: one is NaN or infinite.
        BadSample: another length, or one that is not a number.
    """
    if value is None:
        return None
    values = _beside_tokens(value, size, field, where)
    for t, entry in enumerate(values):
        if mask is not None and not mask[t]:
            values[t] = 0.0
        elif type(entry) is not float or not math.isfinite(entry):
            values[t] = finite(entry, f"{field}[{t}]", where)
    return values


def prompt_id(value: Any, field: str, where: str) -> str:
    """A prompt's id: text or an integer.

    Raises:
        BadSample: it is something else.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, (np.ndarray, torch.Tensor)) or type(value).__module__ == "numpy":
        return str(whole(value, field, where))
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadSample(where, field, f"a prompt's id should be text or an integer, got {shown(value)}")
    return str(value)


def only_tokens(row: Mapping[str, Any], where: str) -> None:
    """Check that a sample holds nothing that the policy saw besides its tokens.

    Raises:
        BadSample: it holds images, videos or sounds.
    """
    for key in MEDIA:
        if _holds(row.get(key)):
            raise BadSample(
                where, key, "holds what the policy saw besides tokens, so that the tokens alone have another gradient",
                "a policy that reads more than text is not supported; pass --skip-bad to leave such samples out",
            )  # fmt: skip


def _holds(value: Any) -> bool:
    """Whether there is anything in a value; an empty table or list, and one of nothing but those, are empty."""
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return any(map(_holds, value))
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return len(value.shape) == 0 or value.shape[0] > 0
    return value is not None
