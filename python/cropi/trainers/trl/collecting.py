"""Trajectories of a whole dataset under the present policy, by the trainer's own generation and rewards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from cropi.data.prompt_ids import PromptIds, column_values
from cropi.errors import CropiError, shown
from cropi.trainers.newest import merge_rollouts
from cropi.trainers.trl.checks import check_evaluation
from cropi.trainers.trl.mixins import RecorderHooks
from cropi.trainers.trl.rollout_log import RolloutLog, log_files


def collect(trainer: Any, dataset: Any, out: str | Path, *, set: str | None = None) -> int:
    """Sample ``num_generations_eval`` responses to every prompt of a dataset and write a trajectory file.

    It is an evaluation of the trainer, so the arguments of evaluations apply (``per_device_eval_batch_size``), and so
    do its metrics and callbacks.

    Args:
        trainer: made by ``recording(...)`` or ``curriculum(...)``.
        dataset: with the column of prompt ids.
        out: the ``.jsonl`` file, written whole or not at all.
        set: name of the validation set that the prompts belong to; None for training prompts, whose
            ``Recording.set_column`` is not read.

    Returns:
        The number of prompts written. Fewer than the dataset has if no reward function scored their responses.

    Raises:
        CropiError: not such a trainer, recording is off, bad ids, a single response a prompt, batches of an evaluation
            that cut a prompt's responses in two, a ``set`` beside a column of the dataset that names another one, or
            evaluations in half precision, which would leave the policy rounded.
    """
    recorder = trainer._cropi if isinstance(trainer, RecorderHooks) else None
    if recorder is None or recorder.recording is None:
        raise CropiError(
            f"trainer must be one of recording(GRPOTrainer) or curriculum(GRPOTrainer) that records, got "
            f"{type(trainer).__name__}"
        )
    check_evaluation(trainer, "a prompt")
    _check_precision(trainer)
    PromptIds(dataset, recorder.recording.id_key, "dataset")
    if set is not None:
        _check_set(dataset, set, recorder.recording.set_column)
    target, ranks, log = Path(out), recorder.ranks, recorder.log
    folder = target.with_name(f".{target.name}.collecting")
    if ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()
    recorder.log, recorder.has_sets = RolloutLog(folder, ranks.rank), set is not None
    try:
        trainer.evaluate(dataset, metric_key_prefix=f"eval_{set or 'train'}")
    finally:
        recorder.log.close()
        recorder.log, recorder.has_sets = log, True
    ranks.barrier()
    written = ranks.agree(lambda: merge_rollouts(log_files(folder, "valid"), target) if ranks.first else 0)
    if ranks.first:
        shutil.rmtree(folder)
    return ranks.share(written)


def _check_precision(trainer: Any) -> None:
    """Outside of training, transformers turns the model itself to the precision of its evaluations, and never back; its
    buffers too, of which rotary embeddings keep their frequencies in float32 in a model of bfloat16."""
    held = (*trainer.model.named_parameters(), *trainer.model.named_buffers())
    for option, dtype in (("fp16_full_eval", torch.float16), ("bf16_full_eval", torch.bfloat16)):
        other = next((name for name, x in held if x.is_floating_point() and x.dtype != dtype), None)
        if getattr(trainer.args, option) and not trainer.is_in_train and other is not None:
            raise CropiError(
                f"{option} is True: an evaluation outside of training rounds the trainer's own model to {dtype} "
                f"({other}, for example) and leaves it so, and collecting is one; train() would go on with that. "
                f"Leave {option} out"
            )


def _check_set(dataset: Any, name: str, column: str) -> None:
    """Check that no row belongs to another validation set than the one that is asked for."""
    if not isinstance(name, str) or not name:
        raise CropiError(f"set is {name!r}: give the name of a validation set, or None for training prompts")
    for i, value in enumerate(column_values(dataset, column)[1][0] or ()):
        if value not in (None, "", name):
            raise CropiError(
                f"set is {name!r}, and row {i} of dataset has the {column} {shown(value)}: collect each set by itself "
                f"(dataset.filter), or take the column out (dataset.remove_columns({column!r}))"
            )
