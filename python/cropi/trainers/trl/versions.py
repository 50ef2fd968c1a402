"""Which TRL the adapter is known to work with, and what of it the adapter relies on.

The hooks are methods with a leading underscore, which TRL may change in any release. So there is a tested range, and a
check of every signature before a trainer is built.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from typing import Any

import torch

from cropi.errors import CropiError
from cropi.trainers.versions import checked_version, minor

# The tests ran with 1.8.0, 1.10.0, 1.13.0, 1.14.2 and 1.16.0; 1.15 cannot train on a CPU where Triton is installed.
OLDEST, NEWEST = "1.8.0", "1.16.0"
WANTED = "trl>=1.8,<1.17"

# Method of GRPOTrainer: the parameters that are passed or read, by name.
CONTRACT: dict[str, tuple[str, ...]] = {
    "_get_train_sampler": ("self", "dataset"),
    "_set_signature_columns_if_needed": ("self",),
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"
    ),
    "_compute_loss": ("self", "model", "inputs"),
    "training_step": ("self", "model", "inputs"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
}  # fmt: skip
# What is read from a trainer, from its arguments, and from the batch that it makes of its rollouts.
ATTRIBUTES = (
    "accelerator", "args", "callback_handler", "eval_dataset", "is_deepspeed_enabled", "is_fsdp_enabled", "model",
    "num_generations", "num_iterations", "reward_func_names", "reward_weights", "shuffle_dataset", "state",
    "temperature", "tools", "train_dataset", "_metrics", "_signature_columns", "_step", "_tokenizer",
    "num_generations_eval", "rollout_func", "environment_factories",
)  # fmt: skip
OPTIONS = (
    "beta", "chat_template_kwargs", "disable_tqdm", "epsilon", "epsilon_high", "generation_batch_size",
    "gradient_accumulation_steps", "ignore_data_skip",
    "importance_sampling_level", "loss_type", "max_steps", "output_dir", "per_device_eval_batch_size",
    "scale_rewards", "seed", "steps_per_generation", "sync_ref_model",
)  # fmt: skip
BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
METHODS = ("add_callback", "_get_output_dir", "get_batch_samples", "train")
SAMPLER = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")


def check_version(*, allow_untested: bool = False) -> str:
    """The installed version of TRL.

    Args:
        allow_untested: accept a version outside the tested range; so does the environment variable
            ``CROPI_TRL_UNTESTED=1``.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        CropiError: its version is older than the tested range, or cannot train here.
    """
    installed = checked_version(
        "trl", OLDEST, NEWEST, missing="pip install 'cropi-kernels[trl]'", allow_untested=allow_untested,
        remedy=f"pip install '{WANTED}' (allow_untested=True in Python accepts any version)",
    )  # fmt: skip
    if (
        minor(installed) == (1, 15)
        and not torch.cuda.is_available()
        and importlib.util.find_spec("triton") is not None
    ):
        raise CropiError(
            f"trl {installed} does not train on a CPU where Triton is installed: it asks Triton for a GPU and ends "
            "with \"0 active drivers\"; pip install 'trl>=1.16,<1.17' (or 1.14), or uninstall triton"
        )
    return installed


def broken_contract(base: type) -> list[str]:
    """What the adapter relies on and ``base`` (a GRPOTrainer) does not have, in words; empty if all is there."""
    import trl

    broken = []
    for name, needed in CONTRACT.items():
        method = getattr(base, name, None)
        missing = needed if method is None else _missing(method, needed)
        if missing:
            broken.append(f"{name}() {'is gone' if method is None else 'lacks ' + ', '.join(missing)}")
    sampler = getattr(importlib.import_module("trl.trainer.utils"), "RepeatSampler", None)
    missing = SAMPLER if sampler is None else _missing(sampler.__init__, SAMPLER)
    broken += [f"RepeatSampler lacks {', '.join(missing)}"] if missing else []
    set_there = _attributes(base)
    missing = tuple(
        name for name in (*ATTRIBUTES, *METHODS) if not hasattr(base, name) and name not in set_there
    )
    broken += [f"the trainer has no {', '.join(missing)}"] if missing and set_there else []
    missing = tuple(name for name in OPTIONS if name not in trl.GRPOConfig.__dataclass_fields__)
    return broken + ([f"GRPOConfig has no {', '.join(missing)}"] if missing else [])


def check_trainer(trainer: Any) -> None:
    """Check that a trainer that has been built holds everything that is read from it.

    Raises:
        CropiError: names what is missing, before anything is trained.
    """
    missing = [name for name in ATTRIBUTES if not hasattr(trainer, name)]
    if missing:
        raise _changed(type(trainer), f"the trainer has no {', '.join(missing)}")


def check_batch(trainer: Any, output: Any) -> None:
    """Check that a generation batch holds what is recorded of it.

    Raises:
        CropiError: names what is missing.
    """
    wanted = (*BATCH, "tool_mask") if trainer.tools else BATCH
    missing = [name for name in wanted if name not in output]
    if missing:
        raise _changed(type(trainer), f"_generate_and_score_completions() gives no {', '.join(missing)}")


def _attributes(base: type) -> set[str]:
    """The names that the methods of a class and of those above it set on ``self``; empty if no source can be read."""
    names: set[str] = set()
    for cls in base.__mro__:
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):
            continue
        names |= set(re.findall(r"\bself\.(\w+)\s*(?:,\s*self\.\w+\s*)*(?::[^=\n]+)?=(?!=)", source))
    return names


def _changed(base: Any, what: str) -> CropiError:
    import trl

    return CropiError(
        f"{base.__name__} of trl {trl.__version__} is not what this adapter was written for: {what}; "
        f"pip install '{WANTED}'"
    )


def check_trainer_class(base: Any) -> None:
    """Check that ``base`` is a GRPOTrainer with the methods that the adapter overrides.

    Raises:
        CropiError: it is not; names what is missing.
    """
    import trl

    if not (isinstance(base, type) and issubclass(base, trl.GRPOTrainer)):
        other = (
            "in place of RLOOTrainer, GRPOTrainer with loss_type='dr_grpo' and scale_rewards='none' trains the same "
            "gradient up to a factor, where beta is 0 and every generation batch is used once"
            if any(cls.__name__ == "RLOOTrainer" for cls in getattr(base, "__mro__", ()))
            else "of another trainer's steps cropi.LiveSketcher makes the sketches"
        )
        raise CropiError(f"base must be trl.GRPOTrainer or a subclass of it, got {base!r}; {other}")
    broken = broken_contract(base)
    if broken:
        raise _changed(base, "; ".join(broken))


def _missing(function: Any, needed: tuple[str, ...]) -> tuple[str, ...]:
    """Of parameters those that a function does not take, by name or in what it hands on (``*args, **kwargs``)."""
    parameters = inspect.signature(function).parameters
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= {
        p.kind for p in parameters.values()
    }:
        return ()
    return tuple(name for name in needed if name not in parameters)
