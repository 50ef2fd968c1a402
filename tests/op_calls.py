"""The helpers of support/op_calls.py at their old place, for scripts that import them there."""

from support.op_calls import *  # noqa: F403
