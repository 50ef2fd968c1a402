"""Tests of what another package does, and its releases where that goes wrong: `make test-lowest` runs on old ones."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

import pytest
import torch


def before(package: str, release: str) -> bool:
    """Whether the installed ``package`` is older; False where it is not installed."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return _numbers(found) < _numbers(release)


def needs(package: str, release: str, why: str) -> Any:
    """A mark: skipped where ``package`` is older than the release with which the test is known to pass."""
    return pytest.mark.skipif(before(package, release), reason=f"{package} before {release}: {why}")


def checkpoint_layers(model: Any, options: dict[str, Any] | None = None) -> None:
    """Turn on checkpointing in a model of transformers: its method has another name in new releases."""
    method = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    method(options)


def keep_layers(model: Any) -> None:
    """Turn checkpointing off again: the old name is deprecated in transformers 5.24, and gone in 6."""
    method = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    method()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


# Where torch does not say whether something packs what autograd saves, taps keep inputs as if something did.
NAMED_HOOKS = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason=f"torch {torch.__version__} does not name the hooks of what is saved",
)
FSDP2 = needs("torch", "2.7", "FSDP2 does not run on a CPU")
SEEN_BACKWARD = needs("torch", "2.13", "a mode of functions may not see torch.autograd.backward")
COMPILED_MODELS = needs(
    "torch", "2.7", "transformers' models cannot be compiled: it asks for a later function"
)
