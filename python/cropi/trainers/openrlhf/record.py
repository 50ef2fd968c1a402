"""A recorder around any of OpenRLHF's agent executors: exact token ids, masks and log-probs.

The file that ``--train.agent_func_path`` names (earlier releases: ``--agent_func_path``) holds a class
``AgentExecutor``::

    from openrlhf.utils.agent import MultiTurnAgentExecutor
    from cropi.trainers.openrlhf import recording

    class AgentExecutor(recording(MultiTurnAgentExecutor, "rollouts")):
        def __init__(self):
            super().__init__(MyAgent)                 # as without the recorder

Every process of the rollout writes a file of its own, a row a response. Put together into one file (``cat``), ``cropi``
reads them as they are, and makes one record of a prompt's rows. OpenRLHF hands a prompt's rendered text to an executor
and no id, so the id is a hash of that text and its label. Records hold log-probs where OpenRLHF asks its engine for
them (``sampling_params.logprobs``).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cropi.data.forms import content_id
from cropi.errors import CropiError
from cropi.trainers.dumps.fields import BadSample, Unused, finite, log_probs, only_tokens, token_ids, whole
from cropi.trainers.dumps.rollout import Rollout, checked, plain_answer
from cropi.trainers.response_log import ResponseLog
from cropi.trainers.values import whole_text

NEEDED = ("prompt", "label", "sampling_params")


def recording(executor: type[Any], folder: str | os.PathLike[str]) -> type[Any]:
    """A subclass of an executor that records what ``execute`` returns.

    Args:
        executor: ``SingleTurnAgentExecutor``, ``MultiTurnAgentExecutor``, or one of your own.
        folder: of the files, which is made.

    Raises:
        CropiError: its ``execute`` is not a coroutine with the arguments prompt, label and sampling_params.
    """
    execute = getattr(executor, "execute", None)
    names = list(inspect.signature(execute).parameters)[1:] if callable(execute) else []
    if not inspect.iscoroutinefunction(execute) or any(name not in names for name in NEEDED):
        raise CropiError(
            f"recording: {executor.__name__}.execute({', '.join(names)}) is not an executor's, which is a coroutine "
            f"with the arguments {', '.join(NEEDED)}; it was written for OpenRLHF 0.9 to 0.11"
        )
    log = ResponseLog(folder)
    base: Any = executor

    class Recording(base):
        async def execute(self, *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args)) | kwargs
            # An executor may change its sampling parameters for a later turn.
            temperature = getattr(given.get("sampling_params"), "temperature", None)
            made = await super().execute(*args, **kwargs)
            for output in made if isinstance(made, list) else [made]:
                log.add("rollouts", partial(rollout_of, output, temperature))
            return made

    Recording.__name__ = Recording.__qualname__ = f"Recording{executor.__name__}"
    return Recording


def rollout_of(output: Any, temperature: Any, where: str) -> Rollout:
    """One response, checked as every record is.

    Args:
        output: what ``execute`` returned: ``prompt``, ``label``, ``observation_tokens``, ``action_ranges`` (begin and
            end of what the policy said, in tokens), ``reward`` (a number, or a list of one), ``rollout_log_probs`` (of
            all tokens, or None), ``truncated`` (whether the last turn was cut at a length).
        temperature: of the sampling.
        where: named in messages.

    Raises:
        Unused: it has no reward, or nothing of the policy.
        BadSample: a field of another form, or images.
    """
    if not isinstance(output, Mapping):
        raise BadSample(where, "output", "should be a table of fields")
    only_tokens(output, where)
    tokens = token_ids(output.get("observation_tokens"), "observation_tokens", where)
    ranges = output.get("action_ranges")
    if not isinstance(ranges, Sequence) or not ranges:
        raise Unused(where, "action_ranges", "the policy said nothing")
    mask, before = [0] * len(tokens), 0
    for start, end in ranges:
        start, end = whole(start, "action_ranges", where), whole(end, "action_ranges", where)
        if not before <= start <= end <= len(tokens):
            raise BadSample(
                where, "action_ranges", f"[{start}, {end}) is not within {len(tokens)} tokens, in order"
            )
        mask[start:end] = [1] * (end - start)
        before = end
    begin, stop = int(ranges[0][0]), before
    if not any(mask) or begin == 0:
        raise Unused(where, "action_ranges", "there is no prompt, or the policy said nothing")
    reward = output.get("reward")
    if isinstance(reward, list) and len(reward) == 1:
        (reward,) = reward  # as a remote reward model answers
    if reward is None:
        raise Unused(where, "reward", "is missing")
    values = log_probs(output.get("rollout_log_probs"), len(tokens), mask, "rollout_log_probs", where)
    prompt, cut = whole_text(str(output.get("prompt"))), output.get("truncated")
    label = plain_answer(output.get("label"), "label", where)
    return checked(Rollout(
        id=content_id({"prompt": prompt, "answer": label}), reward=finite(reward, "reward", where), step=0,
        where=where, prompt=prompt, answer=label, prompt_ids=tokens[:begin], response_ids=tokens[begin:stop],
        loss_mask=None if all(mask[begin:stop]) else mask[begin:stop],
        logprobs=None if values is None else values[begin:stop], truncated=cut if isinstance(cut, bool) else None,
        temperature=None if temperature is None else finite(temperature, "temperature", where),
    ))  # fmt: skip
