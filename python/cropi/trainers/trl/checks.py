"""Checks of a curriculum's trainer when it is built, and not after its first stage."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import get_json_schema

from cropi.data.prompt_ids import column_values
from cropi.data.scan import Scan
from cropi.errors import CropiError
from cropi.files import check_room
from cropi.ranking.shares import (
    check_groups,
    check_named,
    check_rest,
    how_many,
    left_by,
    numbers_of,
    read_quotas,
)
from cropi.trainers.trl.options import Curriculum
from cropi.trainers.trl.sampler import check_enough
from cropi.trainers.trl.scoring import evaluating
from cropi.trainers.values import text_value
from cropi_kernels import GradientSketcher

logger = logging.getLogger(__name__)


def prompts_a_batch(trainer: Any) -> int:
    """Different prompts in a generation batch."""
    return int(trainer.args.generation_batch_size // trainer.num_generations)


def uses_of_a_batch(trainer: Any) -> int:
    """Micro-batches of training that a generation batch serves."""
    return int(trainer.args.steps_per_generation * trainer.num_iterations)


def check_arguments(trainer: Any, options: Curriculum, prompts: int, pool: Scan | None = None) -> None:
    """Check the trainer's arguments against the stages.

    Args:
        trainer: a GRPOTrainer.
        options: of the curriculum.
        prompts: rows of the dataset that was given.
        pool: of the files, those prompts; None: this run's rollouts are chosen among.

    Raises:
        CropiError: no number of steps, stages that cut a generation batch in two, a model in shards, rows that the
            trainer dropped, quotas that do not fit, too few prompts for one batch, a missing eval_dataset, evaluations
            that cannot be recorded, or a load-balancing loss of experts that ``live`` was not told of.
    """
    args, steps = trainer.args, options.stage_steps
    if args.max_steps <= 0:
        raise CropiError(
            f"args.max_steps is {args.max_steps}: the curriculum needs the number of optimizer steps in all, for "
            f"example max_steps={5 * steps} for 5 stages of {steps} (num_train_epochs is not used)"
        )
    if args.ignore_data_skip:
        raise CropiError(
            "args.ignore_data_skip is True: a resumed run would begin its stage's prompts anew, so that the stage gets "
            "more steps than stage_steps and later ones begin late; leave it out (skipping batches generates nothing)"
        )
    if (steps * args.gradient_accumulation_steps) % uses_of_a_batch(trainer):
        raise CropiError(
            f"stage_steps {steps} x gradient_accumulation_steps {args.gradient_accumulation_steps} is not a multiple "
            f"of steps_per_generation {args.steps_per_generation} x num_iterations {trainer.num_iterations}: a "
            "generation batch would be used across two stages; change stage_steps"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise CropiError(
            "FSDP and DeepSpeed cut the model up, and sketches need it whole on every rank: use plain data "
            "parallel (accelerate launch --multi_gpu), or run `cropi sketch`, `influence` and `select` between runs"
        )
    if len(trainer.train_dataset) != prompts:
        raise CropiError(
            f"the trainer holds {len(trainer.train_dataset)} rows of the {prompts} of train_dataset, so "
            "ids and rows do not match; prepare the dataset before it is passed"
        )
    _check_choice(trainer, options)
    if options.live is not None and not options.live.coupled and balances_experts(trainer):
        raise CropiError(
            "TRL adds the load-balancing loss of this mixture of experts, which is no sum over prompts: set "
            "live=Live(coupled=True) to take the parts of the gradient that pass through each prompt's tokens, or "
            "args.router_aux_loss_coef=0.0 to train without that loss"
        )
    batch = prompts_a_batch(trainer)
    check_enough(range(first_stage(options, prompts, pool)), batch, 0)
    # Where a fraction chooses too few of recorded prompts, more are taken.
    if options.count is not None and args.max_steps > steps:
        check_enough(range(options.count), batch, 1)
    if options.valid is None:
        if trainer.eval_dataset is None:
            raise CropiError(
                "valid is None, so validation rollouts come from eval_dataset, which is missing; pass one, or "
                "files of trajectories as valid"
            )
        check_evaluation(trainer, "a validation prompt")


def check_evaluation(trainer: Any, prompt: str) -> None:
    """Check that an evaluation of a trainer gives rollouts that can be recorded.

    TRL checks the batch where ``eval_strategy`` is set, and not of an evaluation that is called.

    Args:
        trainer: a GRPOTrainer.
        prompt: what its prompts are, in words.

    Raises:
        CropiError: one response a prompt, or batches that cut a prompt's responses in two.
    """
    responses, rows = int(trainer.num_generations_eval), int(trainer.args.per_device_eval_batch_size)
    if responses < 2:
        raise CropiError(
            f"num_generations_eval is {responses}: {prompt} needs at least 2 responses for an advantage"
        )
    world = int(trainer.args.world_size)
    if rows * world % responses:
        ranks = f" x {world} processes" if world > 1 else ""
        raise CropiError(
            f"args.per_device_eval_batch_size {rows}{ranks} is not a multiple of num_generations_eval {responses}, so "
            "that a batch of an evaluation would cut a prompt's responses in two; set per_device_eval_batch_size to "
            f"{responses * -(-rows // responses)}, or another num_generations_eval"
        )


def with_template_values(trainer: Any, options: Curriculum, scans: Mapping[str, Scan]) -> Curriculum:
    """The options with what the trainer gives to its chat template: files' prompts that are text get the same.

    Where the tools of a prompt are those of its environment, files do not say which, and a warning does.
    """
    texts = {kind: scan.prompts - scan.with_prompt_ids for kind, scan in scans.items()}
    if not any(texts.values()):
        return options
    variables, tools = options.chat_template_kwargs, options.tools
    if variables is None:
        variables = trainer.args.chat_template_kwargs
    if tools is None and trainer.tools and trainer.environment_factories is None:
        tools = [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in trainer.tools]
    if tools is None and trainer.tools:
        logger.warning(
            "%s prompts are text, and the chat template renders them without the tools of the trainer's environments: "
            "give each record its 'tools', or store 'prompt_ids'",
            " and ".join(f"{count} {kind}" for kind, count in texts.items() if count),
        )  # fmt: skip
    return replace(options, chat_template_kwargs=variables or None, tools=tools or None)


def balances_experts(trainer: Any) -> bool:
    """Whether TRL adds a load-balancing loss of experts (its versions before that say nothing of one)."""
    return bool(getattr(trainer, "aux_loss_enabled", False))


def first_stage(options: Curriculum, prompts: int, pool: Scan | None) -> int:
    """How many prompts the first stage trains on at most: a selection, or all that there are.

    Raises:
        CropiError: the fraction chooses nothing.
    """
    if options.live is not None:
        return drawn(options, prompts)
    if pool is None or not pool.usable:  # nothing is recorded yet, or to be selected
        return prompts
    size = pool.usable if options.pool == "usable" else pool.prompts
    return min(options.count or how_many(options.fraction, size), pool.usable)


def drawn(options: Curriculum, pool: int) -> int:
    """How many prompts of a pool are the next stage's, where the steps' own sketches choose.

    Raises:
        CropiError: none, or more than there are.
    """
    if options.count is None:
        return how_many(options.fraction, pool)
    if options.count > pool:
        raise CropiError(f"count {options.count} is more than the {pool} prompts of train_dataset; lower it")
    return options.count


def _check_choice(trainer: Any, options: Curriculum) -> None:
    """Check what is known of a choice before prompts are recorded: the first one comes after a stage's training.

    Later stages choose among the prompts that the first one records, and not all of these have a gradient.
    """
    one_stage = trainer.args.max_steps <= options.stage_steps
    if options.train is not None or options.recording is None or options.live is not None or one_stage:
        return
    dataset = trainer.train_dataset
    most = recorded_first(trainer, options, len(dataset))
    if options.count is not None and options.count > most:
        raise CropiError(
            f"count {options.count} is more than the {most} prompts that the first stage records, and later stages "
            "choose among these; lower it, make stage_steps larger, or give trajectories as train"
        )
    quotas = read_quotas(options.quota)
    batch = prompts_a_batch(trainer)
    n = options.count or how_many(options.fraction, most, batch)
    counts, taken = numbers_of(n, quotas)
    if options.per == "file" or (options.per == "pool" and not quotas):
        return
    _, [values] = column_values(dataset, "task") if "task" in options.recording.columns else ([], [None])
    tasks = Counter("" if value is None else str(text_value(value, "task")) for value in values or [None])
    check_named(tasks, "task")
    if not quotas:
        return
    check_groups(quotas, tasks, "task")
    # A fraction of the prompts with a gradient is of a number that is not known yet, and so are shares of it.
    known = options.count is not None or options.pool == "all"
    for name, number in counts.items():
        if (known or not isinstance(quotas[name], float)) and number > tasks[name]:
            raise CropiError(
                f"quota: {name!r} is to give {number} prompts, but train_dataset has {tasks[name]} of it; lower it"
            )
    if known:
        check_rest(n, taken, quotas, tasks)
        left_by(counts, tasks, options.count)


def check_policy(model: Any, options: Curriculum) -> None:
    """Check that the policy can be sketched: that every parameter has a tap, and every pattern of ``exclude`` a match.

    The model runs on a few tokens; its mode and the random state are left as they were.

    Raises:
        CropiError: says why not, as the first selection would.
    """
    try:
        with (
            evaluating(model),
            GradientSketcher(model, options.spec, exclude=tuple(options.exclude)) as taps,
        ):
            taps.check_model()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise CropiError(f"the policy cannot be sketched: {error}") from error


def recorded_first(trainer: Any, options: Curriculum, prompts: int) -> int:
    """How many of the dataset's prompts the first stage can record at most."""
    steps = options.stage_steps * trainer.args.gradient_accumulation_steps
    return min(prompts, steps // uses_of_a_batch(trainer) * prompts_a_batch(trainer))


def check_space(
    trainer: Any, options: Curriculum, scans: Mapping[str, Scan], folder: Path, prompts: int
) -> None:
    """Check that the disk has room for the sketches, which the first selection would find out otherwise.

    Counted are ``dim`` float32 numbers for every prompt with a gradient in the files, and for every prompt that the
    first stage can record at most, where there are none; of two stages with a budget, of all with ``keep_sketches``.

    Raises:
        CropiError: names the folder, what is needed and what is free.
    """
    rows = scans["train"].usable if "train" in scans else recorded_first(trainer, options, prompts)
    rows += scans["valid"].usable if "valid" in scans else 0
    # With a budget a stage keeps those of the one before it until it has chosen.
    stages = 2 if options.asked else 1
    if options.keep_sketches:
        stages = -(-trainer.args.max_steps // options.stage_steps)
    check_room(folder, 4 * options.spec.dim * rows * stages, f"the sketches of {rows} prompts")
