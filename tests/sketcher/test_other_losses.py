"""`GradientSketcher.batch` around other losses than a policy's: pairs, rewards, classes, an encoder-decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support.zoo import SPEC, assert_close

from cropi_kernels import GradientSketcher, canonical_name

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(1, 32, (4, 7), generator=torch.Generator().manual_seed(0))
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

    exact = by_autograd(copy.deepcopy(model).double())
    assert_close(out.sketches, model, exact, by_autograd(model), exclude=exclude)
