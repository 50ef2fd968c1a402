"""CROPI inside TRL's GRPOTrainer: record rollouts, and train each stage on the prompts that help.

    from cropi.trainers.trl import Curriculum, curriculum

    trainer = curriculum(GRPOTrainer)(
        model=..., reward_funcs=..., args=GRPOConfig(max_steps=1000, ...), train_dataset=dataset,
        curriculum=Curriculum(stage_steps=200, fraction=0.1, train="train.jsonl", valid="valid.jsonl"),
    )
    trainer.train()

``recording(GRPOTrainer)`` only records. TRL is imported when one of these functions is called, not before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cropi.trainers.options import Curriculum, Recording

if TYPE_CHECKING:
    from trl import GRPOTrainer

__all__ = ["Curriculum", "Recording", "curriculum", "recording"]


def curriculum(base: type[GRPOTrainer] | None = None, *, allow_untested: bool = False) -> type[Any]:
    """A subclass of ``base`` that trains in stages; its constructor takes ``curriculum=Curriculum(...)`` besides.

    Args:
        base: ``trl.GRPOTrainer`` (None) or a subclass of it.
        allow_untested: accept a TRL outside the tested range (so does ``CROPI_TRL_UNTESTED=1``).

    Raises:
        ModuleNotFoundError: TRL is not installed.
        CropiError: its version is untested, or ``base`` lacks a method that the adapter overrides.
    """
    from cropi.trainers.trl.versions import check_version

    check_version(allow_untested=allow_untested)
    return _patched(base, "Curriculum")


def recording(base: type[GRPOTrainer] | None = None, *, allow_untested: bool = False) -> type[Any]:
    """A subclass of ``base`` that trains as ever and records rollouts; its constructor takes ``recording=Recording(...)``.

    Args and errors are those of :func:`curriculum`.
    """
    from cropi.trainers.trl.versions import check_version

    check_version(allow_untested=allow_untested)
    return _patched(base, "Recording")


@lru_cache(maxsize=None)
def _patched(base: Any, kind: str) -> type[Any]:
    import trl

    from cropi.trainers.trl.recording import RecordingMixin
    from cropi.trainers.trl.stages import CurriculumMixin
    from cropi.trainers.trl.versions import check_trainer_class

    base = trl.GRPOTrainer if base is None else base
    check_trainer_class(base)
    mixin = CurriculumMixin if kind == "Curriculum" else RecordingMixin
    return type(f"{kind}{base.__name__}", (mixin, base), {"__doc__": mixin.__doc__})
