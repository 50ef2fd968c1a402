"""What prompts begin with in common: which are of one family, in which pieces a batch goes, and what that saves."""

from __future__ import annotations

import random

import pytest
import torch
from support.made_data import make_model, make_tokenizer

from cropi.gradient.tokenize import Tokenize
from cropi.model.policy import Policy
from cropi.rollouts.beginnings import common_length, families, levels
from cropi.rollouts.engine import Request
from cropi.rollouts.generate import Decoding
from cropi.rollouts.hf import HfEngine, most_rows, ordered
from cropi.rollouts.options import Sampling


def test_common_beginnings() -> None:
    assert common_length([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common_length([[1, 2], [1, 2, 3]]) == 1  # every prompt keeps one token of its own
    assert common_length([[4], [5]]) == 0


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_a_batch_are_its_prompts(seed: int) -> None:
    """Whatever is shared: each prompt is the pieces on its way, and no level costs tokens."""
    rng = random.Random(seed)
    heads = [[rng.randrange(3) for _ in range(rng.randrange(30))] for _ in range(3)]
    prompts = [
        [9] * (seed % 2 * 12) + rng.choice(heads) + [rng.randrange(3) for _ in range(rng.randrange(1, 20))]
        for _ in range(12)
    ]
    found = families(prompts)
    assert sorted(i for group in found for i in group) == list(range(12))
    for group in found:
        same = common_length([prompts[i] for i in group] * 2)
        assert len(group) == 1 or same + 1 >= max(len(prompts[i]) for i in group) / 2
    made = levels(prompts)
    rows: list[list[int]] = [[]]
    for level in made:
        rows = [rows[parent] + piece for parent, piece in zip(level.parents, level.pieces, strict=True)]
    assert rows == prompts and all(made[-1].pieces)
    width = max(map(len, prompts))
    assert sum(len(level.pieces) * max(map(len, level.pieces)) for level in made) <= 12 * width


def test_families_are_processed_once_and_exactly() -> None:
    """Two sets of solved examples in one batch: fewer tokens, and the logits that every prompt has alone."""
    model, rng = make_model(), random.Random(0)

    def drawn(count: int) -> list[int]:
        return [rng.randrange(3, 40) for _ in range(count)]

    heads = [drawn(20), drawn(14)]
    prompts = [heads[i % 2] + drawn(1 + i % 4) for i in range(8)] + [drawn(9)]
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    with torch.inference_mode():
        batch = Decoding(model, prompts, shared=True)
        hook.remove()
        assert batch.gaps and sum(seen) < 0.5 * len(prompts) * max(map(len, prompts))
        got, following = [batch.logits], torch.tensor(drawn(len(prompts)))
        batch.step(following)
        got.append(batch.logits)
        alone = [model(torch.tensor([[*p, int(t)]])).logits[0, -2:] for p, t in zip(prompts, following)]
    # Sums of two layers in another order, of logits of size 10.
    atol = 300 * 10 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.stack(got, 1), torch.stack(alone), rtol=0, atol=atol)


def test_families_share_a_batch() -> None:
    """Longest prompts first, and behind each the others of its family; without sharing by length alone."""
    heads = {"a": list(range(20)), "b": list(range(50, 64))}
    names = ["a1", "b3", "x", "a4", "b1"]
    given = [
        Request("x", [9] * 22) if n == "x" else Request(n, heads[n[0]] + [99] * int(n[1])) for n in names
    ]
    assert [request.name for request in ordered(given, shared=True)] == ["a4", "a1", "x", "b3", "b1"]
    assert [request.name for request in ordered(given, shared=False)] == ["a4", "x", "a1", "b3", "b1"]


def test_rows_fit_into_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    config, sampling = model.config, Sampling(max_tokens=20)
    tokens = Tokenize(tokenizer, config.vocab_size, 128)
    cached = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes a token
    row = 1.5 * cached * (30 + 20) + 4 * 4 * config.vocab_size
    for rows in (3, 700, 5000):
        monkeypatch.setattr(
            "cropi.rollouts.hf.free_memory", lambda device, rows=rows: int(2 * row * (rows + 0.5))
        )
        engine = HfEngine(Policy(model, tokenizer), tokens, sampling)
        engine.prepare([Request("a", list(range(3, 33)))], {"linears": "torch"})
        assert engine.rows == min(rows, 1024)


def test_more_rows_where_responses_are_short() -> None:
    """And as many as ever where they are long: a kill costs a batch."""
    assert [most_rows(tokens) for tokens in (24, 512, 1024, 8192)] == [1024, 512, 256, 256]
