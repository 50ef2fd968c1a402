"""Tensor parallel on gloo ranks: the sketches of the whole model, within the rounding of float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launch import found_on_ranks, on_ranks

from cropi_kernels import SketchSpec
from cropi_kernels.ops.linear_logprob import logprob_and_grad
from cropi_kernels.ops.linear_logprob.products import CutInputs, Features, logprob_and_grad_by
from cropi_kernels.ops.linear_logprob.slices import Words, sliced_logprob_and_grad
from cropi_kernels.sketcher.model.spread import Share, ranges_of
from cropi_kernels.sketcher.sums.matrix import matrix_sketch
from cropi_kernels.sketcher.taps.parts import PartMatrix

WORKER = Path(__file__).parents[1] / "support" / "tp_ranks.py"
# Transformers' own plans: head norms that see some heads, a soft-capped tied head, biases, a head without a plan.
CASES = (
    "llama-tied:auto", "qwen2:auto", "qwen3:auto", "gemma2:auto", "phi3:auto",
    "llama:ends_by_features", "llama:sequence_parallel", "qwen3:head_norms",
    "moe-qwen3_moe:auto", "moe-deepseek_v3:auto",
)  # fmt: skip
ON_FOUR = ("llama-tied:auto", "llama:sequence_parallel")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_on_ranks(tmp_path_factory, "tensor-parallel", WORKER, *CASES, "errors")


def check(found: dict[str, Any]) -> None:
    """Held to float64: the ranks may be off by twice what one process is, whose sums have another order."""
    assert 0 < found["error"] <= 2 * found["own error"] < 1e-5, found
    assert 0 < found["batch error"] <= 2 * found["own batch error"] < 1e-5, found
    assert found["repeats"], "the same batch three times, and after an exception: other bits"
    assert max(found["logp"], found["token_logprobs"]) <= 1e-6, found
    assert not found["untested"] and not found["weight gradients"] and not found["frozen"], found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sketches_of_the_whole_model(case: str, two: list[dict[str, Any]]) -> None:
    for found in two:
        check(found[case])
        assert found[case]["spread"] >= 10, "nothing is split"
    assert two[0][case]["sum"] == two[1][case]["sum"], "every rank has the whole sketch"


@pytest.mark.slow
def test_sketches_on_four_ranks() -> None:
    """Rows of 11 tokens and a vocabulary of 97 words: the last rank has less than the others."""
    for found in on_ranks(WORKER, *ON_FOUR, ranks=4):
        for case in ON_FOUR:
            check(found[case])


@pytest.mark.slow
def test_ranks_that_differ_are_refused_on_every_rank(two: list[dict[str, Any]]) -> None:
    for found in two:
        errors = found["errors"]
        assert (
            "different models or specs: rank 0 has SketchSpec(" in errors["spec"]
            and "seed=1" in errors["spec"]
        )
        assert "the model is spread over ranks, which add up one sketch: leave the groups" in errors["groups"]
        assert "the batch differs between the 2 ranks" in errors["batch"] and errors["after"] == "True"
        assert "q_norm.weight: off by" in errors["apart"] and "another gradient of it" in errors["apart"]


# ------------------------------------------------------------------------------------------- on one process
def test_ranges_are_those_of_torch() -> None:
    for size in (1, 5, 8, 97):
        for ranks in (1, 2, 3, 4):
            parts = torch.arange(size).chunk(ranks)
            for rank in range(ranks):
                want = parts[rank].tolist() if rank < len(parts) else []
                got = [i for begin, end in ranges_of(size, ranks, rank) for i in range(begin, end)]
                assert got == want
    assert ranges_of(8, 2, 1, factor=2) == ((2, 4), (6, 8))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "spec",
    [SketchSpec(1024, width=16), SketchSpec(1024, width=None)]
    + [SketchSpec(1024, kind=kind) for kind in ("countsketch", "dropout", "kron", "tensor")],
    ids=str,
)
def test_parts_add_up_to_the_sketch_of_the_whole(spec: SketchSpec, axis: int) -> None:
    """Rows of a matrix, or columns; 32 columns are as many as `kron` keeps, so that no shape tells the two apart."""
    shape, offsets = (48, 32), torch.tensor([0, 7, 12, 20])
    whole = matrix_sketch(spec, "a.b.weight", *shape, "linear")
    d, a = torch.randn(20, shape[0]), torch.randn(20, shape[1])
    want, got = torch.zeros(3, spec.base_dim), torch.zeros(3, spec.base_dim)
    whole.add(d, whole.fold(a), offsets, want)
    for ranges in (((0, 8), (24, 32)), ((8, 24), (32, shape[axis]))):
        part = PartMatrix(whole, Share(shape, axis, ranges), splits_rows=axis == 0)
        part.add(d, part.fold(a), offsets, got)
    assert (got - want).norm() <= 1e-6 * want.norm() > 0


class _Meeting:
    """The sums over ranks that run one after another: what the others give is worked out first, by running them."""

    def __init__(self, others: list[list[torch.Tensor]]) -> None:
        self.others, self.at, self.mine = others, 0, []  # type: ignore[var-annotated]

    def reduce(self, largest: bool, x: torch.Tensor) -> torch.Tensor:
        self.mine.append(x.clone())
        for other in self.others:
            if self.at < len(other):
                x.copy_(torch.maximum(x, other[self.at]) if largest else x + other[self.at])
        self.at += 1
        return x


def by_words(rank: int, vocab: int, meeting: _Meeting) -> tuple[tuple[slice, slice], Callable[..., Any]]:
    mine = (slice(0, 40), slice(40, vocab))[rank]
    words = Words(mine.start, lambda x: meeting.reduce(False, x), lambda x: meeting.reduce(True, x))

    def run(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weigh: Any, **rest: Any) -> Any:
        return sliced_logprob_and_grad(hidden, head, targets, weigh, words, **rest)

    return (mine, slice(None)), run


def by_features(rank: int, vocab: int, meeting: _Meeting) -> tuple[tuple[slice, slice], Callable[..., Any]]:
    mine = (slice(0, 5), slice(5, 8))[rank]
    share = Share((vocab, 8), 1, ((mine.start, mine.stop),))
    features = Features(
        lambda x: share.cut(x, 1), lambda x: share.placed(x, 1), lambda x: meeting.reduce(False, x)
    )

    def run(*given: Any, **rest: Any) -> Any:
        return logprob_and_grad_by(lambda call: CutInputs(call.kernels, features), *given, **rest)

    return (slice(None), mine), run


@pytest.mark.parametrize("cut", [by_words, by_features])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_in_parts_is_the_head(
    temperature: float, softcap: float | None, dtype: torch.dtype, cut: Callable[..., Any]
) -> None:
    """Log-probs, weights, gradients: one rank after another, each told what the others gave, until nothing changes."""
    torch.manual_seed(0)
    n, width, vocab = 37, 8, 61
    hidden, head = torch.randn(n, width, dtype=dtype), torch.randn(vocab, width, dtype=dtype)
    bias, targets = torch.randn(vocab, dtype=dtype), torch.randint(vocab, (n,))
    hidden[0] = 40 * head[int(targets[0])] / head[int(targets[0])].norm()  # a confident token
    settings = dict(temperature=temperature, softcap=softcap)

    def weigh(logp: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return torch.sin(torch.arange(start, stop) + 1.0) * (1 + logp.exp())

    whole: list[torch.Tensor] = []
    want = logprob_and_grad(
        hidden,
        head,
        targets,
        weigh,
        bias=bias,
        on_dlogits=lambda a, b, dz: whole.append(dz.clone()),
        **settings,
    )  # type: ignore[arg-type]
    given: list[list[torch.Tensor]] = [[], []]
    for _ in range(5):
        results = []
        for rank in range(2):
            meeting, dzs = _Meeting([given[1 - rank]]), []  # type: ignore[var-annotated]
            part, run = cut(rank, vocab, meeting)
            found = run(
                hidden, head[part], targets, weigh, bias=bias[part[0]],
                on_gradient=lambda a, b, g, kept=dzs: kept.append(g.dz.clone()), **settings,
            )  # fmt: skip
            given[rank] = meeting.mine
            results.append((found, torch.cat(dzs)))
    eps = torch.finfo(dtype).eps
    for found, _ in results:
        for got, right in zip(found, want, strict=True):
            torch.testing.assert_close(got, right, rtol=64 * eps, atol=64 * eps * float(right.abs().max()))
    parts = (
        [torch.cat([results[0][1], results[1][1]], 1)] if cut is by_words else [part for _, part in results]
    )
    for dz in parts:
        torch.testing.assert_close(dz, torch.cat(whole), rtol=256 * eps, atol=64 * eps)


def test_a_rank_without_words_is_refused() -> None:
    words = Words(4, lambda x: x, lambda x: x)
    with pytest.raises(ValueError, match="a rank has no words of the head"):
        sliced_logprob_and_grad(torch.randn(2, 4), torch.randn(0, 4), torch.tensor([0, 1]), None, words)
