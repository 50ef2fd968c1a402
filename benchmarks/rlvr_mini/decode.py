"""One token for many rows: the decoder's step, written out, because rollouts are most of an RL step's time.

It reads the weights of a Hugging Face Llama model and computes what the model computes (a test compares them); it
differs in keeping keys and values in one buffer that is never copied to append a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class _Layer:
    norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    inner_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Decoder:
    """Keys and values of a batch of rows, left-padded prompts first, and the step that adds a token to each.

    Args:
        model: a ``LlamaForCausalLM`` with as many key as query heads.
        cache: what the model's forward over the prompts left, ``[P, heads, W, head]`` per layer.
        count: rows per prompt.
        seen: bool ``[P, W]``, False for padding.
        room: tokens that may be added.
    """

    def __init__(self, model: Any, cache: Any, count: int, seen: torch.Tensor, room: int) -> None:
        self.heads, self.eps = int(model.config.num_attention_heads), float(model.config.rms_norm_eps)
        inner = model.model
        self.embed, self.norm, self.head = inner.embed_tokens.weight, inner.norm.weight, model.lm_head.weight
        self.layers = [_read(layer) for layer in inner.layers]
        self.width = seen.shape[1]
        size = self.embed.shape[1] // self.heads
        rows, total = len(seen) * count, self.width + room
        shape = (len(self.layers), 2, rows, self.heads, total, size)
        self.memory = torch.empty(shape, device=seen.device, dtype=self.embed.dtype)
        for i, kept in enumerate(cache.layers):
            self.memory[i, 0, :, :, : self.width] = kept.keys.repeat_interleave(count, 0)
            self.memory[i, 1, :, :, : self.width] = kept.values.repeat_interleave(count, 0)
        self.bias = torch.zeros(rows, 1, 1, total, device=seen.device, dtype=self.embed.dtype)
        padding = ~seen.repeat_interleave(count, 0)
        self.bias[:, 0, 0, : self.width].masked_fill_(padding, torch.finfo(self.embed.dtype).min)
        self.place = seen.sum(1).repeat_interleave(count, 0)  # the position of the next token
        positions = torch.arange(int(self.place.max()) + room, device=seen.device)[None]
        self.cos, self.sin = (t[0] for t in inner.rotary_emb(self.memory[0, 0, :1], positions))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self.memory, self.bias, self.place = self.memory[:, :, rows], self.bias[rows], self.place[rows]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append a token to every row; returns the logits of the next one, ``[rows, vocabulary]``."""
        x, rows, end = self.embed[tokens], len(tokens), self.width + 1
        cos, sin = (t[self.place][:, None] for t in (self.cos, self.sin))
        for i, layer in enumerate(self.layers):
            qkv = F.linear(self._normed(x, layer.norm), layer.qkv).view(rows, 3, self.heads, -1)
            keys, values = self.memory[i, 0], self.memory[i, 1]
            q = qkv[:, 0] * cos + _rotated(qkv[:, 0]) * sin
            keys[:, :, self.width] = qkv[:, 1] * cos + _rotated(qkv[:, 1]) * sin
            values[:, :, self.width] = qkv[:, 2]
            scores = q[:, :, None] @ keys[:, :, :end].transpose(2, 3) * q.shape[-1] ** -0.5
            seen = torch.softmax(scores + self.bias[..., :end], -1) @ values[:, :, :end]
            x = x + F.linear(seen.reshape(rows, -1), layer.out)
            gate, up = F.linear(self._normed(x, layer.inner_norm), layer.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        self.width, self.place = end, self.place + 1
        return F.linear(self._normed(x, self.norm), self.head)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def _read(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm.weight,
        torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        mlp.down_proj.weight,
    )


def _rotated(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
