"""Small models of the families that people train, and small batches of prompts with several responses for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from cropi_kernels import GradientSketcher, PolicyGradient, SketchSpec
from cropi_kernels.testing import exact_gradient, sketch_gradients

SPEC = SketchSpec(width=16, vocab_width=64)
VOCAB = 97
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GEMMA: dict[str, Any] = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=32)
GPT2: dict[str, Any] = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
FALCON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True
)
PHI: dict[str, Any] = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}

# name: (model class, its configuration). Head norms, soft caps, factors on embeddings, biases, tied and untied heads.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(SIZES, pad_token_id=0)),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", dict(SIZES, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(SIZES, head_dim=16)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(SIZES, **GEMMA)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(SIZES, **GEMMA)),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "phi": ("PhiForCausalLM", "PhiConfig", PHI),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", dict(SIZES, pad_token_id=0)),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", SIZES),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        dict(SIZES, logits_scaling=2.0, embedding_multiplier=3.0),
    ),
}


def moved(model: Any, by: float = 0.02) -> Any:
    """The model with its numbers moved at random: scales and biases off 1 and 0, where a lost factor would not show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn_like(p), alpha=0.1 if p.ndim == 1 else by)
    return model


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """The model with seeded weights, moved."""
    model_class, config_class, sizes = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**sizes, **changes})
    torch.manual_seed(0)
    return moved(getattr(transformers, model_class)(config).eval()).to(dtype)  # type: ignore[no-any-return]


def with_adapter(model: nn.Module, config: Any) -> nn.Module:
    """The model with a PEFT adapter, whose numbers are moved off their first values: half of them start at 0."""
    import peft

    torch.manual_seed(1)
    made = peft.get_peft_model(model, config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return made  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------- prompts
PROMPTS = [[5, 0, 17, 3], [9, 2], [92, 93, 94, 95, 96]]  # the first word, some models' padding, and the last
RESPONSES = [[[7, 8, 1], [7, 9, 9, 20, 1]], [[30, 1], [31, 32, 33, 1], [1]], [[11, 12, 1]]]
N_SEGMENTS = len(PROMPTS)


@dataclasses.dataclass
class Batch:
    """Arguments of `GradientSketcher.policy_gradient` and what its oracle needs besides."""

    input_ids: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    def sketch(self, sketcher: GradientSketcher, **changes: Any) -> PolicyGradient:
        weights = weights_of(self)
        arguments = dataclasses.asdict(self) | {"weigh": lambda logp, a, b: weights[a:b]} | changes
        return sketcher.policy_gradient(**arguments)

    def logprobs(self, model: nn.Module, **given: Any) -> torch.Tensor:
        """Of the scored tokens, from the model's own logits, in float32 or wider."""
        if self.position_ids is not None:
            given["position_ids"] = self.position_ids
        logits = model(self.input_ids, attention_mask=self.attention_mask, **given).logits.flatten(0, 1)
        wide = logits[self.positions].to(torch.promote_types(logits.dtype, torch.float32))
        return wide.log_softmax(-1).gather(1, self.targets[:, None])[:, 0]

    def through(self, sketcher: GradientSketcher, model: nn.Module, **given: Any) -> torch.Tensor:
        """Sketches by `GradientSketcher.batch`: from the model's own forward, to which ``given`` goes."""
        with sketcher.batch(self.segments, shape=tuple(self.input_ids.shape)) as result:  # type: ignore[arg-type]
            (self.logprobs(model, **given) * weights_of(self)).sum().backward()
        return result.sketches


def weights_of(batch: Batch) -> torch.Tensor:
    """A weight per scored token, by its order: all layouts score the same tokens in the same order."""
    return torch.sin(torch.arange(len(batch.targets)) + 1.0)


def _scored(start: int, prompt: list[int], response: list[int], first: int) -> list[tuple[int, int]]:
    """(position, target) of each token of a response at ``first`` whose prompt is at ``start``."""
    return list(zip([start + len(prompt) - 1, *range(first, first + len(response) - 1)], response))


def padded() -> Batch:
    """One row per response, right padded with token 0, and a 2-D mask."""
    rows = [(s, p, r) for s, (p, rs) in enumerate(zip(PROMPTS, RESPONSES)) for r in rs]
    length = max(len(p) + len(r) for _, p, r in rows)
    ids, mask = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(2))
    scored = []
    for i, (_, p, r) in enumerate(rows):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        mask[i, : len(p) + len(r)] = 1
        scored += _scored(i * length, p, r, i * length + len(p))
    positions, targets = torch.tensor(scored).T
    return Batch(ids, torch.tensor([s for s, _, _ in rows]), positions, targets, mask)


def on_the_left(batch: Batch) -> dict[str, torch.Tensor]:
    """What differs of a `padded` batch whose padding stands in front."""
    assert batch.attention_mask is not None
    length = batch.input_ids.shape[1]
    shift = length - batch.attention_mask.sum(1)
    column = (torch.arange(length)[None] - shift[:, None]) % length
    return {
        "input_ids": batch.input_ids.gather(1, column),
        "attention_mask": batch.attention_mask.gather(1, column),
        "positions": batch.positions + shift[batch.positions // length],
    }


def shared() -> Batch:
    """One row per prompt: its responses follow it, attend to it and to themselves, and start at its length."""
    length = max(len(p) + sum(map(len, rs)) for p, rs in zip(PROMPTS, RESPONSES))
    n = N_SEGMENTS
    ids, where = (torch.zeros(n, length, dtype=torch.int64) for _ in range(2))
    mask = torch.eye(length, dtype=torch.bool).repeat(n, 1, 1, 1)  # padding attends to itself: no empty rows
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    scored = []
    for i, (p, rs) in enumerate(zip(PROMPTS, RESPONSES)):
        end = len(p)
        ids[i, :end], where[i, :end] = torch.tensor(p), torch.arange(end)
        mask[i, 0, :end, :end] = causal[:end, :end]
        for r in rs:
            span = slice(end, end + len(r))
            ids[i, span], where[i, span] = torch.tensor(r), torch.arange(len(r)) + len(p)
            mask[i, 0, span, span] = causal[: len(r), : len(r)]
            mask[i, 0, span, : len(p)] = True
            scored += _scored(i * length, p, r, i * length + end)
            end += len(r)
    positions, targets = torch.tensor(scored).T
    return Batch(ids, torch.arange(n), positions, targets, mask, where)


def packed() -> Batch:
    """All responses in one row, each behind its own copy of the prompt; positions restart with each."""
    ids: list[int] = []
    where: list[int] = []
    segments: list[int] = []
    scored = []
    for s, (p, rs) in enumerate(zip(PROMPTS, RESPONSES)):
        for r in rs:
            scored += _scored(len(ids), p, r, len(ids) + len(p))
            where += range(len(p) + len(r))
            segments += [s] * (len(p) + len(r))
            ids += p + r
    positions, targets = torch.tensor(scored).T
    row_ids, row_segments, row_positions = (torch.tensor([x]) for x in (ids, segments, where))
    return Batch(row_ids, row_segments, positions, targets, None, row_positions)


LAYOUTS: dict[str, Callable[[], Batch]] = {"padded": padded, "shared": shared, "packed": packed}


def sketched(
    model: nn.Module, layout: str = "padded", spec: SketchSpec = SPEC, **options: Any
) -> torch.Tensor:
    """The sketches of a batch, by a sketcher of its own with these options."""
    with GradientSketcher(model, spec, **options) as sketcher:
        return LAYOUTS[layout]().sketch(sketcher).sketches


def fail_in_weights(sketcher: GradientSketcher, batch: Batch) -> None:
    """A pass that ends by an error of the caller's, between forward and backward."""
    try:
        batch.sketch(sketcher, weigh=lambda logp, a, b: 1 / 0)
    except ZeroDivisionError:
        return
    raise AssertionError("the error of the weights was lost")


def fail_in_block(sketcher: GradientSketcher, model: nn.Module, batch: Batch) -> None:
    """A block of `GradientSketcher.batch` that ends by an error of the caller's, after the forward pass."""
    rows, length = batch.input_ids.shape
    try:
        with sketcher.batch(batch.segments, shape=(rows, length)):
            model(batch.input_ids, use_cache=False)
            raise KeyError
    except KeyError:
        return
    raise AssertionError("the error of the block was lost")


# ----------------------------------------------------------------------------------------------- oracle
def gradients(model: nn.Module, temperature: float = 1.0, **more: Any) -> list[dict[str, torch.Tensor]]:
    """Ordinary autograd gradient of every segment, in the model's dtype, on padded rows; ``more`` goes to the model."""
    batch = padded()
    segment = batch.segments[batch.positions // batch.input_ids.shape[1]]
    out = []
    for s in range(N_SEGMENTS):
        mine = segment == s
        chosen = dict(
            positions=batch.positions[mine], targets=batch.targets[mine], weights=weights_of(batch)[mine]
        )
        mask = batch.attention_mask
        out.append(
            exact_gradient(
                model, batch.input_ids, attention_mask=mask, temperature=temperature, **chosen, **more
            )
        )
    return out


def sketches(
    model: nn.Module,
    grads: list[dict[str, torch.Tensor]],
    spec: SketchSpec,
    exclude: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Their sketches, coordinate by coordinate, in ``dtype``."""
    cast = [{name: g.to(dtype) for name, g in gradient.items()} for gradient in grads]
    return torch.stack([sketch_gradients(model, gradient, spec, exclude) for gradient in cast])


def assert_close(
    got: torch.Tensor,
    model: nn.Module,
    wide: list[dict[str, torch.Tensor]],
    own: list[dict[str, torch.Tensor]],
    spec: SketchSpec = SPEC,
    exclude: tuple[str, ...] = (),
) -> None:
    """Of every segment |got - exact| <= 2 |near - exact|, all as sketches.

    ``wide`` are float64 gradients; near ones are those of plain torch, ``own``, in the dtype of the model.
    """
    exact, near = sketches(model, wide, spec, exclude), sketches(model, own, spec, exclude, torch.float32)
    assert got.dtype == torch.float32 and got.shape == exact.shape
    error, allowed, size = (got - exact).norm(dim=1), (near - exact).norm(dim=1), exact.norm(dim=1)
    assert (error <= 2 * allowed).all(), (error / size, allowed / size)
    assert (allowed <= 0.1 * size).all(), "a yardstick this long measures nothing"
