"""Models that scale the positions of a batch by its longest row: every response gets the gradient that it has alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.stores import sketches_of

import cropi
from cropi.errors import CropiError
from cropi.gradient.estimators import ESTIMATORS
from cropi_kernels import GradientSketcher, SketchSpec, token_logprobs
from cropi_kernels.sketcher.policy import lengths
from cropi_kernels.sketcher.policy.lengths import measure_lengths
from cropi_kernels.testing import sketch_gradients

SPEC = SketchSpec(1024, width=16, vocab_width=64)
SWITCH = 24
PROMPTS = {"a": (5, [3, 40, 12, 40]), "b": (22, [2, 4, 30, 9]), "c": (6, [4, 5])}


def model(kind: str, seed: int = 0) -> Any:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": SWITCH,
        }  # fmt: skip
    longest = SWITCH if kind == "dynamic" else 4 * SWITCH
    sizes = {**zoo.SIZES, "max_position_embeddings": longest, "pad_token_id": 0}
    torch.manual_seed(seed)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope)).eval()
    for name, p in made.named_parameters():
        if "q_proj" in name or "k_proj" in name:  # attention that depends on positions
            p.data.mul_(20)
    return made


def records() -> list[dict[str, Any]]:
    made = []
    for number, (name, (prompt, sizes)) in enumerate(PROMPTS.items()):
        ids = [[(7 * t + 11 * k + 5 * number) % 90 + 3 for t in range(n)] for k, n in enumerate(sizes)]
        made.append(
            {
                "id": name,
                "prompt_ids": [(13 * t + number) % 90 + 3 for t in range(prompt)],
                "response_ids": ids,
                "rewards": [float(k % 2) + 0.1 * k for k in range(len(sizes))],
            }
        )
    return made


def alone(made: Any, record: dict[str, Any], k: int) -> torch.Tensor:
    """log pi of a response, in a row of its own, by a model that has seen no other."""
    prompt, response = record["prompt_ids"], record["response_ids"][k]
    logits = copy.deepcopy(made)(input_ids=torch.tensor([prompt + response[:-1]])).logits[
        0, len(prompt) - 1 :
    ]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]  # type: ignore[no-any-return]


def exact(made: Any, record: dict[str, Any], beta: Any = None, whole: bool = False) -> torch.Tensor:
    """The sketch of the gradient from its definition. The last token is an input too in ``whole`` rows, as trainers
    hold them."""
    wide, total = made.double(), torch.zeros(SPEC.dim, dtype=torch.float64)
    advantages = ESTIMATORS["cropi"].advantages(record["rewards"])
    for k, response in enumerate(record["response_ids"]):
        one = copy.deepcopy(wide)
        prompt = record["prompt_ids"]
        logits = one(input_ids=torch.tensor([prompt + response[: None if whole else -1]])).logits[
            0, len(prompt) - 1 : len(prompt) + len(response) - 1
        ]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        ratio = 1.0 if beta is None else (logp.detach() - alone(beta.double(), record, k).detach()).exp()
        (ratio * logp * advantages[k]).mean().div(len(record["response_ids"])).backward()
        total += sketch_gradients(one, {n: p.grad for n, p in one.named_parameters()}, SPEC)
    made.float()
    if beta is not None:
        beta.float()
    return total


def assert_right(store: Any, made: Any, beta: Any = None) -> None:
    got = sketches_of(store)
    for record in records():
        want = exact(made, record, beta)
        assert float((got[record["id"]] - want).norm() / want.norm()) <= 2e-5, record["id"]


@pytest.mark.long
@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_batches_are_cut_where_the_positions_change(kind: str, layout: str) -> None:
    made = model(kind)
    assert (measure_lengths(made).switch, measure_lengths(made).by_length) == (SWITCH, kind == "dynamic")
    store = cropi.sketch(made, records(), dim=1024, width=16, vocab_width=64, layout=layout, progress=False)
    assert_right(store, made)


@pytest.mark.parametrize("kind, wide", [("longrope", True), ("dynamic", True), ("default", False)])
@pytest.mark.parametrize("where", ["own", "inside", "layers"])
def test_on_a_gpu_a_scaling_is_found_wherever_it_is_named(
    kind: str, wide: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a configuration inside another, and of one kind of layers, it was not found: no batch was cut."""
    made, rope = torch.nn.Linear(1, 1), {"rope_type": kind, "factor": 4.0}
    config = SimpleNamespace(rope_parameters={"full_attention": rope} if where == "layers" else rope)
    made.config = SimpleNamespace(text_config=config) if where == "inside" else config  # type: ignore[assignment]
    monkeypatch.setattr(lengths, "device_of", lambda model: torch.device("cuda"))
    assert lengths._may_go_beyond(made) == wide


def test_shared_by_name_is_an_error_where_responses_lie_on_either_side() -> None:
    with pytest.raises(CropiError, match="prompt 'a' has responses of 8 to 45 tokens.*beyond 24 tokens"):
        cropi.sketch(model("longrope"), records(), layout="shared", progress=False)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_behaviour_model_reads_rows_of_its_own_lengths(kind: str) -> None:
    torch.manual_seed(1)
    made: Any = zoo.make("llama")
    beta = model(kind, seed=0)
    store = cropi.sketch(
        made,
        records(),
        dim=1024,
        width=16,
        vocab_width=64,
        behaviour_model=beta,
        progress=False,
    )
    assert_right(store, made, beta)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_trainers_batch_is_cut_too(kind: str) -> None:
    made, given = model(kind), records()
    rows = [(r, k) for r in given for k in range(len(r["response_ids"]))]
    width = max(len(r["prompt_ids"] + r["response_ids"][k]) for r, k in rows)
    ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for i, (r, k) in enumerate(rows):
        both = r["prompt_ids"] + r["response_ids"][k]
        ids[i, : len(both)], mask[i, : len(both)] = torch.tensor(both), 1
        scored[i, len(r["prompt_ids"]) : len(both)] = 1
    batch = cropi.score_batch(
        made, ids, mask, response_mask=scored, prompt_ids=[r["id"] for r, _ in rows], spec=SPEC,
        rewards=torch.tensor([r["rewards"][k] for r, k in rows]),
    )  # fmt: skip
    for name, got, record in zip(batch.ids, batch.sketches, given, strict=True):
        want = exact(made, record, whole=True)
        assert name == record["id"] and float((got - want).norm() / want.norm()) <= 2e-5


def test_a_pass_does_not_depend_on_the_passes_before() -> None:
    """Dynamic NTK of transformers keeps the frequencies of the longest batch so far: for rows beyond the context,
    before transformers 5.13 for those within it."""
    made, longer, changed = model("dynamic"), torch.arange(3, 73)[None], []
    for length in (20, 40):
        ids = torch.arange(3, 3 + length)[None]
        one = dict(positions=torch.arange(length - 10, length - 1), targets=ids[0, length - 9 :])
        want = token_logprobs(copy.deepcopy(made), ids, **one)
        made(input_ids=longer)
        logits = made(input_ids=ids).logits[0, length - 10 : length - 1]
        kept = logits.log_softmax(-1).gather(1, one["targets"][:, None])[:, 0]
        changed.append(float((kept - want).detach().abs().max()) > 1e-3)
        with GradientSketcher(made, SPEC) as sketcher:
            made(input_ids=longer)
            for got in (
                token_logprobs(made, ids, **one),
                sketcher.policy_gradient(
                    ids, segments=torch.tensor([0]), weigh=lambda logp, a, b: torch.ones(b - a), **one
                ).logprobs,
            ):
                assert torch.allclose(got, want, rtol=0, atol=1e-5)
                made(input_ids=longer)
    assert any(changed)
