"""Threads in a forked child.

A fork copies the calling thread alone. GNU's OpenMP runtime, on which torch's wheels run, goes on to hand work to the
threads that its parent had and waits for them for ever: a large `project` and the products of `logprob_and_grad` hung
in a child whose parent had used more than one thread. Such a child runs on one thread, and is told so once.
"""

from __future__ import annotations

import os
import threading
import warnings

import torch

from ._level import level_of_caller

_had_threads = False  # of this process when it last forked
_lost = False  # in a child: threads of torch's may have stayed behind in the parent


def _count() -> None:
    """Threads that Python does not know are torch's pools, or may be; without /proc nobody can tell."""
    global _had_threads
    try:
        _had_threads = len(os.listdir("/proc/self/task")) > threading.active_count()
    except OSError:
        _had_threads = True


def _in_child() -> None:
    global _lost
    _lost = _lost or _had_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count, after_in_child=_in_child)


def one_thread_after_fork() -> None:
    """To be called before work that torch may divide among threads."""
    if not _lost or torch.get_num_threads() == 1:
        return
    torch.set_num_threads(1)
    warnings.warn(
        "this process was forked from one that had threads of torch's, which a fork does not copy: it runs on one "
        "thread from here on (torch.set_num_threads(1)); start processes by the method 'spawn' to use more",
        RuntimeWarning,
        stacklevel=level_of_caller(),
    )
