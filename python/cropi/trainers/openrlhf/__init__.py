"""OpenRLHF's rollouts as trajectory records, written by its own agent executors: :func:`recording`."""

from cropi.trainers.openrlhf.record import recording as recording
