"""Products with frozen weights by oneDNN, weights packed once in both directions, where torch's own are slow.

``y = x W^T + b`` and ``dx = dy W`` of float32 ``nn.functional.linear`` on a CPU. torch multiplies by MKL, which reaches
half of the machine's rate on some processors that are not Intel's; oneDNN, which torch carries too, packs a weight into
its kernel's own order, and a weight that stays as it is for a whole scoring pass need be packed once.

- ``"torch"``: nothing is changed.
- ``"onednn"``: every such product of the model's own frozen weights, whatever it costs.
- ``"auto"``: the shapes of which a measurement at the first pass says that they take 0.6 of torch's time or less. Where
  oneDNN wins it takes less than half; where torch is near the machine's rate, 0.8 to 1. On a loaded machine two
  measurements may still differ, and the bits with them: `choices` says what was decided for a model, and `decide` fixes
  it, so that a job that goes on tomorrow, or on several processes, computes the same bits.

Results are within rounding of torch's, the same bits for every thread count. Left to torch are products of fewer than
16 rows, whose bits would depend on the threads, and checkpointed layers. The packed copies take twice the memory of the
weights that are used so (`PackedLinears.nbytes`) and are freed with the sketcher's ``with`` block.
"""

from __future__ import annotations

import functools
import operator
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Linears = Literal["auto", "torch", "onednn"]
VARIABLE = "CROPI_KERNELS_LINEARS"
_GAIN = 0.6  # oneDNN is taken where its time is at most this share of torch's
_TOKENS, _ROUNDS = 128, 5  # rows and repetitions of a measurement
_LEAST_ROWS = 16  # for fewer, oneDNN splits the sum between threads
_LEAST_SIZE = 1 << 16  # smaller weights are not measured: most of their time is the call's
_SAMPLE = 8, 4  # so many rows and columns tell whether a weight is still the one that was packed


def checked(linears: str | None) -> Linears:
    """The choice, or that of the environment where none was made.

    Raises:
        ValueError: it is not one of the three.
    """
    chosen, said = (os.environ.get(VARIABLE) or "auto", VARIABLE) if linears is None else (linears, "linears")
    if chosen not in get_args(Linears):
        raise ValueError(f"{said}={chosen!r}: choose one of {', '.join(get_args(Linears))}")
    return chosen  # type: ignore[return-value]


def unsupported() -> str | None:
    """Why this build of torch has no such products, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch is without oneDNN"
    used = "_linear_pointwise", "_reorder_linear_weight"
    if not all(hasattr(torch.ops.mkldnn, name) for name in used):
        return f"torch {torch.__version__} has no packed linear layers"
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return f"torch {torch.__version__} does not say whether a layer is checkpointed"
    return None


def product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b`` for a packed W."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight`` [out, in] in the order of oneDNN's kernel."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _TOKENS)
    return packed


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pair: _Pair, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.pair = pair
        return product(x.contiguous(), pair.forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return product(dy.contiguous(), ctx.pair.backward), None, None


class _Pair:
    """A weight, packed for both directions; ``backward`` when it is first asked for."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.state, self.forward = weight, _state(weight), pack(weight)

    @functools.cached_property
    def backward(self) -> torch.Tensor:
        return pack(self.weight.detach().t())

    def is_current(self) -> bool:
        pointer, version, sample = _state(self.weight)
        return (pointer, version) == self.state[:2] and torch.equal(sample, self.state[2])

    @property
    def nbytes(self) -> int:
        copies = 2 if "backward" in self.__dict__ else 1
        return copies * self.weight.numel() * self.weight.element_size()


def _state(weight: torch.Tensor) -> tuple[int, int, torch.Tensor]:
    # Optimizers raise the version. Code that writes through `.data` does not, so that some of the numbers are compared.
    rows, cols = (max(1, size // n) for size, n in zip(weight.shape, _SAMPLE, strict=True))
    return weight.data_ptr(), weight._version, weight.detach()[::rows, ::cols].clone()


class PackedLinears(TorchFunctionMode):
    """While it is entered, ``linear`` of these parameters runs as `linears` says.

    Args:
        parameters: the model's; those that require a gradient, or are not dense float32 matrices on the CPU, are left.
        linears: one of the three.
        inference: for passes without a gradient: the weights may require one and must stay as they are while it is
            entered, only the product is packed, and the bits of few rows may depend on the threads.

    Raises:
        RuntimeError: ``"onednn"`` was asked for by name, and torch has none; says why.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        linears: Linears = "auto",
        *,
        inference: bool = False,
    ) -> None:
        super().__init__()
        self._inference = inference
        why = unsupported()
        if linears == "onednn" and why is not None:
            raise RuntimeError(f"linears='onednn' cannot be had: {why}; give linears='torch'")
        self.linears: Linears = "torch" if why is not None else linears
        self._own = set(parameters) if self.linears != "torch" else set()
        self._pairs: dict[int, _Pair] = {}
        self._asked = False  # whether a product was asked for since the last `clear`
        # For inference: weights that were compared with their packed copies since it was entered.
        self._current: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copies."""
        return sum(pair.nbytes for pair in self._pairs.values())

    def around(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """The context of a pass of ``model``: this, or nothing where no product would change.

        Raises:
            RuntimeError: ``"onednn"`` was asked for by name, and modules are compiled, whose products it does not see.
        """
        if not self._own or (self._asked and not self._pairs):
            return nullcontext()
        # One tells the device of all, since a pass has its weights on one. Of some hundred weights, a generator would
        # take a third of the time of all checks of a batch.
        on_host = next(iter(self._own)).is_cpu
        if not on_host or torch.float32 not in map(operator.attrgetter("dtype"), self._own):
            return nullcontext()
        if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
            if self.linears == "onednn":
                raise RuntimeError(
                    "linears='onednn' does not see the products of compiled modules: give linears='torch', or the "
                    "model as it was before torch.compile"
                )
            return nullcontext()
        return self

    def __enter__(self) -> Any:
        self._current.clear()
        return super().__enter__()

    def clear(self) -> None:
        """Frees the packed copies."""
        self._pairs.clear()
        self._asked = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, bias = _operands(*args, **kwargs)
            self._asked = True
            if self._serves(x, weight, bias):
                if self._inference:
                    return product(x.contiguous(), self._pair(weight).forward, bias)
                return _Product.apply(x, self._pair(weight), bias)
        return func(*args, **kwargs)

    def _serves(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        rows = 1 if self._inference else _LEAST_ROWS
        if weight not in self._own or not _is_plain(x, weight, bias, rows):
            return False
        if self._inference:
            return not torch.is_grad_enabled() and self._gains(weight)
        return _is_still(weight, bias) and not _recomputed() and self._gains(weight)

    def _gains(self, weight: torch.Tensor) -> bool:
        if self.linears == "onednn":
            return True
        rows, cols = weight.shape
        return weight.numel() >= _LEAST_SIZE and _decided(rows, cols)

    def _pair(self, weight: torch.Tensor) -> _Pair:
        key = id(weight)
        if key in self._current:
            return self._pairs[key]
        pair = self._pairs.get(key)
        if pair is None or not pair.is_current():
            pair = self._pairs[key] = _Pair(weight)
        if self._inference:  # decoding asks for every weight at every token
            self._current.add(key)
        return pair


# Whether oneDNN multiplies by weights of a shape, as this process has measured it.
_DECISIONS: dict[tuple[int, int], bool] = {}


def choices(model: torch.nn.Module) -> dict[str, bool]:
    """Whether ``"auto"`` gives the linear layers of a model to oneDNN, by the shape of their weight (``"1536x576"``).

    Shapes that are not decided yet are measured. Empty where nothing is to decide: other dtypes and devices, or a
    choice by the environment.

    >>> choices(torch.nn.Linear(8, 4))
    {}
    """
    if unsupported() is not None or checked(None) != "auto":
        return {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    chosen = {}
    for module in model.modules():
        weight = module.weight if isinstance(module, torch.nn.Linear) and module is not head else None
        plain = type(weight) is torch.nn.Parameter and weight.dtype == torch.float32 and weight.ndim == 2
        if weight is not None and plain and weight.device.type == "cpu" and weight.numel() >= _LEAST_SIZE:
            rows, cols = weight.shape
            chosen[f"{rows}x{cols}"] = _decided(rows, cols)
    return dict(sorted(chosen.items()))


def decide(made: Mapping[str, bool]) -> None:
    """Take decisions of `choices`, of an earlier run or of another process, in the place of measurements.

    Raises:
        ValueError: a key that is not a shape.
    """
    for shape, use in made.items():
        rows, cross, cols = shape.partition("x")
        if not (cross and rows.isdecimal() and cols.isdecimal()):
            raise ValueError(f"made holds the key {shape!r}: give shapes such as '1536x576'")
        _DECISIONS[int(rows), int(cols)] = bool(use)


def _decided(rows: int, cols: int) -> bool:
    if (rows, cols) not in _DECISIONS:
        _DECISIONS[rows, cols] = _ratio(rows, cols, torch.get_num_threads()) <= _GAIN
    return _DECISIONS[rows, cols]


def _operands(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return input, weight, bias


def _recomputed() -> bool:
    """Whether the layer is checkpointed: it runs again in the backward pass, where no mode of torch functions is on."""
    return (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )


def _is_plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> bool:
    """Whether the product is one of dense float32 numbers on the CPU, of so many rows at least."""
    for t in (x, weight) if bias is None else (x, weight, bias):
        subclass = type(t) not in (torch.Tensor, torch.nn.Parameter)
        if subclass or t.dtype != torch.float32 or t.device.type != "cpu" or t.layout != torch.strided:
            return False
    return (
        weight.ndim == 2 and x.numel() >= rows * weight.shape[1] > 0 and not torch.is_autocast_enabled("cpu")
    )


def _is_still(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether there is nothing but ``x`` to differentiate."""
    return not weight.requires_grad and (bias is None or not bias.requires_grad)


@functools.cache
def _ratio(rows: int, cols: int, threads: int) -> float:
    """Time of the packed products over torch's, both directions, for weights [rows, cols]: the least of some rounds."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight, x, dy = (
            torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=generator)
            for shape in ((rows, cols), (_TOKENS, cols), (_TOKENS, rows))
        )
        there, back = pack(weight), pack(weight.t())
        runs: tuple[Callable[[], Any], ...] = (
            lambda: (product(x, there), product(dy, back)),
            lambda: (x @ weight.t(), dy @ weight),
        )
        best = [float("inf"), float("inf")]
        for _ in range(_ROUNDS):
            for i, run in enumerate(runs):
                start = time.perf_counter()
                run()
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]
