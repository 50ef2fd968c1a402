"""Which TRL the adapter is known to work with, and what of it the adapter relies on.

The hooks are methods with a leading underscore, which TRL may change in any release. So there is a tested range, and a
check of every signature before a trainer is built.
"""

from __future__ import annotations

import inspect
from typing import Any

from cropi.errors import CropiError
from cropi.trainers.versions import checked_version

# The tests ran with 1.8.0, 1.10.0, 1.13.0, 1.14.2 and 1.16.0; 1.15 cannot train on a CPU where Triton is installed.
OLDEST, NEWEST = "1.8.0", "1.16.0"
WANTED = "trl>=1.8,<1.17"

# Method of GRPOTrainer: the parameters that are passed or read, by name.
CONTRACT: dict[str, tuple[str, ...]] = {
    "_get_train_sampler": ("self", "dataset"),
    "_set_signature_columns_if_needed": ("self",),
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": ("self", "model"),
    "_compute_loss": ("self", "model", "inputs"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "evaluate": ("self", "eval_dataset", "ignore_keys", "metric_key_prefix"),
}
SAMPLER = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")


def check_version(*, allow_untested: bool = False) -> str:
    """The installed version of TRL.

    Args:
        allow_untested: accept a version outside the tested range; so does the environment variable
            ``CROPI_TRL_UNTESTED=1``.

    Raises:
        ModuleNotFoundError: TRL is not installed.
        CropiError: its version is outside the tested range.
    """
    return checked_version(
        "trl", OLDEST, NEWEST, missing="pip install 'cropi-kernels[trl]'", allow_untested=allow_untested,
        remedy=f"pip install '{WANTED}' (allow_untested=True in Python accepts any version)",
    )  # fmt: skip


def broken_contract(base: type) -> list[str]:
    """What the adapter relies on and ``base`` (a GRPOTrainer) does not have, in words; empty if all is there."""
    from trl.trainer.utils import RepeatSampler

    found = []
    for name, needed in CONTRACT.items():
        method = getattr(base, name, None)
        missing = needed if method is None else _missing(method, needed)
        if missing:
            found.append(f"{name}() {'is gone' if method is None else 'lacks ' + ', '.join(missing)}")
    missing = _missing(RepeatSampler.__init__, SAMPLER)
    return found + ([f"RepeatSampler lacks {', '.join(missing)}"] if missing else [])


def check_trainer_class(base: Any) -> None:
    """Check that ``base`` is a GRPOTrainer with the methods that the adapter overrides.

    Raises:
        CropiError: it is not; names what is missing.
    """
    import trl

    if not (isinstance(base, type) and issubclass(base, trl.GRPOTrainer)):
        raise CropiError(f"base must be trl.GRPOTrainer or a subclass of it, got {base!r}")
    broken = broken_contract(base)
    if broken:
        raise CropiError(
            f"{base.__name__} of trl {trl.__version__} is not what this adapter was written for: {'; '.join(broken)}; "
            f"pip install '{WANTED}'"
        )


def _missing(function: Any, needed: tuple[str, ...]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters
    return tuple(name for name in needed if name not in parameters)
