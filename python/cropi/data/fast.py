"""Records that are right, read several times faster than :mod:`json` reads them.

A decoder of msgspec parses a line and checks types and ranges in one go. Whatever it or the few checks here turn down
goes through :func:`cropi.data.records.parse_record`, which accepts it or says in words what is wrong: so both ways give
the same groups, and without msgspec only the slow one is left.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Union

from cropi.data.chat import plain_messages
from cropi.data.checks import LARGEST_TOKEN, LOGPROB_SLACK, LONGEST_ID, check_depth
from cropi.data.keys import ALIASES, FIELDS, REFUSED
from cropi.data.lines import MARK
from cropi.data.records import PromptGroup, check_line, parse_record
from cropi.data.rewards import LARGEST_REWARD
from cropi.errors import RecordError

# Files whose records have more extra keys than this are not a table; they are read the slow way.
MOST_EXTRA_KEYS = 64


class RecordReader:
    """Reads the records of files of one kind; the extra keys that it has met become part of its decoder.

    ``rewards``: see :func:`cropi.data.records.make_group`.
    """

    def __init__(self, rewards: bool | None = True) -> None:
        self._rewards = rewards
        self._extra: dict[str, str] = {}  # key in the record -> name of the decoder's field
        self._decoder: Any = self._make()

    def __call__(self, line: bytes, where: str, default_id: str | None = None) -> PromptGroup:
        """The checked group of one line.

        Raises:
            RecordError: as :func:`cropi.data.records.parse_record`.
        """
        if line.startswith(MARK):
            line = line[3:]
        if self._decoder is not None and self._rewards is not False:
            check_line(line, where)
            try:
                record = self._decoder.decode(line)
            except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
                record = None
            if record is not None and (group := self._group(record, line, where)) is not None:
                return group
        group = parse_record(line, where, default_id=default_id, rewards=self._rewards)
        self._learn(group)
        return group

    def _learn(self, group: PromptGroup) -> None:
        new = [key for key in group.extra if key not in self._extra]
        if self._decoder is None or not new:
            return
        # What stands under another name was given its own by the slow way, which such records keep taking.
        if any(
            key in ALIASES
            or key in REFUSED
            or key in FIELDS
            or not key.isprintable()
            or set(key) & {'"', "\\"}
            for key in new
        ):
            return
        for key in new:
            self._extra[key] = f"extra_{len(self._extra)}"
        self._decoder = self._make() if len(self._extra) <= MOST_EXTRA_KEYS else None

    def _make(self) -> Any:
        msgspec = _msgspec()
        if msgspec is None:
            return None
        token = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_TOKEN)]
        logprob = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=LOGPROB_SLACK)]
        number = Union[int, float]  # noqa: UP007 (evaluated, also by Python 3.10)
        messages = list[dict[str, Any]]
        kinds: dict[str, Any] = {
            "prompt": Union[str, messages],  # noqa: UP007
            "responses": list[str], "prompt_ids": list[token],
            "response_ids": list[list[token]],
            "logprobs": list[list[logprob]], "temperature": number, "truncated": list[bool], "policy": str,
            "set": str, "task": str, "answer": Any, "tools": list[Any], "chat_template_kwargs": dict[str, Any],
            "loss_mask": list[list[Annotated[int, msgspec.Meta(ge=0, le=1)]]],
        }  # fmt: skip
        fields: list[Any] = [("id", Union[str, int]), ("rewards", list[number])]  # noqa: UP007
        fields += [(name, Union[kind, None], None) for name, kind in kinds.items()]  # noqa: UP007
        fields += [(name, Any, msgspec.UNSET) for name in self._extra.values()]
        struct = msgspec.defstruct(
            "Record", fields, rename={name: key for key, name in self._extra.items()} or None,
            forbid_unknown_fields=True, gc=False,
        )  # fmt: skip
        return msgspec.json.Decoder(struct)

    def _group(self, record: Any, line: bytes, where: str) -> PromptGroup | None:
        """The group of a decoded record, or None where anything about it is not as simple as it can be."""
        if not _simple(record):
            return None
        name, missing = str(record.id), _msgspec().UNSET
        extra = {
            key: value
            for key, attribute in self._extra.items()
            if (value := getattr(record, attribute)) is not missing
        }
        prompt = record.prompt
        try:
            check_depth(
                {"answer": record.answer, "tools": record.tools, "kwargs": record.chat_template_kwargs}, where
            )
            check_depth(extra, where)
            if isinstance(prompt, list):
                check_depth({"prompt": prompt}, where)
                prompt = plain_messages(prompt, "prompt", where)
        except RecordError:
            return None
        return PromptGroup(
            name, prompt, record.responses, record.rewards, record.answer, record.prompt_ids, record.response_ids,
            record.logprobs, record.loss_mask, record.temperature, record.truncated, record.tools,
            record.chat_template_kwargs, record.policy, record.set, record.task, extra, where, line,
        )  # fmt: skip


def _simple(record: Any) -> bool:
    """Whether the sizes of a decoded record fit together."""
    rewards, ids, prompt_ids, masks = record.rewards, record.response_ids, record.prompt_ids, record.loss_mask
    count, responses, logprobs = len(rewards), record.responses, record.logprobs
    if not count or not (prompt_ids or (record.prompt and prompt_ids is None)):
        return False
    if isinstance(record.id, str) and (len(record.id) > LONGEST_ID or not record.id.strip()):
        return False
    if not all(-LARGEST_REWARD <= reward <= LARGEST_REWARD for reward in rewards):
        return False
    for part in (ids, responses, logprobs, masks, record.truncated):
        if part is not None and len(part) != count:
            return False
    if ids is None:
        if responses is None or logprobs is not None or masks is not None or not all(responses):
            return False
    else:
        sizes = list(map(len, ids))
        if not all(sizes):
            return False
        if logprobs is not None and list(map(len, logprobs)) != sizes:
            return False
        if masks is not None and (list(map(len, masks)) != sizes or not all(map(any, masks))):
            return False
    temperature = record.temperature
    return temperature is None or 0 < temperature <= sys.float_info.max


def _msgspec() -> Any:
    try:
        import msgspec
    except ModuleNotFoundError:
        return None
    return msgspec
