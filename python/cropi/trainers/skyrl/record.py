"""A recorder around any of SkyRL's generators: exact token ids, masks, log-probs and prompt ids.

::

    from skyrl.train.entrypoints.main_base import BasePPOExp
    from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
    from cropi.trainers.skyrl import recording

    class Exp(BasePPOExp):
        def get_generator(self, cfg, tokenizer, inference_engine_client):
            return recording(SkyRLGymGenerator, "rollouts")(...)      # with the arguments of the generator

A file a step, phase and process, a row a response, which ``cropi`` reads as they are. A prompt's id is SkyRL's
``instance_id``. Records hold log-probs where the generator gives them (``generator.sampling_params.logprobs``).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from cropi.errors import CropiError
from cropi.trainers.dumps.fields import (
    MEDIA,
    BadSample,
    Unused,
    finite,
    listed,
    log_probs,
    loss_mask,
    only_tokens,
    prompt_id,
    token_ids,
)
from cropi.trainers.dumps.rollout import Rollout, checked, messages
from cropi.trainers.response_log import ResponseLog


def recording(generator: type[Any], folder: str | os.PathLike[str]) -> type[Any]:
    """A subclass of a generator that records what ``generate`` returns.

    Args:
        generator: ``SkyRLGymGenerator``, or one of your own.
        folder: of the files, which is made.

    Raises:
        CropiError: its ``generate`` is not a coroutine that takes the batch.
    """
    generate = getattr(generator, "generate", None)
    names = list(inspect.signature(generate).parameters)[1:] if callable(generate) else []
    if not inspect.iscoroutinefunction(generate) or not names:
        raise CropiError(
            f"recording: {generator.__name__}.generate({', '.join(names)}) is not a generator's, which is a coroutine "
            "that takes a batch"
        )
    log = ResponseLog(folder)
    base: Any = generator

    class Recording(base):
        async def generate(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = await super().generate(input_batch, *args, **kwargs)
            meta = input_batch.get("batch_metadata")
            step = int(getattr(meta, "global_step", None) or 0)
            kind = f"{getattr(meta, 'training_phase', None) or 'train'}-{step:06d}"
            for i in range(len(output["response_ids"])):
                log.add(kind, partial(rollout_of, input_batch, output, i, step))
            return output

    Recording.__name__ = Recording.__qualname__ = f"Recording{generator.__name__}"
    return Recording


def rollout_of(batch: Mapping[str, Any], output: Mapping[str, Any], i: int, step: int, where: str) -> Rollout:
    """Response ``i`` of a batch, checked as every record is.

    Args:
        batch: SkyRL's ``GeneratorInput``: ``prompts``, ``trajectory_ids``, ``sampling_params``.
        output: its ``GeneratorOutput``: ``prompt_token_ids``, ``response_ids``, ``rewards`` (a number or one a token,
            which are added), ``loss_masks``, ``stop_reasons``, ``rollout_logprobs``, ``trajectory_ids``.
        step: of the training.
        where: named in messages.

    Raises:
        Unused: nothing of the policy.
        BadSample: a field of another form, no id, or images.
    """
    if output.get("is_last_step") is not None:
        raise BadSample(
            where, "is_last_step", "step-wise trajectories are several sequences with one reward", ""
        )
    only_tokens({name: _at(output, name, i, where) for name in MEDIA}, where)
    if _at(output, "process_rewards", i, where) is not None:
        raise BadSample(
            where, "process_rewards", "are beside the reward, and a record has one number a response"
        )
    ids = token_ids(_at(output, "response_ids", i, where), "response_ids", where)
    if not ids:
        raise Unused(where, "response_ids", "is empty")
    names = output.get("trajectory_ids") or batch.get("trajectory_ids")
    if not isinstance(names, Sequence) or i >= len(names):
        raise BadSample(where, "trajectory_ids", "are missing, so the prompt has no id")
    reward = _at(output, "rewards", i, where)
    if not isinstance(reward, (int, float)):
        reward = sum(finite(value, "rewards", where) for value in listed(reward, "rewards", where))
    mask = loss_mask(_at(output, "loss_masks", i, where), len(ids), "loss_masks", where)
    prompts, params = batch.get("prompts") or (), batch.get("sampling_params") or {}
    same = len(prompts) == len(output["response_ids"])
    stop = _at(output, "stop_reasons", i, where)
    return checked(Rollout(
        id=prompt_id(getattr(names[i], "instance_id", names[i]), "trajectory_ids", where),
        reward=finite(reward, "rewards", where), step=step, where=where,
        prompt_ids=token_ids(_at(output, "prompt_token_ids", i, where), "prompt_token_ids", where), response_ids=ids,
        loss_mask=mask, prompt=messages(prompts[i]) if same else None,
        logprobs=log_probs(_at(output, "rollout_logprobs", i, where), len(ids), mask, "rollout_logprobs", where),
        temperature=finite(params["temperature"], "temperature", where) if "temperature" in params else None,
        truncated=stop == "length" if isinstance(stop, str) else None,
    ))  # fmt: skip


def _at(output: Mapping[str, Any], name: str, i: int, where: str) -> Any:
    held = output.get(name)
    if held is None:
        return None
    if i >= len(held):
        raise BadSample(where, name, f"has {len(held)} entries, and response {i} is one more")
    return held[i]
