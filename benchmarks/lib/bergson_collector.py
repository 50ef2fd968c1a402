"""bergson's collector of linear layers' gradients: the hooks and projections are its own; nothing is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def collector(model: Any, names: Iterable[str]) -> Callable[[], Any]:
    """Makes contexts in which a backward pass leaves ``mod_grads``: of each module 16 x 16 numbers a sequence.

    Raises:
        ImportError: bergson is not installed.
    """
    from bergson.collector.collector import HookCollectorBase
    from bergson.gradients import GradientProcessor

    class Collector(HookCollectorBase):  # type: ignore[misc]
        def setup(self) -> None: ...

        def teardown(self) -> None: ...

        def process_batch(self, indices: list[int], **kwargs: Any) -> None: ...

        @HookCollectorBase.split_attention_heads  # type: ignore[untyped-decorator]
        def backward_hook(self, module: Any, g: torch.Tensor) -> None:
            self.mod_grads[module._name] = self._materialize_gradient(self._module_gradient(module, g))

    processor = GradientProcessor(projection_dim=16)
    return lambda: Collector(model=model, target_modules=names, processor=processor)


def rows_of(collected: Any) -> torch.Tensor:
    """All modules' numbers side by side, a row for each sequence."""
    return torch.cat([g.flatten(1) for g in collected.mod_grads.values()], 1)
