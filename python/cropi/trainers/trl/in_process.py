"""Training a stage in this process, with TRL's GRPOTrainer."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch

from cropi.atomic import write_atomic
from cropi.checked import fits, in_words, is_number
from cropi.data.export import without_rollouts
from cropi.data.readers import read
from cropi.data.records import PromptGroup
from cropi.data.rows_out import columns_of
from cropi.errors import CropiError, did_you_mean, optional, shown
from cropi.files import failure_of, reason
from cropi.model.load import load_model
from cropi.model.placing import DTYPES, check_device
from cropi.rollouts.rewards import named_function
from cropi.sealed import sealed
from cropi.trainers.trl.as_scored import prompts_as_scored
from cropi.trainers.trl.checkpoints import newest_whole
from cropi.trainers.trl.versions import check_version

KEYS = ("reward", "args", "dtype", "device")
# These belong to the stage.
OURS = ("output_dir", "max_steps", "num_train_epochs")
CHECKPOINTS = "checkpoints"
FULL = 2**20  # bytes that are left on a disk that is called full
STATE = "trainer_state.json"  # of transformers, the last file of a checkpoint


def check_options(options: Mapping[str, Any]) -> None:
    """Check the ``trl`` table of a config before any compute.

    ``reward`` names one or more functions as ``FILE.py:NAME`` or ``MODULE:NAME``, with TRL's signature (completions and
    the columns of the records as keyword arguments); ``args`` are options of ``GRPOConfig``; ``dtype`` and ``device``
    are those of the policy.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        CropiError: a TRL that was not tried, a key is unknown or missing, or a reward function cannot be found.
    """
    for key in options:
        if key not in KEYS:
            raise CropiError(
                f"trl: {shown(key)} is not known; {did_you_mean(key, KEYS)}known are {', '.join(KEYS)}"
            )
    if not options.get("reward"):
        raise CropiError("trl: 'reward' is missing, the reward function as FILE.py:NAME or MODULE:NAME")
    for key, wanted in (("reward", str | list[str]), ("dtype", str), ("device", str)):
        if key in options and not fits(options[key], wanted):
            raise CropiError(f"trl: {key} must be {in_words(wanted)}, got {shown(options[key])}")
    for name in _names(options["reward"]):
        named_function(name, "trl.reward")
    check_version()
    if options.get("dtype", "float32") not in DTYPES:
        raise CropiError(f"trl: dtype must be one of {', '.join(DTYPES)}, got {options['dtype']!r}")
    check_device("trl: device", options.get("device", "cpu"))
    given = options.get("args") or {}
    if not isinstance(given, Mapping):
        raise CropiError(f"trl.args should be a table of options of GRPOConfig, got {given!r:.200}")
    config = optional("trl").GRPOConfig
    known, hints = set(config.__dataclass_fields__), get_type_hints(config)
    for key, value in given.items():
        if key in OURS:
            raise CropiError(f"trl.args: {key!r} is set by the stage; take it out")
        if key not in known:
            raise CropiError(
                f"trl.args: GRPOConfig has no {key!r}; {did_you_mean(key, known)}see its documentation"
            )
        if not fits(value, hints[key]):
            number = isinstance(value, str) and is_number(value)
            raise CropiError(
                f"trl.args: {key} must be {in_words(hints[key])}, got {value!r:.200}"
                + ("; it is text: in YAML, 1e-6 is text and 1.0e-6 a number" if number else "")
            )
    make_config(options, 1, Path("checked"))


def make_config(options: Mapping[str, Any], steps: int, out: Path) -> Any:
    """The GRPOConfig of a stage. It makes no folder.

    Raises:
        CropiError: TRL or transformers refuses a value, or two that do not fit together.
    """
    device = options.get("device", "cpu")
    config: dict[str, Any] = {"report_to": "none", "use_cpu": device == "cpu"}
    if device == "cpu":
        config["bf16"] = False  # TRL's default; slow and less exact where the CPU has no bfloat16 units
    config |= options.get("args") or {}
    try:
        return optional("trl").GRPOConfig(output_dir=str(out), max_steps=steps, **config)
    except (ValueError, TypeError, ImportError) as error:
        raise CropiError(f"trl.args: GRPOConfig does not take these options: {error}") from error


def batch_of_options(options: Mapping[str, Any]) -> int:
    """Different prompts in one generation batch."""
    return _prompts_in(make_config(options, 1, Path("checked")))


def _prompts_in(config: Any) -> int:
    return int(config.generation_batch_size // config.num_generations)


def train_stage(
    options: Mapping[str, Any],
    model: str,
    records: Path,
    steps: int,
    out: Path,
    *,
    tokens: Callable[[PromptGroup], list[int]] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Train on the selected prompts with GRPO; an attempt that was cut short goes on at its last checkpoint.

    Args:
        options: see :func:`check_options`.
        model: the current policy, as for :func:`cropi.model.load.load_model`.
        records: the trajectory records of the selected prompts. Their rollouts are left out: TRL samples new ones.
        steps: optimizer steps.
        out: a folder, for checkpoints and the new policy.
        tokens: the tokens by which a prompt was scored (:mod:`cropi.trainers.trl.as_scored`); None: prompts are given
            to TRL as they are.
        trust_remote_code: as for :func:`cropi.model.load.load_model`.

    Returns:
        The folder of the new policy, in Hugging Face form.
    """
    trl, datasets = optional("trl"), optional("datasets")
    device = options.get("device", "cpu")
    started = newest_whole(out / CHECKPOINTS, STATE)
    # From its last step transformers' trainer would go on with one more, where that is not the end of an epoch.
    trained = started if started and int(started.name.rpartition("-")[2]) >= steps else None
    policy, tokenizer = load_model(
        str(trained or model),
        dtype=options.get("dtype", "float32"),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    arguments = make_config(options, steps, out / CHECKPOINTS)
    rows = _rows(records, arguments, tokenizer, tokens)
    rewards = [named_function(name, "trl.reward") for name in _names(options["reward"])]
    trainer = trl.GRPOTrainer(
        model=policy, reward_funcs=rewards, args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns_of(rows)), processing_class=tokenizer,
    )  # fmt: skip
    new = out / "policy"
    # Around what writes alone: a reward function has disks and rights of its own.
    trainer._save_checkpoint = _saving(out)(trainer._save_checkpoint)
    if trained:
        history = json.loads((trained / STATE).read_text(encoding="utf-8"))["log_history"]
    else:
        trainer.train(resume_from_checkpoint=str(started) if started else None)
        history = trainer.state.log_history
    with _saving(out):
        if summary := training_summary(history):
            write_atomic(out / "training.json", json.dumps(sealed(summary)) + "\n")
        trainer.save_model(str(new))
        tokenizer.save_pretrained(str(new))
    # The next step loads the new policy; this one and its optimizer must be gone by then.
    del trainer, policy
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return new


def _rows(
    records: Path, arguments: Any, tokenizer: Any, tokens: Callable[[PromptGroup], list[int]] | None
) -> list[dict[str, Any]]:
    """The rows of the selected prompts, without rollouts, as :func:`train_stage` gives them to TRL.

    Raises:
        CropiError: they are fewer than one generation batch takes.
    """
    groups = list(read(records))
    rows = [without_rollouts(group) for group in groups]
    if len(rows) < (batch := _prompts_in(arguments)):
        raise CropiError(
            f"{records}: {len(rows)} prompts are selected, but one generation batch takes {batch} different ones "
            "(generation_batch_size / num_generations in trl.args), so TRL would train nothing; raise fraction or "
            "count, or make the batch smaller"
        )
    if tokens is None or tokenizer is None:
        return rows
    prompts = prompts_as_scored(groups, tokenizer, tokens, arguments.chat_template_kwargs)
    return [row | {"prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Inside, a failing disk becomes an error in words.

    safetensors tells of one by an error of its own, and torch.save by one that does not name it.

    Raises:
        CropiError: the disk is full, or fails.
    """
    try:
        yield
    except Exception as error:
        failure = failure_of(error)
        if failure is None and shutil.disk_usage(folder).free < FULL:
            failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if failure is None or isinstance(error, CropiError):
            raise
        raise CropiError(
            f"training stopped: {folder} cannot be written: {reason(failure)}; then the same command goes on at the "
            "last whole checkpoint"
        ) from error


def _names(reward: Any) -> list[str]:
    return [reward] if isinstance(reward, str) else list(reward)


def training_summary(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Reward and share of prompts with equal rewards at the beginning and at the end of a training.

    Args:
        history: what TRL logged, with ``step``, ``reward`` and ``frac_reward_zero_std``.

    Returns:
        ``reward`` and ``equal_rewards``, each ``[before, after]`` (means over the first and the last quarter of the
        entries, at least one of each), and ``steps``, the logged ones; None where no reward was logged.
    """
    seen = [entry for entry in history if _number(entry.get("reward"))]
    if not seen:
        return None
    size = max(1, len(seen) // 4)
    summary: dict[str, Any] = {"steps": [int(seen[0].get("step", 0)), int(seen[-1].get("step", 0))]}
    for name, key in (("reward", "reward"), ("equal_rewards", "frac_reward_zero_std")):
        ends = [[float(e[key]) for e in part if _number(e.get(key))] for part in (seen[:size], seen[-size:])]
        summary[name] = [sum(values) / len(values) if values else None for values in ends]
    return summary


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
