"""Sketches of a trainer's own batch: against plain autograd and against the same responses as records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model
from support.oracle import response_logprobs
from support.stores import sketches_of

import cropi
from cropi.errors import CropiError
from cropi.gradient.estimators import make_estimator
from cropi_kernels import SketchSpec
from cropi_kernels.testing import sketch_gradients

SPEC = SketchSpec(1024)
PROMPTS = {"a": [5, 6, 7], "b": [9, 10], "c": [11, 12, 13, 14]}
RESPONSES = {
    "a": [[20, 21, 1], [22, 1]],
    "b": [[30, 31, 32, 1], [33, 34, 1], [35, 1]],
    "c": [[40, 1], [41, 42, 1]],
}
REWARDS = {"a": [1.0, 0.0], "b": [1.0, 0.0, 0.0], "c": [0.0, 1.0]}
ORDER = [("b", 0), ("a", 1), ("c", 0), ("b", 2), ("a", 0), ("c", 1), ("b", 1)]  # of the rows: not by prompt


def made() -> dict[str, torch.Tensor | list[str]]:
    """As TRL pads: prompts on the left, completions on the right."""
    wide = max(map(len, PROMPTS.values()))
    long = max(len(r) for rs in RESPONSES.values() for r in rs)
    ids, mask = (torch.zeros(len(ORDER), wide + long, dtype=torch.int64) for _ in range(2))
    scored = torch.zeros(len(ORDER), wide + long)
    for i, (name, k) in enumerate(ORDER):
        prompt, response = PROMPTS[name], RESPONSES[name][k]
        span = slice(wide - len(prompt), wide + len(response))
        ids[i, span], mask[i, span] = torch.tensor(prompt + response), 1
        scored[i, wide : wide + len(response)] = 1
    return {
        "input_ids": ids, "attention_mask": mask, "response_mask": scored, "prompt_ids": [name for name, _ in ORDER],
    }  # fmt: skip


REWARD_ROWS = torch.tensor([REWARDS[name][k] for name, k in ORDER])
WIDE = max(map(len, PROMPTS.values()))


def oracle(weight: Any) -> dict[str, torch.Tensor]:
    """The sketch of sum_{k,t} w log pi by plain autograd in float64, one response at a time, without any padding."""
    model = make_model().double()
    found = {}
    for name, responses in RESPONSES.items():
        model.zero_grad()
        for k, response in enumerate(responses):
            values = response_logprobs(model, PROMPTS[name], response)
            (weight(name, k, values.detach()) * values).sum().backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[name] = sketch_gradients(model, grads, SPEC)
    return found


def check(batch: cropi.SketchedBatch, want: dict[str, torch.Tensor]) -> None:
    assert batch.ids == ["b", "a", "c"]
    for name, sketch in zip(batch.ids, batch.sketches.double()):
        assert float(want[name].norm()) > 0
        # float32 through two layers: some hundred roundings of 6e-8 each, in a sum of few terms
        assert float((sketch - want[name]).norm()) <= 2e-5 * float(want[name].norm()), name


@pytest.mark.long
def test_weights_of_tokens_and_rows_are_those_of_the_gradient() -> None:
    data = made()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(data["input_ids"].shape, generator=generator)  # type: ignore[union-attr]
    rows = torch.randn(len(ORDER), generator=generator)
    place = {key: i for i, key in enumerate(ORDER)}
    by_token = cropi.score_batch(make_model(), **data, weights=tokens, spec=SPEC)
    check(
        by_token, oracle(lambda name, k, values: tokens[place[name, k], WIDE : WIDE + len(values)].double())
    )
    by_row = cropi.score_batch(make_model(), **data, weights=rows, spec=SPEC)
    check(by_row, oracle(lambda name, k, values: rows[place[name, k]].double()))
    tail = {"response_mask": data["response_mask"][:, WIDE:], "weights": tokens[:, WIDE:]}  # type: ignore[index]
    again = cropi.score_batch(make_model(), **(data | tail), spec=SPEC)
    assert torch.equal(again.sketches, by_token.sketches)
    for i, (name, k) in enumerate(ORDER):
        values = response_logprobs(make_model(), PROMPTS[name], RESPONSES[name][k]).detach()
        torch.testing.assert_close(
            by_token.logprobs[i, WIDE : WIDE + len(values)], values, rtol=1e-5, atol=1e-5
        )
        assert by_token.logprobs[i].count_nonzero() == len(values)
        assert torch.equal(
            by_token.weights[i, WIDE : WIDE + len(values)], tokens[i, WIDE : WIDE + len(values)]
        )


@pytest.mark.long
@pytest.mark.parametrize("name", ["cropi", "ppo", "reinforce", "dr_grpo", "dapo"])
def test_an_estimator_gives_the_sketches_of_the_same_records(name: str) -> None:
    model, data = make_model(), made()
    old = torch.zeros(data["input_ids"].shape)  # type: ignore[union-attr]
    beta = make_model(seed=5)
    records = []
    for prompt, responses in RESPONSES.items():
        values = [response_logprobs(beta, PROMPTS[prompt], r).detach() for r in responses]
        for k, given in enumerate(values):
            old[ORDER.index((prompt, k)), WIDE : WIDE + len(given)] = given
        records.append({
            "id": prompt, "prompt_ids": PROMPTS[prompt], "response_ids": responses, "rewards": REWARDS[prompt],
            "logprobs": [given.tolist() for given in values],
        })  # fmt: skip
    store = cropi.sketch(model, records, estimator=name, dim=1024, progress=False)
    want = sketches_of(store)
    got = cropi.score_batch(model, **data, rewards=REWARD_ROWS, old_logprobs=old, estimator=name, spec=SPEC)
    assert got.ids == ["b", "a", "c"] and len(got) == 3
    for prompt, sketch in zip(got.ids, got.sketches):
        if prompt in want:
            assert float((sketch - want[prompt]).norm()) <= 2e-5 * float(want[prompt].norm()), prompt
        else:  # every token is clipped
            assert float(sketch.norm()) == 0 and name in ("ppo", "dr_grpo", "dapo")
    assert want
    kind = make_estimator(name)
    advantages = torch.zeros(len(ORDER), dtype=torch.float64)
    for i, (prompt, k) in enumerate(ORDER):
        advantages[i] = kind.advantages(REWARDS[prompt])[k]
    same = cropi.score_batch(
        model, **data, advantages=advantages, old_logprobs=old, estimator=kind, spec=SPEC
    )
    assert torch.equal(same.sketches, got.sketches)


@pytest.mark.long
def test_how_rows_are_cut_and_padded_changes_nothing_but_rounding() -> None:
    model, data = make_model(), made()
    whole = cropi.score_batch(model, **data, rewards=REWARD_ROWS, spec=SPEC)
    parts = cropi.score_batch(model, **data, rewards=REWARD_ROWS, spec=SPEC, tokens_per_batch=np.int64(20))
    ids, mask = data["input_ids"], data["attention_mask"]
    right = {key: torch.zeros_like(value) for key, value in data.items() if key != "prompt_ids"}
    for i in range(len(ORDER)):
        kept = mask[i].bool()  # type: ignore[index]
        for key, value in right.items():
            value[i, : int(kept.sum())] = data[key][i, kept]  # type: ignore[index]
    moved = cropi.score_batch(model, **(data | right), rewards=REWARD_ROWS, spec=SPEC)
    labels = torch.where(data["response_mask"] != 0, ids, -100)  # type: ignore[arg-type]
    # No model reads the first label.
    labels[:, 0] = 7
    labelled = cropi.score_batch(
        model, ids, mask, labels=labels, prompt_ids=data["prompt_ids"], rewards=REWARD_ROWS, spec=SPEC
    )
    assert torch.equal(labelled.sketches, whole.sketches)
    for other in (parts, moved):
        for one, two in zip(whole.sketches, other.sketches):
            assert float((one - two).norm()) <= 2e-5 * float(one.norm())


BART = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_layers": 1}


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, changes, columns",
    [
        ("mistral", {"sliding_window": 4}, [[0, 1, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6]]),
        ("llama", {}, [[0, 1, 2, 5, 6, 7], [1, 2, 3, 4, 5, 6]]),  # a prompt that is padded on the right
        ("bart", BART, [[2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6]]),
    ],
)
def test_padding_before_tokens_is_as_none(kind: str, changes: dict[str, Any], columns: Any) -> None:
    """A window of attention counts columns, those of padding too, and so do BART's positions, whichever are given."""
    model, columns = make_model(kind, **changes), torch.tensor(columns)
    plain = torch.tensor([[5, 6, 7, 8, 9, 10], [15, 16, 17, 18, 19, 20]])
    ids, mask, scored = (torch.zeros(2, 8, dtype=torch.int64) for _ in range(3))
    ids.scatter_(1, columns, plain), mask.scatter_(1, columns, 1), scored.scatter_(1, columns[:, 3:], 1)
    given = {"weights": torch.tensor([1.0, -0.5]), "prompt_ids": ["a", "a"], "spec": SPEC}
    whole = cropi.score_batch(model, plain, response_mask=(torch.arange(6) > 2).repeat(2, 1), **given)
    apart = cropi.score_batch(model, ids, mask, response_mask=scored, **given)
    torch.testing.assert_close(apart.logprobs.gather(1, columns), whole.logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(apart.weights.gather(1, columns), whole.weights)
    assert float((apart.sketches - whole.sketches).norm()) <= 2e-5 * float(whole.sketches.norm())
    if kind == "llama":
        with pytest.raises(
            CropiError, match="column 5 is scored, but padding stands before it, .* leave position_ids"
        ):
            cropi.score_batch(
                model, ids, mask, response_mask=scored, position_ids=mask.cumsum(1) - 1, **given
            )


def test_the_model_is_left_as_it_was_and_equal_rewards_have_no_gradient() -> None:
    model, data = make_model(), made()
    model.lm_head.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    rewards = torch.where(torch.tensor([name == "a" for name, _ in ORDER]), 0.1 + 0.6, REWARD_ROWS)
    got = cropi.score_batch(model, **data, rewards=rewards, spec=SPEC)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(got.sketches[1].norm()) == 0 and float(got.sketches[0].norm()) > 0
    assert cropi.score_batch(model, **(data | {"prompt_ids": None}), weights=rewards, spec=SPEC).ids == list(
        range(7)
    )


DATA = made()
IDS, MASK, SCORED = (DATA[key] for key in ("input_ids", "attention_mask", "response_mask"))
ADVANTAGES = torch.linspace(-1, 1, len(ORDER))
assert isinstance(IDS, torch.Tensor) and isinstance(MASK, torch.Tensor) and isinstance(SCORED, torch.Tensor)
PADDING, EVERYTHING, NOTHING = MASK.clone(), torch.ones_like(SCORED), SCORED.clone()
PADDING[2], NOTHING[3] = 0, 0
SHIFTED = torch.where(SCORED != 0, IDS, -100).roll(-1, 1)
MISUSE: dict[str, tuple[dict[str, Any], str]] = {
    "a list of ids": ({"input_ids": IDS.tolist()}, "input_ids is of type list: give a tensor"),
    "one row": ({"input_ids": IDS[0]}, r"input_ids is torch.int64 \[\d+\]: give int64 \[batch, length\]"),
    "no rows": ({"input_ids": IDS[:0]}, r"input_ids is torch.int64 \[0, \d+\]"),
    "floats": ({"input_ids": IDS.float()}, "input_ids is torch.float32"),
    "another device": ({"input_ids": IDS.to("meta")}, "input_ids is on meta and the model on cpu: move the batch"),
    "advantages elsewhere": ({"advantages": ADVANTAGES.to("meta")}, "advantages is on meta and the model on cpu"),
    "mask of another shape": ({"attention_mask": MASK[:, 1:]}, r"attention_mask has shape \[7, 7\]: give \[7, 8\]"),
    "a row of padding": ({"attention_mask": PADDING}, "attention_mask: row 2 is all padding"),
    "what is scored": ({"response_mask": None}, "give response_mask or labels"),
    "said twice": ({"labels": IDS}, "give response_mask or labels"),
    "a row without a scored token": ({"response_mask": NOTHING}, "row 3 has no scored token"),
    "a token without a prompt": ({"response_mask": EVERYTHING}, r"column \d is scored, but nothing stands before"),
    "a first token": (
        {"attention_mask": torch.ones_like(MASK), "response_mask": EVERYTHING},
        "row 0, column 0 is scored, but nothing stands before",
    ),
    "shifted labels": ({"response_mask": None, "labels": SHIFTED}, r"labels\[\d, \d\] is .*\(not shifted"),
    "mask too wide": ({"response_mask": torch.ones(7, 9)}, r"response_mask has shape \[7, 9\]: give \[7, 8\]"),
    "mask a row": ({"response_mask": torch.ones(7)}, r"response_mask has shape \[7\]"),
    "names": ({"prompt_ids": ["a", "b"]}, "prompt_ids is 2 names: give a list of 7"),
    "numbers of packed sequences": (
        {"attention_mask": 2 * MASK}, r"attention_mask is 2 in row 0, column \d: give 0 and 1 \(a row holds",
    ),
    "a mask of weights": (
        {"response_mask": 0.5 * SCORED}, r"response_mask is 0.5 in row 0, column \d: give 0 and 1 \(weights of tokens",
    ),
    "several sequences in a row": (
        {"position_ids": torch.arange(8).remainder(6).expand(7, 8)}, r"position_ids restart in row \d, column 6: a row",
    ),
    "a dictionary for a spec": ({"spec": {"dim": 1024}}, "spec is a dict: give a SketchSpec"),
    "no name": ({"prompt_ids": ["a", None, None, *"bccd"]}, "the prompt of row 1 has no id: give a string or an int"),
    "an empty cell": ({"prompt_ids": np.array([1, 1, float("nan"), 2, 2, 3, 3])}, "the prompt of row 0 is 1.0: give"),
    "lists for names": ({"prompt_ids": [["a"]] * 7}, r"the prompt of row 0 is \['a'\]: give a string"),
    "a name": ({"prompt_ids": "aabbccd"}, "prompt_ids is 7 names: give a list of 7"),
    "nothing to weigh by": ({"advantages": None}, "supervised loss: weights of ones.: none is given"),
    "two weights": ({"weights": ADVANTAGES}, "advantages and weights are given"),
    "too few advantages": ({"advantages": torch.ones(3)}, r"advantages has shape \[3\]: give \[7\] \(a row\)"),
    "a list of advantages": ({"advantages": [0.5] * 7}, "advantages is of type list: give a tensor"),
    "rewards of tokens": ({"advantages": None, "rewards": torch.ones(7, 8)}, r"rewards has shape \[7, 8\]: give \[7\]"),
    "reward NaN": (
        {"advantages": None, "rewards": torch.tensor([1.0, float("nan"), *[0] * 5])}, "rewards holds NaN.* in row 1",
    ),
    "advantage NaN": ({"advantages": ADVANTAGES.clone().fill_(torch.nan)}, "advantages holds NaN or infinity in row 0"),
    "a token's weight NaN": (
        {"advantages": None, "weights": torch.where(SCORED == 1, torch.inf, 0.0)}, "weights is inf at the token in row",
    ),
    "old log-prob NaN": (
        {"old_logprobs": torch.full(SCORED.shape, torch.nan)}, "old_logprobs is nan at the token in row 0, column",
    ),
    "one reward a prompt": (
        {"advantages": None, "rewards": torch.ones(7), "prompt_ids": None}, "rewards: a prompt has one row alone",
    ),
    "old log-probs a row": ({"old_logprobs": torch.ones(7)}, r"old_logprobs has shape \[7\]: give \[7, 8\]"),
    "old log-probs of fewer columns than are scored": (
        {"old_logprobs": -torch.ones(7, 2)},
        r"old_logprobs has shape \[7, 2\], so that it begins at column 6, and the token in row 0",
    ),
    "advantages of fewer columns than are scored": (
        {"advantages": torch.ones(7, 1)}, "advantages has shape .* give a value for every scored token",
    ),
    "weights of fewer columns than are scored": (
        {"advantages": None, "weights": torch.ones(7, 1)}, "weights has shape .* begins at column 7",
    ),
    "probabilities for log-probs": (
        {"old_logprobs": torch.full((7, 8), 0.25)}, "old_logprobs is 0.25 at the token .* a log-prob is at most 0",
    ),
    "old log-probs and weights": (
        {"advantages": None, "weights": ADVANTAGES, "old_logprobs": torch.zeros(7, 8)}, "is not applied to weights",
    ),
    "an estimator that is none": ({"estimator": "grpo2"}, "estimator is 'grpo2': give one of cropi, grpo"),
    "temperature": ({"temperature": 0.0}, "temperature=0.0"),
    "budget": ({"tokens_per_batch": 0}, "tokens_per_batch must be an integer of at least 1, got 0"),
    "padding in front and no mask": (
        {"attention_mask": None}, "attention_mask is not given, and row 0 begins with the padding token 0",
    ),
    "padding that is scored": (
        {"attention_mask": torch.ones_like(MASK), "response_mask": torch.ones(7, 4)},
        "row 1 ends with the padding token 0, and it is scored",
    ),
    "positions": ({"position_ids": torch.arange(8)}, r"position_ids has shape \[8\]: give \[7, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_names_the_argument_and_the_remedy(name: str) -> None:
    changes, message = MISUSE[name]
    given = {**DATA, "advantages": ADVANTAGES, "spec": SPEC, **changes}
    with pytest.raises(ValueError, match=message):
        cropi.score_batch(make_model(), **given)


def test_a_model_that_draws_is_refused() -> None:
    model = make_model().train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(CropiError, match="model is in training mode"):
        cropi.score_batch(model, **DATA, advantages=ADVANTAGES)
    with pytest.raises(CropiError, match="model is of type Tensor: give a name"):
        cropi.score_batch(IDS, **{**DATA, "input_ids": MASK}, advantages=ADVANTAGES)
