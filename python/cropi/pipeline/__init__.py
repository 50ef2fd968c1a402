"""The one chain from trajectories to chosen prompts, which the command line, curricula, TRL and Python call.

    check:  scan all trajectories; every validation set and the training files need a prompt with a gradient
    choose: check -> sketch the validation sets -> sketch the training prompts -> influence -> select -> write

Its parts can be called alone: a curriculum keeps its state between them.
"""

from cropi.pipeline.checks import Checked, Part, Setup, check
from cropi.pipeline.choosing import choose, conclude, score
from cropi.pipeline.lost import NothingToFollow
from cropi.pipeline.sketches import (
    Sketches,
    noise_stores,
    one_date,
    sketch_all,
    sketch_part,
    sketch_validation,
)

__all__ = [
    "Checked",
    "NothingToFollow",
    "Part",
    "Setup",
    "Sketches",
    "check",
    "choose",
    "conclude",
    "noise_stores",
    "one_date",
    "score",
    "sketch_all",
    "sketch_part",
    "sketch_validation",
]
