"""The two parts of a causal LM that the fused pass runs apart: the decoder (tokens to hidden states) and the head
(hidden states to logits). So logits exist for scored tokens only, and one chunk at a time.

The head may be in parts: its words or its features spread over ranks, low-rank adapters beside its weight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ...ops.linear_logprob import linear_logprob
from ...ops.linear_logprob.api import logprob_and_grad_of
from ...ops.linear_logprob.contract import OnGradient, Weigh
from ...ops.linear_logprob.products import Adapted, CutInputs, Features, logprob_and_grad_by
from ...ops.linear_logprob.slices import Words, sliced_logprob_and_grad
from ..model import ranks, sharded, spread
from .adapters import HeadAdapter
from .growing import forget_longest


class HeadRanks(NamedTuple):
    """The ranks that a head's words (axis 0 of its weight) or features are spread over, and this one's share."""

    group: ranks.Ranks
    share: spread.Share


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """``logits = softcap * tanh(scale * (decoder(tokens) @ head.weight.T + bias) / softcap)``; softcap None: no cap.

    The head multiplies in its own dtype, which may be wider than the decoder's: `head_input` is what it is given.
    ``adapters`` on the head add their products to it.
    """

    decoder: nn.Module
    head: nn.Linear
    scale: float
    softcap: float | None
    model: nn.Module
    adapters: tuple[HeadAdapter, ...] = ()

    def hidden(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        forget_longest(self.decoder)
        return decoded(self.model, self.decoder, input_ids=input_ids, use_cache=False, **kwargs)

    @contextlib.contextmanager
    def whole_head(self) -> Iterator[None]:
        """Inside, the head's weights are whole, those of a sharded model too."""
        with contextlib.ExitStack() as stack:
            for module in (self.head, *(m for one in self.adapters for m in (one.a, one.b))):
                stack.enter_context(sharded.whole(self.model, module))
            yield

    @functools.cached_property
    def _ranks(self) -> ranks.Ranks | None:
        """The ranks that share a tensor-parallel head; None: it is on this rank alone."""
        return ranks.ranks_of(self.model) if spread.is_spread(self.head.weight) else None

    def head_here(self) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """This rank's words of the head: weight, bias, and the first of them."""
        weight, bias = spread.local(self.head.weight), spread.local(self.head.bias)
        if (group := self._ranks) is None:
            return weight, bias, 0
        share = group.share(self.head.weight)
        first = share.ranges[0][0] if share.axis == 0 and share.ranges else 0
        if bias is not None and not spread.is_spread(self.head.bias) and share.axis == 0:
            bias = bias[first : first + len(weight)]
        return weight, bias, first

    def head_ranks(self) -> HeadRanks | None:
        """None: all words and features are here."""
        if (group := self._ranks) is None or (share := group.share(self.head.weight)).axis is None:
            return None
        return HeadRanks(group, share)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``h W^T + b`` of all words, with what adapters add, computed from the weights as in the fused pass."""
        with self.whole_head():
            h, (weight, bias, _), over = self.head_input(hidden), self.head_here(), self.head_ranks()
            if over is None:
                z = nn.functional.linear(h, weight, bias)
            elif over.share.axis == 0:
                z = over.group.gathered(nn.functional.linear(h, weight, bias), self.head.weight.shape[0])
            else:
                z = over.group.sum(nn.functional.linear(over.share.cut(h, 1), weight))
                z = z if bias is None else z + bias
            for a, b, more, scale in (one.weights() for one in self.adapters):
                z = z + (nn.functional.linear(h.to(a.dtype) @ a.T, b, more) * scale).to(z.dtype)
            return z

    def logprobs(self, picked: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log-probs of ``targets`` [n] from hidden states ``picked`` [n, D]; within `whole_head`."""
        if not self.adapters and self.head_ranks() is None:
            weight, bias, _ = self.head_here()
            result = linear_logprob(picked, weight, targets, bias=bias, **self._of_products(temperature))
            assert isinstance(result, torch.Tensor)
            return result
        return self.logprob_and_grad(picked, targets, None, temperature)[0]

    def logprob_and_grad(
        self,
        picked: torch.Tensor,
        targets: torch.Tensor,
        weigh: Weigh | None,
        temperature: float,
        on_gradient: OnGradient | None = None,
        whole: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`cropi_kernels.logprob_and_grad` of this head, whole or in parts; within `whole_head`.

        ``on_gradient`` gets the gradient of the logits of this rank's words; ``whole``: without a factor. ``weigh``
        None, of a head in parts: log-probs alone.
        """
        (weight, bias, first), over = self.head_here(), self.head_ranks()
        settings = dict(bias=bias, on_gradient=on_gradient, **self._of_products(temperature))
        if self.adapters:
            low = tuple(one.weights() for one in self.adapters)
            return logprob_and_grad_by(
                lambda call: Adapted(call.kernels, low, call.dtype),
                picked,
                weight,
                targets,
                weigh,
                **settings,
            )
        if over is None:
            assert weigh is not None
            return logprob_and_grad_of(picked, weight, targets, weigh, whole=whole, **settings)
        group, share = over
        if share.axis == 0:
            words = Words(first, group.sum, group.max)
            return sliced_logprob_and_grad(picked, weight, targets, weigh, words, **settings)
        features = Features(lambda x: share.cut(x, 1), lambda x: share.placed(x, 1), group.sum)
        return logprob_and_grad_by(
            lambda call: CutInputs(call.kernels, features), picked, weight, targets, weigh, **settings
        )

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states in the head's dtype: a float32 head on a bfloat16 decoder is given them in float32."""
        return hidden.to(self.head.weight.dtype)

    def _of_products(self, temperature: float) -> dict[str, Any]:
        """The temperature and soft-cap for `linear_logprob`, which applies them to ``h W^T + b`` without ``scale``."""
        cap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": cap}


def decoded(model: nn.Module, decoder: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The hidden states of all tokens that a model's decoder gives, also where it leaves some of them on every rank."""

    def run() -> torch.Tensor:
        out = decoder(*args, **kwargs)
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
        return hidden

    hidden = sharded.through(sharded.root_around(model, decoder), run)
    if not spread.is_spread(hidden):
        return hidden
    from torch.distributed.tensor import Replicate

    whole: torch.Tensor = hidden.redistribute(placements=[Replicate()]).to_local(  # type: ignore[attr-defined]
        grad_placements=[Replicate()]
    )
    return whole
