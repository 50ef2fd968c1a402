"""The helpers of support/made_curriculum.py at their old place, for scripts that import them there."""

from support.made_curriculum import *  # noqa: F403
