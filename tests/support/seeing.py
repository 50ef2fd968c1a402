"""A small model that takes token ids, and beside them images, whose tower no token id reaches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cropi_kernels import SketchSpec

SPEC = SketchSpec(1024, width=16, vocab_width=64)
ROWS, LENGTH = 4, 7


class Seeing(nn.Module):
    """The k-th image is seen by row ``row_of[k]``, or by row k. ``attends``: tokens attend to earlier ones."""

    def __init__(self, attends: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attends = attends
        self.emb, self.tower = nn.Embedding(50, 8), nn.Linear(6, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 50)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.emb

    def forward(
        self, ids: torch.Tensor, images: torch.Tensor | None = None, row_of: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.emb(ids)
        if images is not None:
            seen = self.tower(images)
            x = x + (seen if row_of is None else torch.zeros_like(seen).index_add(0, row_of, seen))
        x = x.cumsum(1) / LENGTH if self.attends else x
        return self.head(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


def loss_of(
    model: Callable[..., torch.Tensor], step: int, seen: bool, row_of: torch.Tensor | None = None
) -> torch.Tensor:
    """Of a step's own tokens, and images of float32 or, for weights of float64, of this."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(50, (ROWS, LENGTH), generator=draw)
    images = torch.randn(ROWS, LENGTH, 6, generator=draw)
    dtype = next(getattr(model, "__self__", model).parameters()).dtype
    images = images.to(torch.promote_types(torch.float32, dtype))
    logits = model(ids, images if seen else None, row_of)
    return logits.double().log_softmax(-1)[..., 3].sum()
