"""One tap per kind of module: what it keeps in forward, what it adds to the sketch in backward."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import nn

from ..ops.norm_grad import bias_grad, norm_grad
from ..ops.sketch_vector import sketch_vector
from ..plan import VectorPlan
from .accumulator import Accumulator
from .capture import Sink, capture
from .graph import widened_input
from .matrix import MatrixSketch


def count_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return sum(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values()))


class Tap(abc.ABC):
    """Forward hook of a module; ``where`` is the module's name, for messages."""

    def __init__(self, accumulator: Accumulator, where: str) -> None:
        self.acc, self.where = accumulator, where

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        if self.acc.segments is None or not torch.is_grad_enabled():
            return y
        if count_tensors(args, kwargs) > 1:
            raise ValueError(
                f"{self.where} is called with a second tensor (a gate?), of which its tap does not know: exclude its "
                "parameters"
            )
        x = args[0] if args else next(iter(kwargs.values()))
        return self.attach(x, y, self.acc.segments.heads_first(x))

    @abc.abstractmethod
    def attach(self, x: torch.Tensor, y: torch.Tensor, heads_first: bool) -> torch.Tensor:
        """``y`` with the capture in its graph."""

    @abc.abstractmethod
    def backward(self, heads_first: bool, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        """Add the output's gradient ``dy``, with what `attach` kept, to the sketches."""

    def sink(self, heads_first: bool) -> Sink:
        """`backward`, for this batch alone: the graph of one that failed may still be run in the next."""
        segments = self.acc.segments

        def add(dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
            if self.acc.segments is not segments:
                raise RuntimeError(
                    f"a backward pass reached {self.where} after its batch had ended: run it inside the batch"
                )
            with self.acc.timed():
                self.backward(heads_first, dy, kept)

        return add

    def rows(self, x: torch.Tensor, heads_first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.acc.segments is not None
        return self.acc.segments.tokens_first(x, self.where, heads_first)


class LinearTap(Tap):
    """nn.Linear, Conv1D, an untied or tied head: ``G = D^T A``; bias gradient ``sum D``."""

    def __init__(
        self, accumulator: Accumulator, where: str, matrix: MatrixSketch | None, bias: VectorPlan | None
    ) -> None:
        super().__init__(accumulator, where)
        self.matrix, self.bias = matrix, bias

    def attach(self, x: torch.Tensor, y: torch.Tensor, heads_first: bool) -> torch.Tensor:
        if self.matrix is None:
            return capture(y, self.sink(heads_first))
        with self.acc.timed():
            kept = self.kept(x, heads_first)
        return capture(y, self.sink(heads_first), kept)

    def kept(self, x: torch.Tensor, heads_first: bool) -> torch.Tensor:
        matrix = self.matrix
        assert matrix is not None

        def keep() -> torch.Tensor:
            direct = self.acc.direct
            if direct is not None and (kept := matrix.keep_direct(direct, x)) is not None:
                return kept
            with torch.no_grad():
                return matrix.keep(self.rows(x.detach(), heads_first)[0])

        return keep() if matrix.fold_key is None else self.acc.folded(matrix.fold_key, x, keep)

    def backward(self, heads_first: bool, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        direct, matrix, bias = self.acc.direct, self.matrix, self.bias
        if direct is not None:
            if matrix is not None and kept is not None and matrix.add_direct(direct, dy, kept):
                matrix = None
            if bias is not None and direct.add_norm(None, dy, 0.0, False, None, bias):
                bias = None
        if matrix is None and bias is None:
            return
        d, offsets = self.rows(dy, heads_first)
        if matrix is not None and kept is not None:
            matrix.add(d, kept, offsets, self.acc.out)
        if bias is not None:
            sketch_vector(bias_grad(d, offsets), bias, self.acc.out)


class EmbeddingTap(Tap):
    """nn.Embedding: only the rows that occur; ``scale`` for embeddings that multiply what they look up (Gemma)."""

    def __init__(
        self,
        accumulator: Accumulator,
        where: str,
        matrix: MatrixSketch,
        padding_idx: int | None,
        scale: float,
    ) -> None:
        super().__init__(accumulator, where)
        self.matrix, self.padding_idx, self.scale = matrix, padding_idx, scale

    def attach(self, x: torch.Tensor, y: torch.Tensor, heads_first: bool) -> torch.Tensor:
        segments = self.acc.segments
        assert segments is not None
        if y.ndim == 3 and y.shape[0] == 1 < segments.batch:
            # Positions looked up once for all rows (GPT-2): broadcasting them later would sum their gradients over
            # the batch, and with them over the segments.
            x, y = x.expand(segments.batch, -1), y.expand(segments.batch, -1, -1)
        return capture(y, self.sink(False), x)

    def backward(self, heads_first: bool, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        assert kept is not None
        x, offsets = self.rows(dy)
        ids = kept.reshape(-1).long()
        if self.padding_idx is not None:  # torch gives the padding row no gradient
            x = x * (ids != self.padding_idx).unsqueeze(-1)
        if self.scale != 1.0:
            x = x * self.scale
        self.matrix.add_rows(x, ids, offsets, self.acc.out)


class NormTap(Tap):
    """LayerNorm and every RMSNorm: the input, which autograd keeps anyway, is normalised again in backward."""

    def __init__(
        self,
        accumulator: Accumulator,
        where: str,
        weight: VectorPlan | None,
        bias: VectorPlan | None,
        centered: bool,
        eps: float,
    ) -> None:
        super().__init__(accumulator, where)
        self.weight, self.bias, self.centered, self.eps = weight, bias, centered, eps

    def attach(self, x: torch.Tensor, y: torch.Tensor, heads_first: bool) -> torch.Tensor:
        if self.weight is None:
            return capture(y, self.sink(heads_first))
        widened = widened_input(x, y)
        return capture(y, self.sink(heads_first), x.detach() if widened is None else widened)

    def backward(self, heads_first: bool, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        direct = self.acc.direct
        if direct is not None and direct.add_norm(kept, dy, self.eps, self.centered, self.weight, self.bias):
            return
        d, offsets = self.rows(dy, heads_first)
        if self.weight is None or kept is None:
            assert self.bias is not None
            sketch_vector(bias_grad(d, offsets), self.bias, self.acc.out)
            return
        rows = self.rows(kept, heads_first)[0]
        with_bias = self.bias is not None
        weight, bias = norm_grad(rows, d, offsets, self.eps, centered=self.centered, with_bias=with_bias)
        sketch_vector(weight, self.weight, self.acc.out)
        if self.bias is not None and bias is not None:
            sketch_vector(bias, self.bias, self.acc.out)
