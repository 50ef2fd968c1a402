"""SkyRL's rollouts as trajectory records, written by its own generators: :func:`recording`."""

from cropi.trainers.skyrl.record import recording as recording
