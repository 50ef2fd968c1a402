"""The helpers of support/made_verl.py at their old place, for scripts that import them there."""

from support.made_verl import *  # noqa: F403
