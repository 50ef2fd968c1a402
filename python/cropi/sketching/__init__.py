"""Turns prompt groups into rows of a store: options, the run, its summary, and Ctrl-C."""

from cropi.sketching.groups import sketch_groups
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.sketching.summary import Summary

__all__ = ["SketchJob", "Summary", "sketch", "sketch_groups"]
