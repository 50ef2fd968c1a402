"""The helpers of support/trl_runs.py at their old place, for scripts that import them there."""

from support.trl_runs import *  # noqa: F403
