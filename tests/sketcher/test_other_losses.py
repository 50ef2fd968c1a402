"""Sketches of other losses than a policy's: pairs, rewards, classes of texts and images, an encoder-decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.zoo import SPEC, assert_close

from cropi_kernels import GradientSketcher, LiveSketcher, canonical_name
from cropi_kernels.sketcher.checks.selftest import SelfTestError

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(1, 32, (4, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Loss = Callable[[Any, slice], torch.Tensor]


def logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0].sum(1)


def preferred(model: Any, rows: slice) -> torch.Tensor:
    """DPO's loss of each pair of rows."""
    ids = IDS[rows]
    sums = logprobs(model(ids).logits[:, :-1], ids[:, 1:])
    return -torch.nn.functional.logsigmoid(0.1 * (sums[0::2] - sums[1::2] - 0.5))


def better(model: Any, rows: slice) -> torch.Tensor:
    """A reward model's loss of each pair of rows."""
    reward = model(IDS[rows]).logits[:, 0]
    return -torch.nn.functional.logsigmoid(reward[0::2] - reward[1::2])


def classes(model: Any, rows: slice) -> torch.Tensor:
    right = torch.tensor([0, 1, 2, 0])[rows]
    return torch.nn.functional.cross_entropy(model(IDS[rows]).logits, right, reduction="none")


def translated(model: Any, rows: slice) -> torch.Tensor:
    return -logprobs(model(input_ids=IDS[rows], labels=IDS[rows]).logits, IDS[rows])


def llama(kind: str, **more: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **more)
    return getattr(transformers, kind)(config)


def bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16,
        )
    )  # fmt: skip


# The model, its loss by rows, rows of a segment, and what sees no token of a batch once.
CASES: dict[str, tuple[Callable[[], Any], Loss, int, tuple[str, ...]]] = {
    "dpo": (lambda: llama("LlamaForCausalLM"), preferred, 2, ()),
    "reward model": (lambda: llama("LlamaForSequenceClassification", num_labels=1), better, 2, ()),
    "classifier": (lambda: llama("LlamaForSequenceClassification", num_labels=3), classes, 1, ()),
    "encoder's classifier": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)),
        classes, 1, ("classifier.*", "bert.pooler.*"),
    ),
    "encoder-decoder": (bart, translated, 1, ()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_sketch_is_that_of_each_segments_gradient(case: str) -> None:
    make, loss, size, exclude = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    number = len(IDS) // size
    segments = torch.arange(number).repeat_interleave(size)
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        with sketcher.batch(segments, shape=tuple(IDS.shape)) as out:
            loss(model, slice(None)).sum().backward()
    assert bool(sketcher.coverage.excluded) == bool(exclude)

    assert_close(out.sketches, model, *by_rows(model, loss, number, size), exclude=exclude)


def by_rows(model: Any, loss: Loss, number: int, size: int = 1) -> tuple[Any, Any]:
    """The gradients of every segment by autograd, in float64 and in float32."""

    def by_autograd(model: Any) -> list[dict[str, torch.Tensor]]:
        found = []
        for s in range(number):
            model.zero_grad()
            loss(model, slice(s * size, (s + 1) * size)).sum().backward()
            found.append(
                {
                    canonical_name(name): torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for name, p in model.named_parameters()
                }
            )
        return found

    return by_autograd(copy.deepcopy(model).double()), by_autograd(model)


def pictured(model: Any, rows: slice) -> torch.Tensor:
    images = IMAGES[rows].to(next(model.parameters()).dtype)
    out = model(images)
    right = torch.tensor([0, 1, 2, 0])[rows]
    return torch.nn.functional.cross_entropy(getattr(out, "logits", out), right, reduction="none")


def convolutions(norm: Callable[[int], torch.nn.Module]) -> torch.nn.Module:
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2, bias=False),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=32,
        patch_size=16,
    )
    config.num_labels = 3
    return transformers.ViTForImageClassification(config)


def convnext() -> Any:
    """Its linear layers see [batch, height, width, channels]; it names no embedding of tokens."""
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_labels": 3}
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes))


# Models of which a row is no row of tokens, or of which a part sees rows alone: nothing is left out.
EXAMPLES: dict[str, tuple[Callable[[], Any], Loss]] = {
    "convolutions": (lambda: convolutions(lambda n: torch.nn.GroupNorm(2, n)), pictured),
    "batch norm that is not trained": (lambda: convolutions(torch.nn.BatchNorm2d), pictured),
    "vision transformer": (vit, pictured),
    "convnext": (convnext, pictured),
    "encoder's classifier": (CASES["encoder's classifier"][0], classes),
}


@pytest.mark.long
@pytest.mark.parametrize("case", EXAMPLES)
@pytest.mark.parametrize("kind", [GradientSketcher, LiveSketcher])
def test_rows_that_are_no_tokens(kind: Any, case: str) -> None:
    make, loss = EXAMPLES[case]
    torch.manual_seed(0)
    model = make().eval()
    with kind(model, SPEC) as sketcher, sketcher.batch(torch.arange(4), shape=(4,)) as out:
        loss(model, slice(None)).sum().backward()
    model.requires_grad_(True)
    exact, plain = by_rows(model, loss, 4)
    sign = -1 if kind is LiveSketcher else 1  # which gives the way down the loss
    assert_close(sign * out.sketches, model, exact, plain)


def test_a_batch_norm_that_mixes_examples_is_refused() -> None:
    torch.manual_seed(0)
    model = convolutions(torch.nn.BatchNorm2d).train()
    with GradientSketcher(model, SPEC) as sketcher, pytest.raises(SelfTestError, match="count for another"):
        with sketcher.batch(torch.arange(4), shape=(4,)):
            pictured(model, slice(None)).sum().backward()


@pytest.mark.parametrize("shape", [4, (4.0, 7), (4, 7, 1)])
def test_a_shape_is_of_rows_or_of_rows_and_tokens(shape: Any) -> None:
    model = CASES["classifier"][0]()
    for kind in (GradientSketcher, LiveSketcher):
        with (
            kind(model, SPEC) as sketcher,
            pytest.raises(ValueError, match=r"give \(batch, length\), or \(batch,\)"),
        ):
            with sketcher.batch(torch.arange(4), shape=shape):
                pass
