"""The backward passes that reach the taps of an open batch. All of them add to its sketches, so their sum must be the
gradient that the caller means."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

NONE = (
    "no backward pass ran inside the block, or none that came by a tap, so its sketches would be zeros: run forward "
    "and backward of the batch inside of it, with gradients enabled, and leave the block out where there is no "
    "backward pass. If one ran, the model was compiled before the taps came: compile inside of the `with` block "
    "(torch.compiler.reset() forgets what was compiled)"
)


class BackwardPasses:
    """Takes note of each pass when it comes by its first tap.

    Args:
        trained: the parameters whose gradients the passes form, where they form any.
    """

    def __init__(self, trained: Iterable[torch.Tensor] = ()) -> None:
        self._trained = trained
        self._nodes: list[Any] | None = None
        self._seen: set[int] = set()
        self._running: dict[int, int] = {}  # their threads
        # Whether one of them can be differentiated, and whether they leave gradients in the parameters.
        self._again, self._leave = False, None  # type: bool, bool | None

    def note(self, where: str) -> None:
        """A pass has come to ``where``.

        Raises:
            RuntimeError: it differentiates another one, is one of `torch.autograd.grad` beside one of `backward`, or
                runs beside one of another thread.
        """
        number = torch._C._current_graph_task_id()
        if number in self._seen:
            return
        if self._again and not self._running:
            raise RuntimeError(
                f"a backward pass reached {where} after one with create_graph=True in the same batch: second "
                "derivatives (a penalty on gradients, a product with the Hessian) have no sketch. Compute them outside "
                "of the batch, from a forward pass of their own"
            )
        self._seen.add(number)
        # A part of a pass is run without gradients of gradients, also where the pass itself has them.
        self._again |= torch.is_grad_enabled()
        # No pass of autograd's engine, or one that calls nothing at its end.
        if number < 0 or _is_compiled():
            return
        self._running[number] = threading.get_ident()
        if len({*self._running.values()}) > 1:
            raise RuntimeError(
                f"a backward pass reached {where} in another thread than the one that runs, and both would add to the "
                "same sums at once: run them one after the other"
            )
        # Else it is a part of the pass that runs: checkpointing may ask for a part's gradients itself.
        if len(self._running) == 1:
            leave, before = self._leaves_gradients(), self._leave
            if before is not None and leave != before:
                raise RuntimeError(
                    "torch.autograd.grad and backward() both ran in one batch, and its sketches would be the sum of "
                    "the two: compute what autograd.grad is for outside of the batch, from a forward pass of its own"
                )
            self._leave = leave
        # It is called where the pass ends without an error.
        torch.autograd.Variable._execution_engine.queue_callback(
            functools.partial(self._running.__delitem__, number)
        )

    def problem(self) -> str | None:
        """Why the sums of the passes are no gradient; None: they are."""
        if not self._seen:
            return NONE
        if self._running:
            return (
                "a backward pass inside the block raised an error on its way, and its sketches would hold a part of "
                "it: let the error leave the block, and try again in another one"
            )
        return None

    def _leaves_gradients(self) -> bool:
        """Whether the pass that runs is one of `backward`, which leaves gradients in the parameters it reaches."""
        if self._nodes is None:
            self._nodes = [get_gradient_edge(p).node for p in self._trained if p.requires_grad]
        try:
            return any(torch._C._will_engine_execute_node(node) for node in self._nodes)
        except RuntimeError:  # one of them is a gradient that autograd.grad gives back
            return False


def _is_compiled() -> bool:
    """Whether compiled autograd runs the pass: its graph, or functions that the graph calls as they are."""
    if torch.compiler.is_compiling():
        return True
    # Importing it takes seconds; while it is not imported, it runs nothing.
    running = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(running, "in_compiled_autograd_region", False))
