"""The helpers of support/zoo.py at their old place, for scripts that import them there."""

from support.zoo import *  # noqa: F403
