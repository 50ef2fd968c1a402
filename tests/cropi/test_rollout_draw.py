"""Drawing tokens: the law, the log-probs, truncation, and that numbers alone decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cropi.rollouts.draw import BLOCK, uniforms
from cropi.rollouts.draw import draw as draw_rows
from cropi.rollouts.generate import split_rows
from cropi.rollouts.options import Sampling


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """One response a row."""
    return draw_rows(logits, uniform, sampling, torch.arange(len(logits)))


def cumulative(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (logits.double() / temperature).softmax(1).cumsum(1)


@pytest.mark.parametrize("size", [3, BLOCK - 1, BLOCK, 2 * BLOCK + 7])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_token_is_where_the_cumulative_probability_passes_the_number(size: int, temperature: float) -> None:
    logits = 3 * torch.randn(200, size, generator=torch.Generator().manual_seed(size))
    numbers = torch.from_numpy(np.random.default_rng(0).random(200))
    tokens, logprobs = draw(logits, numbers, Sampling(temperature=temperature))
    edges = cumulative(logits, temperature)
    expected = torch.searchsorted(edges, numbers[:, None], right=True)[:, 0]
    # Weights are right to some units in the last place, and so are their sums, relative to the whole: a number that is
    # as near to an edge may fall on either side.
    near = (edges - numbers[:, None]).abs().amin(1) < 16 * torch.finfo(torch.float32).eps
    assert bool((tokens == expected)[~near].all()) and int(near.sum()) < 5
    own = (logits.double() / temperature).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, own, rtol=0, atol=2e-5)


def test_the_ends_of_the_numbers_give_tokens_that_can_be_drawn() -> None:
    """The first and the last token, behind tokens of probability zero too."""
    logits = torch.full((4, 2 * BLOCK), -torch.inf)
    logits[:, 5], logits[:, BLOCK + 3] = 0.0, 1.0
    numbers = torch.tensor([0.0, 0.2, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    tokens, logprobs = draw(logits, numbers, Sampling())
    assert tokens.tolist() == [5, 5, BLOCK + 3, BLOCK + 3]
    share = torch.tensor([0.0, 1.0], dtype=torch.float64).log_softmax(0)
    torch.testing.assert_close(logprobs, share[[0, 0, 1, 1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.5), (4, 0.7), (1, 1.0), (0, 1e-6)])
def test_truncation_draws_what_it_should_and_records_the_whole_distribution(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(1, 700, generator=torch.Generator().manual_seed(1)).expand(4000, -1)
    numbers = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens, logprobs = draw(logits, numbers, Sampling(top_k=top_k, top_p=top_p))
    p = logits[0].double().softmax(0)
    order = p.argsort(descending=True)
    kept = order[: top_k or 700]
    mass = p[kept] / p[kept].sum()
    kept = kept[(mass.cumsum(0) - mass) < top_p]
    assert set(tokens.tolist()) <= set(kept.tolist())
    expected = torch.zeros(700, dtype=torch.float64).index_put((kept,), p[kept] / p[kept].sum())
    # Equidistant numbers: every share is met within the two ends of its interval.
    counts = torch.bincount(tokens, minlength=700) / 4000
    assert float((counts - expected).abs().max()) <= 2 / 4000
    torch.testing.assert_close(logprobs, p.log()[tokens], rtol=0, atol=2e-5)


def test_a_row_that_is_no_number_says_so_and_leaves_the_others() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 7] = torch.nan
    _, logprobs = draw(logits, torch.full((3,), 0.3, dtype=torch.float64), Sampling())
    assert logprobs.isnan().tolist() == [False, True, False]


def test_numbers_depend_on_seed_prompt_and_response_alone() -> None:
    first = uniforms(0, "a", 0, 8)
    assert np.array_equal(first, uniforms(0, "a", 0, 20)[:8])  # a longer limit changes nothing before
    for other in (uniforms(1, "a", 0, 8), uniforms(0, "b", 0, 8), uniforms(0, "a", 1, 8)):
        assert not np.array_equal(first, other)


def test_several_responses_are_drawn_from_one_row() -> None:
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(3))
    rows, numbers = torch.tensor([2, 0, 2, 2]), torch.tensor([0.1, 0.9, 0.4, 0.1], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_k=9, top_p=0.6)):
        tokens, logprobs = draw_rows(logits, numbers, sampling, rows)
        for i, row in enumerate(rows.tolist()):
            alone = draw(logits[row : row + 1], numbers[i : i + 1], sampling)
            assert (int(tokens[i]), float(logprobs[i])) == (int(alone[0]), float(alone[1]))


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_split_where_tokens_differ_and_nowhere_else(seed: int) -> None:
    """Against the tokens themselves, through some steps with random draws and ends."""
    rng = np.random.default_rng(seed)
    said: list[tuple[int, ...]] = [(prompt,) for prompt in range(5) for _ in range(4)]
    rows, content = np.arange(5).repeat(4), [(prompt,) for prompt in range(5)]
    while said:
        assert [content[row] for row in rows] == said
        tokens = rng.integers(0, 3, len(said))
        keep = rng.random(len(said)) > 0.25
        said = [(*before, int(token)) for before, token, go in zip(said, tokens, keep) if go]
        if not said:
            break
        source, rows = split_rows(rows[keep], tokens[keep])
        following = dict(zip(rows.tolist(), tokens[keep].tolist()))
        content = [(*content[row], following[i]) for i, row in enumerate(source)]
        assert len(content) == len(set(said))  # each once, and nothing that nobody needs
