"""What live capture checks of a step, and what it says where a check fails or cannot be made yet."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from support import architectures, odd_models, zoo
from support import live as made
from support.live import LOSSES, SPEC, Step, captured
from support.versions import SEEN_BACKWARD
from torch import nn

from cropi_kernels import CoupledLossError, GradientSketcher, LiveSketcher
from cropi_kernels.names import canonical_name
from cropi_kernels.sketcher import SelfTestError
from cropi_kernels.sketcher.batch.row_segments import Runs
from cropi_kernels.sketcher.checks.apart import Apart
from cropi_kernels.sketcher.checks.live_audit import Schedule
from cropi_kernels.sketcher.checks.selftest import Comparison
from cropi_kernels.sketcher.sums.accumulator import Accumulator
from cropi_kernels.testing import sketch_gradients

transformers.logging.set_verbosity_error()


def test_a_nan_marks_its_prompt_alone() -> None:
    model, step = zoo.make("llama"), Step()
    want = captured(zoo.make("llama"), made.cross_entropy)
    bad = copy.copy(step)

    def loss(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
        rows = torch.where(step.prompts == 1, float("nan"), 1.0)[:, None]
        return (-made.logprobs_of(logits, step) * step.scored * rows).sum() / step.scored.sum()

    with LiveSketcher(model, SPEC) as live:
        with live.batch(step.prompts, shape=step.shape) as got:
            loss(made.logits_of(model, bad), bad, step.rows(None)).backward()
        assert got.failed.tolist() == [False, True, False]
        assert torch.equal(-got.sketches[[0, 2]], want[[0, 2]])
        with live.batch(step.prompts, shape=step.shape) as got:  # the taps are held to autograd now
            made.cross_entropy(made.logits_of(model, step), step, step.rows(None)).backward()
        assert not got.failed.any() and live._audits.heard


def test_a_prompt_of_which_nothing_is_scored_has_no_gradient() -> None:
    """As where a trainer masks responses that were cut off: its loss has no such term, and the others are as before."""
    model, step, masked = zoo.make("llama"), Step(), Step()
    masked.scored[step.prompts == 1] = False
    want = captured(zoo.make("llama"), policy_gradient, step)
    got = captured(model, policy_gradient, masked)
    assert torch.equal(got[[0, 2]], want[[0, 2]]) and not got[1].any() and bool(want[1].any())


def policy_gradient(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
    return (made.logprobs_of(logits, step) * step.scored * step.advantages[:, None]).sum()


def coupled_by_a_norm(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
    logp = made.logprobs_of(logits, step)
    return (logp * step.advantages[:, None] * step.scored).sum() / logp.std()


def coupled_by_the_weights(model: nn.Module) -> Any:
    def loss(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
        return made.cross_entropy(logits, step, mine) + 1e-3 * model.model.norm.weight.square().sum()

    return loss


@pytest.mark.long
def test_a_loss_that_is_no_sum_over_prompts_is_named() -> None:
    with pytest.raises(CoupledLossError, match="not a sum over prompts"):
        captured(zoo.make("llama"), coupled_by_a_norm)
    model = zoo.make("llama")
    with pytest.raises(CoupledLossError, match=r"model\.norm\.weight"):
        captured(model, coupled_by_the_weights(model))
    assert captured(zoo.make("llama"), coupled_by_a_norm, coupled=True).isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize("way", ["live", "batch"])
def test_sequences_that_attend_to_each_other_are_named(way: str) -> None:
    """transformers keeps the sequences of a row apart where it is given their positions, and no mask."""
    model, packed = zoo.make("llama"), zoo.packed()
    masked = dataclasses.replace(packed, attention_mask=torch.ones_like(packed.input_ids))

    def capture(batch: zoo.Batch, **options: Any) -> torch.Tensor:
        kind = LiveSketcher if way == "live" else GradientSketcher
        with kind(model, SPEC, **options) as sketcher, sketcher.batch(batch.segments) as out:
            (batch.logprobs(model, use_cache=False) * zoo.weights_of(batch)).sum().backward()
        return out.sketches

    error = CoupledLossError if way == "live" else SelfTestError
    with pytest.raises(error, match="changes with those of another in its row"):
        capture(masked)
    assert not torch.allclose(capture(masked, verify=False), capture(packed), rtol=0.1)
    if way == "live":
        assert torch.equal(capture(masked, coupled=True), capture(masked, verify=False))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_call_that_adds_to_keys_and_values_is_not_made_again(name: str) -> None:
    """Before transformers 5.24 a model was given them by the first name."""
    packed = zoo.packed()
    apart = Apart(zoo.make("llama"), Accumulator(SPEC), packed.segments)
    for cache in (None, transformers.DynamicCache()):
        apart._call = (), {"input_ids": packed.input_ids, name: cache}
        assert (apart._given() is None) == (cache is not None)


@pytest.mark.long
def test_every_loss_of_a_step_is_looked_at() -> None:
    """A loss and a term of its own that is not one over prompts, each with its backward pass."""
    model, step = zoo.make("llama"), Step()
    with pytest.raises(CoupledLossError, match="not a sum over prompts"):
        with LiveSketcher(model, SPEC) as live, live.batch(step.prompts, shape=step.shape):
            logits = made.logits_of(model, step)
            made.cross_entropy(logits, step, step.rows(None)).backward(retain_graph=True)
            coupled_by_a_norm(logits, step, step.rows(None)).backward()


@pytest.mark.long
def test_a_loss_is_looked_at_again() -> None:
    """A term of several prompts that comes in the second step, beside the second comparison with autograd."""
    model, step = zoo.make("llama"), Step()
    with LiveSketcher(model, SPEC) as live:
        for more in (0, 1):  # a loss that is linear in the logits, and one that is not
            with live.batch(step.prompts, shape=step.shape):
                logits = made.logits_of(model, step)
                linear = (logits * step.advantages[:, None, None]).sum()
                (linear + policy_gradient(logits, step, step.rows(None)) if more else linear).backward()
            assert live.loss == "a sum over prompts" + ("" if more else " (linear in what the model gave)")
    with LiveSketcher(model, SPEC) as live:
        for loss in (made.cross_entropy, coupled_by_a_norm):
            wrong = pytest.raises(CoupledLossError, match="not a sum over prompts")
            with (
                wrong if loss is coupled_by_a_norm else contextlib.nullcontext(),
                live.batch(step.prompts, shape=step.shape),
            ):
                loss(made.logits_of(model, step), step, step.rows(None)).backward()
        runs = Runs.of(step.prompts, step.shape, None)
        assert live.loss == "not a sum over prompts" and live._asks(runs, False)
        live.loss = "a sum over prompts"
        assert live._asks(runs, True) and not live._asks(runs, False)
        live.loss = "not checked: the model is compiled from outside, and a hook has it compiled anew"
        assert not live._asks(runs, True)


def begin_autograd_backward(loss: torch.Tensor, model: nn.Module) -> None:
    torch.autograd.backward([0.25 * loss, 0.75 * loss])


def begin_autograd_grad(loss: torch.Tensor, model: nn.Module) -> None:
    torch.autograd.grad(outputs=loss, inputs=list(model.parameters()))


def begin_at_several_numbers(loss: torch.Tensor) -> None:
    (loss * torch.ones(2)).backward(torch.full((2,), 0.5))


def test_a_backward_pass_whose_beginning_is_not_seen_is_named() -> None:
    """As one of torch.autograd.backward in torch 2.6; a later one is looked at again."""
    model, step = zoo.make("llama"), Step()
    with LiveSketcher(model, SPEC) as live:
        for begin in (begin_at_several_numbers, torch.Tensor.backward):
            assert live.loss is None or live.loss.startswith(
                "not checked: no backward pass was seen to begin"
            )
            with live.batch(step.prompts, shape=step.shape):
                loss = made.cross_entropy(made.logits_of(model, step), step, step.rows(None))
                begin(loss)
            assert live.loss is not None
        assert live.loss == "a sum over prompts"


@pytest.mark.long
@pytest.mark.parametrize(
    "begin",
    [pytest.param(begin_autograd_backward, marks=SEEN_BACKWARD), begin_autograd_grad],
)
def test_a_backward_pass_that_begins_otherwise_is_looked_at(begin: Any) -> None:
    for loss in (made.cross_entropy, coupled_by_a_norm):
        model, step = zoo.make("llama"), Step()
        wrong = pytest.raises(CoupledLossError, match="not a sum over prompts")
        with (
            wrong if loss is coupled_by_a_norm else contextlib.nullcontext(),
            LiveSketcher(model, SPEC) as live,
            live.batch(step.prompts, shape=step.shape),
        ):
            begin(loss(made.logits_of(model, step), step, step.rows(None)), model)
        assert live.loss == f"{'not ' if loss is coupled_by_a_norm else ''}a sum over prompts"


@pytest.mark.long
def test_losses_of_trainers_are_sums() -> None:
    for loss in LOSSES.values():
        model, step = zoo.make("llama"), Step()
        with LiveSketcher(model, SPEC) as live, live.batch(step.prompts, shape=step.shape):
            loss(made.logits_of(model, step), step, step.rows(None)).backward()
        assert live.loss == "a sum over prompts"


def test_a_weight_that_is_used_beside_its_module_is_named() -> None:
    model = zoo.make("llama")

    def loss(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=step.ids, attention_mask=step.mask, use_cache=False).last_hidden_state
        return made.grpo((hidden @ model.lm_head.weight.T)[:, :-1], step, mine)

    with pytest.raises(SelfTestError, match=r"lm_head\.weight.*heard nothing"):
        captured(model, loss, coupled=True)


def without_gradient(step: Step) -> Step:
    """Equal rewards: no prompt has a gradient."""
    part = copy.copy(step)
    part.advantages = torch.zeros_like(step.advantages)
    return part


def one_prompt(step: Step) -> Step:
    return step.part(step.prompts == 1)


def even_ids(step: Step) -> Step:
    """A micro-batch of prompts 0 and 2 of a step of three."""
    return step.part(step.prompts != 1)


@pytest.mark.long
@pytest.mark.parametrize("first", [without_gradient, one_prompt, even_ids])
def test_a_first_batch_that_shows_nothing_of_the_loss(first: Any) -> None:
    """Of zeros all derivatives are zero, and one prompt has no other: the next batch is looked at."""
    model, step = zoo.make("llama"), Step()
    with (
        pytest.raises(CoupledLossError, match="not a sum over prompts"),
        LiveSketcher(model, SPEC) as live,
    ):
        for batch in (first(step), step):
            with live.batch(batch.prompts, shape=batch.shape, num_segments=3):
                coupled_by_a_norm(made.logits_of(model, batch), batch, batch.rows(None)).backward()
            assert first is not even_ids and str(live.loss).startswith("not checked yet")


def test_a_first_step_without_a_gradient_does_not_pass_for_a_comparison() -> None:
    model, step = zoo.make("llama"), Step()

    def loss(step: Step) -> torch.Tensor:
        hidden = model.model(input_ids=step.ids, attention_mask=step.mask, use_cache=False).last_hidden_state
        logp = made.logprobs_of((hidden @ model.lm_head.weight.T)[:, :-1], step)
        return (logp * step.scored * step.advantages[:, None]).sum()

    with LiveSketcher(model, SPEC) as live:
        for _ in range(2):
            with live.batch(step.prompts, shape=step.shape) as got:
                loss(without_gradient(step)).backward()
            assert not got.sketches.any()
        with pytest.raises(SelfTestError, match=r"lm_head\.weight.*heard nothing"):
            with live.batch(step.prompts, shape=step.shape):
                loss(step).backward()


def test_an_adapter_that_begins_at_zero_is_compared_once_it_has_a_gradient() -> None:
    from peft import LoraConfig, get_peft_model

    model, step = get_peft_model(zoo.make("llama"), LoraConfig(r=4, target_modules=["q_proj"])), Step()  # type: ignore[arg-type]
    weights = [p for name, p in model.named_parameters() if "lora_A" in name]
    weights[0].register_hook(lambda gradient: 2 * gradient)  # a user's: no tap sees it
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with LiveSketcher(model, SPEC) as live:
        for expected in (contextlib.nullcontext(), pytest.raises(SelfTestError, match="lora_A")):
            with expected, live.batch(step.prompts, shape=step.shape):
                made.grpo(made.logits_of(model, step), step, step.rows(None)).backward()
            optimizer.step()


def test_comparisons_become_fewer() -> None:
    """As long as there is no gradient, every batch is compared."""
    schedule, compared = Schedule(), []
    for batch in range(30):
        if schedule.due():
            compared.append(batch)
            schedule.note([Comparison(("a",), "", 0.0, 1.0, float(batch > 0))], frozenset("m"))
    assert compared == [0, 1, 2, 4, 7, 12, 21] and schedule.heard == {"m"}


class Changing(nn.Module):
    """Of which a part is computed beside its module, from some batch on: of the whole, or of one half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.beside = nn.Linear(4, 8), nn.Linear(8, 4), 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).tanh()
        beside = self.beside * nn.functional.linear(hidden, self.second.weight) if self.beside else 0.0
        return beside if self.beside == 1.0 else beside + self.second(hidden)


def take(steps: int, sketcher: Any, model: nn.Module) -> None:
    """Steps of two prompts, of which each has two rows."""
    for _ in range(steps):
        with sketcher.batch(torch.arange(4) // 2, shape=(4, 3)):
            model(torch.ones(4, 3, 4)).sum().backward()


@pytest.mark.parametrize("beside", [0.5, 1.0])
@pytest.mark.parametrize("kind", [LiveSketcher, GradientSketcher])
def test_code_that_changes_after_the_first_batches_is_noticed(kind: Any, beside: float) -> None:
    model = Changing()
    with kind(model, SPEC) as sketcher:
        take(5, sketcher, model)
        model.beside = beside
        with pytest.raises(SelfTestError, match=r"second\.weight"):
            take(5, sketcher, model)


@pytest.mark.parametrize("moved", [0, 2])
def test_hooks_that_come_after_the_first_batches_are_noticed(moved: int) -> None:
    """Rows change places around a module: its tap takes one prompt's for another's, and the sum stays the same."""
    model = Changing()
    with LiveSketcher(model, SPEC) as live:
        take(5, live, model)
        tested = live.self_test
        take(5, live, model)
        assert live.self_test is tested is not None
        model.second.register_forward_pre_hook(lambda module, args: (args[0].roll(moved, 0),))
        model.second.register_forward_hook(lambda module, args, y: y.roll(-moved, 0))
        wrong = pytest.raises(SelfTestError, match=r"second\.weight.*tokens of one segment count for another")
        with wrong if moved else contextlib.nullcontext():
            take(12, live, model)
        assert moved or live.self_test is not tested


def test_rows_of_several_sequences_are_refused() -> None:
    batch, model = zoo.packed(), zoo.make("llama")
    with (
        LiveSketcher(model, SPEC) as live,
        pytest.raises(ValueError, match="position_ids restart in column 7"),
    ):
        with live.batch(torch.zeros(1, dtype=torch.int64), shape=tuple(batch.input_ids.shape)):
            model(input_ids=batch.input_ids, position_ids=batch.position_ids)


def test_masks_that_number_the_sequences_of_a_row_are_refused() -> None:
    model, step = zoo.make("llama"), Step()
    numbers = step.mask * (1 + (torch.arange(step.shape[1]) >= 4).long())
    with LiveSketcher(model, SPEC) as live:
        with pytest.raises(
            ValueError, match=r"row 0 holds several sequences \(attention_mask is 2 in column 4\)"
        ):
            with live.batch(step.prompts, shape=step.shape):
                model(input_ids=step.ids, attention_mask=numbers)
        with live.batch(step.prompts, shape=step.shape) as got:  # the failed batch is closed
            made.cross_entropy(made.logits_of(model, step), step, step.rows(None)).backward()
    assert not got.failed.any()


def test_refused_in_words() -> None:
    model, step = zoo.make("llama"), Step()
    live = LiveSketcher(model, SPEC)
    with (
        pytest.raises(RuntimeError, match="outside the `with LiveSketcher"),
        live.batch(step.prompts, shape=(6, 9)),
    ):
        pass
    with live:
        for segments, options, message in (
            (step.prompts.tolist(), {}, "segments is of type list"),
            (step.prompts, {}, "give ids per token, or shape"),
            (step.prompts.float(), {"shape": (6, 9)}, "torch.float32"),
            (step.prompts - 1, {"shape": (6, 9)}, "holds -1"),
            (step.prompts, {"shape": (6, 9), "num_segments": 2}, "num_segments=2 but segments holds id 2"),
            (step.prompts, {"shape": (6, 9), "scale": float("inf")}, "scale is inf"),
        ):
            with pytest.raises(ValueError, match=message), live.batch(segments, **options):
                pass
        model.lm_head.weight.requires_grad_(False)
        with pytest.raises(ValueError, match=r"what is trainable has changed.*lm_head\.weight"):
            with live.batch(step.prompts, shape=(6, 9)):
                pass
        model.lm_head.weight.requires_grad_(True)
        with live.batch(step.prompts, shape=step.shape):
            loss = made.grpo(made.logits_of(model, step), step, step.rows(None))
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="after its batch had ended"):
            loss.backward()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.long
def test_images_are_no_rows_of_the_batch() -> None:
    """As many images as rows, both in the first: what the tower sees is refused; without it sketches are right."""
    model: Any = architectures.small("gemma3")
    model.config.image_token_id = 5
    torch.manual_seed(0)
    ids = torch.randint(10, 90, (2, 12))
    ids[0, 1:9] = 5
    given = dict(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16), token_type_ids=(ids == 5).long())

    def loss(row: slice) -> torch.Tensor:
        logits = model(**given, logits_to_keep=6).logits[row]
        return torch.log_softmax(logits, -1)[..., 3].sum()

    with (
        LiveSketcher(model, architectures.SPEC) as live,
        pytest.raises(
            ValueError, match=r"multi_modal_projector.*of shape \(2, 4, 32\).*exclude its parameters"
        ),
        live.batch(torch.tensor([0, 1]), shape=(2, 12)),
    ):
        loss(slice(None)).backward()
    towers = ("model.vision_tower.*", "model.multi_modal_projector.*")
    with (
        LiveSketcher(model, architectures.SPEC, towers) as live,
        live.batch(torch.tensor([0, 1]), shape=(2, 12)) as got,
    ):
        loss(slice(None)).backward()
    for row, sketch in enumerate(got.sketches):
        model.zero_grad()
        loss(slice(row, row + 1)).backward()
        gradient = {name: -p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        want = sketch_gradients(model, gradient, architectures.SPEC, towers)
        # float32 passes of two layers: a few hundred roundings of 2^-24.
        assert (sketch - want).norm() <= 1e-4 * want.norm()


def dropping_layers() -> Any:
    config = transformers.XGLMConfig(
        vocab_size=zoo.VOCAB, d_model=32, num_layers=3, ffn_dim=48, attention_heads=4, layerdrop=0.5,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.XGLMForCausalLM(config)


@pytest.mark.long
@pytest.mark.parametrize("way", ["live", "batch"])
@pytest.mark.parametrize(
    "make", [dropping_layers, lambda: odd_models.make("gemma3n")], ids=["xglm", "gemma3n"]
)
def test_modules_that_are_not_called_in_training(make: Any, way: str) -> None:
    """A layer that is left out by chance keeps its taps, and the gradient of a weight that is used without its module
    is formed: a step's sketches add up to its gradient."""
    model, step = make().train(), Step()
    live = way == "live"
    prompts = step.prompts if live else step.prompts.sort().values
    known: set[str] = set()
    with (LiveSketcher if live else GradientSketcher)(model, SPEC) as sketcher:
        for number in range(6):
            torch.manual_seed(number)
            with sketcher.batch(prompts, shape=step.shape) as got:
                made.cross_entropy(made.logits_of(model, step), step, step.rows(None)).backward()
            known.add(str(sorted(sketcher.coverage.by_kind.items())))
            if live:
                formed = {
                    canonical_name(name): torch.zeros_like(p) if p.grad is None else p.grad
                    for name, p in model.named_parameters()
                }
                model.zero_grad()
                want = sketch_gradients(model, formed, SPEC)
                assert (got.sketches.sum(0) + want).norm() <= 1e-5 * want.norm()
        assert len(known) == 1 and ("exact" in sketcher.coverage.by_kind) == (make is not dropping_layers)
