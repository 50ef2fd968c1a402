"""A tower that has taps and sees, by accident, as many images as the batch has rows, and as many patches as tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import architectures

from cropi_kernels import GradientSketcher, LiveSketcher
from cropi_kernels.sketcher import SelfTestError
from cropi_kernels.testing import sketch_gradients

ROWS, LENGTH, IMAGE = 3, 16, 5  # a tower of 16 patches; an image is 4 tokens
SEGMENTS = torch.arange(ROWS)


def tower(owners: tuple[int, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of which a part of the tower is trained, and a batch whose k-th image is in row ``owners[k]``."""
    model: Any = architectures.small("gemma3")
    model.config.image_token_id = IMAGE
    for name, p in model.named_parameters():
        p.requires_grad_("vision_tower" in name and "q_proj" in name)
    torch.manual_seed(0)
    ids = torch.randint(10, 90, (ROWS, LENGTH))
    for row in range(ROWS):
        ids[row, 1 : 1 + 4 * owners.count(row)] = IMAGE
    return model, dict(
        input_ids=ids, pixel_values=torch.randn(len(owners), 3, 16, 16), token_type_ids=(ids == IMAGE).long()
    )


def log_probs(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of each row's last six tokens, which are text."""
    logits = torch.log_softmax(model(**given).logits[:, -7:-1].double(), -1)
    return logits.gather(2, given["input_ids"][:, -6:, None]).sum((1, 2))


def sketched(way: str, model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    if way == "policy_gradient":
        rest = dict(given)
        ids = rest.pop("input_ids")
        labels = torch.where(torch.arange(LENGTH) >= LENGTH - 6, ids, -100)
        with GradientSketcher(model, architectures.SPEC) as sketcher:
            return sketcher.policy_gradient(
                ids, segments=SEGMENTS, labels=labels, weights=torch.ones(ROWS), model_kwargs=rest
            ).sketches
    kind, sign = (LiveSketcher, -1) if way == "live" else (GradientSketcher, 1)
    with kind(model, architectures.SPEC) as sketcher, sketcher.batch(SEGMENTS, shape=(ROWS, LENGTH)) as got:
        (sign * log_probs(model, given).sum()).backward()
    return got.sketches  # type: ignore[no-any-return]


@pytest.mark.long
@pytest.mark.parametrize("way", ["policy_gradient", "batch", "live"])
def test_an_image_in_every_row_is_right_and_two_in_one_are_named(way: str) -> None:
    model, given = tower((0, 1, 2))
    got = sketched(way, model, given)
    for row, sketch in enumerate(got):
        model.zero_grad()
        log_probs(model, given)[row].backward()
        gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        want = sketch_gradients(model, gradients, architectures.SPEC)
        # float32 passes of three layers: a few hundred roundings of 2^-24.
        assert 0 < (sketch - want).norm() <= 1e-4 * want.norm()
    for owners in ((0, 0, 2), (0, 2, 2)):
        with pytest.raises(
            SelfTestError, match=r"vision_tower.*q_proj\.weight.*of one segment count for another"
        ):
            sketched(way, *tower(owners))
