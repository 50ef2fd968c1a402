"""Adapters for slime: prompts that change inside a run, and its rollouts as trajectory records."""

from cropi._moved import moved_names

__getattr__ = moved_names(__name__, "cropi.trainers.dumps.slime")
