"""Turns prompt groups into rows of a store: options, the run, its summary, and Ctrl-C."""
