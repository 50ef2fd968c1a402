"""Choose the training prompts that help most, by sketches of per-prompt policy gradients.

>>> import cropi
>>> scores = cropi.score(model, train, valid, tokenizer=tokenizer)        # doctest: +SKIP
>>> scores.select(0.1).ids                                                # doctest: +SKIP

The names in ``__all__`` are public: before one of them changes, it gives a warning (docs/api.md). Each is imported when
it is first used, so that ``import cropi`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cropi import _moved

if TYPE_CHECKING:
    from cropi import options as options
    from cropi.api import check, influence, score, select, sketch, write_report
    from cropi.errors import CropiError, RecordError
    from cropi.gradient.estimators import Estimator, make_estimator
    from cropi.model.policy import Policy
    from cropi.ranking.pairwise import neighbours
    from cropi.ranking.scores import Scores
    from cropi.ranking.selection import Selection
    from cropi.ranking.selector import Selector
    from cropi.report.check_report import CheckReport
    from cropi.rollouts.api import rollout
    from cropi.rollouts.job import RolloutReport
    from cropi.sketching.batch import SketchedBatch, score_batch
    from cropi.store.store import SketchStore
    from cropi_kernels import GradientSketcher, LiveSketcher, SketchSpec

    __version__: str

_moved.install()

_PLACES = {
    "CheckReport": "cropi.report.check_report",
    "CropiError": "cropi.errors",
    "Estimator": "cropi.gradient.estimators",
    "GradientSketcher": "cropi_kernels",
    "LiveSketcher": "cropi_kernels",
    "Policy": "cropi.model.policy",
    "RecordError": "cropi.errors",
    "RolloutReport": "cropi.rollouts.job",
    "Scores": "cropi.ranking.scores",
    "Selection": "cropi.ranking.selection",
    "Selector": "cropi.ranking.selector",
    "SketchSpec": "cropi_kernels",
    "SketchStore": "cropi.store.store",
    "SketchedBatch": "cropi.sketching.batch",
    "check": "cropi.api",
    "influence": "cropi.api",
    "make_estimator": "cropi.gradient.estimators",
    "neighbours": "cropi.ranking.pairwise",
    "rollout": "cropi.rollouts.api",
    "score": "cropi.api",
    "score_batch": "cropi.sketching.batch",
    "select": "cropi.api",
    "sketch": "cropi.api",
    "write_report": "cropi.api",
}

__all__ = [
    "CheckReport",
    "CropiError",
    "Estimator",
    "GradientSketcher",
    "LiveSketcher",
    "Policy",
    "RecordError",
    "RolloutReport",
    "Scores",
    "Selection",
    "Selector",
    "SketchSpec",
    "SketchStore",
    "SketchedBatch",
    "__version__",
    "check",
    "influence",
    "make_estimator",
    "neighbours",
    "rollout",
    "score",
    "score_batch",
    "select",
    "sketch",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        # Of what is installed: the kernels' own would import torch, for which `cropi --version` does not wait.
        try:
            value: Any = version("cropi-kernels")
        except PackageNotFoundError:  # a checkout on the path, built in place
            from cropi_kernels import __version__ as value
    elif name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), name)
    elif name == "options":
        value = importlib.import_module("cropi.options")
    else:
        raise AttributeError(f"module 'cropi' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion: those that this module imports for itself are left out."""
    return sorted({*__all__, "options", *(name for name in globals() if name.startswith("__"))})
