"""A selector takes the sketches of one model, tokenizer and estimator; real sketches of another one are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.made_data import make_model, make_tokenizer

import cropi
from cropi import Policy, Selector, SketchedBatch
from cropi.errors import CropiError
from cropi.ranking.origin import Known
from cropi_kernels import LiveSketcher, SketchSpec

SPEC = SketchSpec(256, width=16)
ROWS = torch.randint(2, 40, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)


def sketched(model: Any = None, spec: SketchSpec = SPEC, **options: Any) -> SketchedBatch:
    given = {"rewards": torch.tensor([1.0, 0.0, 0.0, 1.0])} | options
    return cropi.score_batch(
        model if model is not None else make_model(), ROWS, response_mask=MASK, prompt_ids=[0, 0, 1, 1], spec=spec,
        **given,
    )  # fmt: skip


def head_alone(**changes: Any) -> Any:
    """Names and shapes of what is trained say nothing of the rest."""
    model = make_model(**changes).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    return model


def more_tokens() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    return tokenizer


# The sketches before, the others, and what is said of these.
CASES: dict[str, tuple[Any, Any, str]] = {
    "shapes": (
        sketched, lambda: sketched(make_model(intermediate_size=48)),
        r"another model: model.layers.0.mlp.down_proj.weight has the shape \[32, 48\], and \[32, 64\] in the sketches",
    ),
    "more layers": (
        sketched, lambda: sketched(make_model(num_hidden_layers=3)),
        r"another model: their 30 parameters .* which have no 'model.layers.2.input_layernorm.weight'",
    ),
    "other tapped layers": (
        sketched, lambda: sketched(exclude=["*.mlp.up_proj.weight"]),
        "another model: their 19 parameters .* which have 'model.layers.0.mlp.up_proj.weight' too",
    ),
    "another type": (
        lambda: sketched(head_alone()), lambda: sketched(head_alone(kind="mistral")),
        "another model: its type is 'mistral', and that of the sketches before 'llama'",
    ),
    "another vocabulary": (
        lambda: sketched(head_alone()), lambda: sketched(head_alone(vocab_size=128)),
        r"another model: its vocabulary is 128 tokens, and that of the sketches before \d+",
    ),
    "another tokenizer": (
        lambda: sketched(Policy(make_model(), make_tokenizer())), lambda: sketched(Policy(make_model(), more_tokens())),
        "another tokenizer: its tokens are not those of the sketches before",
    ),
    "another estimator": (
        sketched, lambda: sketched(estimator="dr_grpo"),
        r"another estimator: 'dr_grpo' \(clip_high = 0.2\), and of 'cropi' \(clip_high = None\) before; sketch both by",
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_sketches_of_another_model_are_refused_wherever_they_come(case: str) -> None:
    before, other, message = CASES[case]
    one, two = before(), other()
    selector = Selector([0, 1], SPEC, dim=64)
    selector.update([0, 1], one, 1)
    state = selector.state_dict()
    for call in (
        lambda: selector.update([0, 1], two, 2),
        lambda: selector.update([0, 1], two, 2, gather=True),
        lambda: selector.refresh(two),
    ):
        with pytest.raises(CropiError, match=f"sketches are of {message}"):
            call()
    assert selector.step == 1 and selector.state_dict()["origin"] == state["origin"]
    again = Selector([0, 1], SPEC, dim=64)
    again.update([], Known(torch.zeros(0, 256), dict(two.origin)), 0)  # no rows, but their model
    with pytest.raises(CropiError, match=f"state's sketches are of {message.split(':')[0]}"):
        again.load_state_dict(state)
    assert not again.seen.any()
    late = Selector([0, 1], SPEC, dim=64)  # nothing is known of its model: the first sketches show it
    late.load_state_dict(state)
    with pytest.raises(CropiError, match=f"are of {message}"):
        late.refresh(two)
    late.refresh(one)
    late.update([0, 1], two.sketches, 2)  # of a tensor nothing is known
    assert late.step == 2


@pytest.mark.parametrize("changes", [{"seed": 3}, {"width": 32}, {"vocab_width": 64}])
def test_sketches_of_another_spec_are_refused(changes: dict[str, int]) -> None:
    other = SketchSpec(**({"dim": 256, "width": 16} | changes))
    two, selector, theirs = (
        sketched(spec=other),
        Selector([0, 1], SPEC, dim=64),
        Selector([0, 1], other, dim=64),
    )
    ((name, value),) = changes.items()
    for call in (lambda: selector.update([0, 1], two, 1), lambda: selector.refresh(two)):
        with pytest.raises(
            CropiError, match=rf"are of SketchSpec\(.*{name}={value}.*but this Selector is for"
        ):
            call()
    with pytest.raises(CropiError, match=f'saved with spec = .*"{name}": {value}'):
        selector.load_state_dict(theirs.state_dict())


@pytest.mark.long
def test_what_training_changes_is_not_compared() -> None:
    """Weights, their dtype, wrappers; live sketches, of which no estimator is known; two names of one estimator."""
    selector = Selector([0, 1], SPEC, dim=64)
    selector.update([0, 1], sketched(estimator="grpo"), 1)
    selector.update([0, 1], sketched(make_model(seed=1), estimator="ppo"), 2)
    selector.update([0, 1], sketched(make_model().bfloat16(), estimator="ppo"), 3)
    model = make_model(seed=2)
    with LiveSketcher(torch.nn.Sequential(model)[0], SPEC) as live:
        with live.batch(torch.tensor([0, 0, 1, 1]), shape=(4, 6)) as got:
            logits = model(ROWS).logits[:, :-1].log_softmax(-1)
            (
                logits.gather(2, ROWS[:, 1:, None]) * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
            ).sum().backward()
    selector.update([0, 1], got, 4)
    assert got.origin["vocabulary"] == model.config.vocab_size and got.origin["model"] == "llama"
    assert selector.step == 4


def test_a_tokenizer_that_names_no_tokens_is_not_compared() -> None:
    class Bare:
        eos_token_id = 1

    assert "tokens" not in sketched(Policy(make_model(), Bare())).origin
    policy = Policy(make_model(), make_tokenizer())
    first = sketched(policy).origin["tokens"]
    policy.tokenizer.add_tokens(["<think>"])  # between two steps
    assert sketched(policy).origin["tokens"] != first
