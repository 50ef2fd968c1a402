"""CROPI inside TRL's GRPOTrainer: record rollouts, and train each stage on the prompts that help.

    from cropi.trainers.trl import Curriculum, curriculum

    trainer = curriculum(GRPOTrainer)(
        model=..., reward_funcs=..., args=GRPOConfig(max_steps=1000, ...), train_dataset=dataset,
        curriculum=Curriculum(stage_steps=200, fraction=0.1, train="train.jsonl", valid="valid.jsonl"),
    )
    trainer.train()

``Curriculum(live=Live())`` chooses by the sketches of the run's own steps. ``recording(GRPOTrainer)`` only records;
``collect`` makes trajectory files of whole datasets with such a trainer. TRL is imported when one of these functions is
called, not before.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cropi.trainers.trl.options import Curriculum, Live, Recording

if TYPE_CHECKING:
    from trl import GRPOTrainer

__all__ = ["Curriculum", "Live", "Recording", "collect", "curriculum", "recording"]


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
    return _patched(cast(Hashable, base), "Curriculum")


def recording(base: type[GRPOTrainer] | None = None, *, allow_untested: bool = False) -> type[Any]:
    """A subclass of ``base`` that trains as before and records rollouts; it takes ``recording=Recording(...)`` besides.

    Args and errors are those of :func:`curriculum`.
    """
    from cropi.trainers.trl.versions import check_version

    check_version(allow_untested=allow_untested)
    return _patched(cast(Hashable, base), "Recording")


def collect(trainer: Any, dataset: Any, out: str | Path, *, set: str | None = None) -> int:
    """Write a trajectory file of a dataset under the present policy: see :mod:`cropi.trainers.trl.collecting`."""
    from cropi.trainers.trl.collecting import collect as work

    return work(trainer, dataset, out, set=set)


@cache
def _patched(base: Hashable, kind: str) -> type[Any]:
    import trl

    from cropi.trainers.trl.mixins import CurriculumMixin, RecordingMixin, TrlsOwn
    from cropi.trainers.trl.versions import check_trainer_class

    trainer: Any = trl.GRPOTrainer if base is None else base
    check_trainer_class(trainer)
    mixin = CurriculumMixin if kind == "Curriculum" else RecordingMixin
    own = type("TrlsOwn", (TrlsOwn, trl.GRPOTrainer), {})
    bases = (mixin, own) if trainer is trl.GRPOTrainer else (mixin, trainer, own)
    return type(f"{kind}{trainer.__name__}", bases, {"__doc__": mixin.__doc__})
