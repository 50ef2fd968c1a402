"""Fidelity and cost, measured: run as modules from the top of the repository, e.g. python -m benchmarks.cost."""
