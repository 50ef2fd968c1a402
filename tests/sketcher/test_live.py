"""Live capture: every prompt's part of a trainer's own gradient, held to plain autograd of one prompt at a time."""

from __future__ import annotations

import contextlib
import re
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from support import live as made
from support import odd_models, zoo
from support.live import LOSSES, SPEC, Step, captured
from support.versions import FSDP2, checkpoint_layers
from torch import nn

from cropi_kernels import GradientSketcher, LiveSketcher, SketchSpec
from cropi_kernels.sketcher import SelfTestError

transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_prompts_part(name: str, loss: str) -> None:
    part = made.of_step(LOSSES[loss], Step())
    made.assert_right(captured(zoo.make(name), LOSSES[loss]), partial(zoo.make, name), part)


# ------------------------------------------------------------------------------------------- the step itself
def weights_after(
    model: nn.Module, tapped: bool, around: Any = contextlib.nullcontext, steps: int = 2
) -> Any:
    """All parameters after AdamW steps of the GRPO loss in training mode."""
    step = Step()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(LiveSketcher(model, SPEC)) if tapped else None
        for _ in range(steps):
            block = live.batch(step.prompts, shape=step.shape) if live else contextlib.nullcontext()
            with block, around():
                loss = made.grpo(made.logits_of(model, step), step, step.rows(None))
                with torch.autocast("cpu", enabled=False):
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def plain(name: str, **changes: Any) -> nn.Module:
    return zoo.make(name, **changes)


def checkpointed(name: str, reentrant: bool) -> nn.Module:
    model: Any = zoo.make(name)
    checkpoint_layers(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model  # type: ignore[no-any-return]


def with_lora(name: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, init_lora_weights=False
    )
    return get_peft_model(zoo.make(name), config)  # type: ignore[return-value]


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


STEPS: dict[str, Any] = {
    "llama-tied": lambda: plain("llama-tied"),
    "positions of all rows": lambda: plain("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "dropout, positions of all rows": lambda: plain("gpt2", resid_pdrop=0.1, embd_pdrop=0.1),
    "biases": lambda: plain("qwen2"),
    "norms of heads": lambda: plain("gemma3"),
    "checkpointing": lambda: checkpointed("llama", False),
    "reentrant checkpointing": lambda: checkpointed("llama", True),
    "LoRA": lambda: with_lora("llama"),
}


@pytest.mark.parametrize("kind", STEPS)
def test_the_step_has_the_same_bits(kind: str) -> None:
    with_taps, without = weights_after(STEPS[kind](), True), weights_after(STEPS[kind](), False)
    assert all(torch.equal(a, b) for a, b in zip(with_taps, without, strict=True))
    start = list(STEPS[kind]().parameters())
    assert any(not torch.equal(a, b) for a, b in zip(with_taps, start, strict=True)), "nothing was trained"


def test_the_step_has_the_same_bits_under_autocast() -> None:
    a, b = (weights_after(zoo.make("llama-tied"), tapped, autocast) for tapped in (True, False))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["gpt-oss", "opt", "mamba", "mamba2", "mixtral"])
def test_parameters_that_a_model_uses_in_its_own_way(name: str) -> None:
    """Sinks, routers, experts, state spaces: their parts are formed from the same backward pass."""
    got = captured(odd_models.make(name), made.grpo)
    made.assert_right(got, partial(odd_models.make, name), made.of_step(made.grpo, Step()))


@pytest.mark.parametrize("name", ["opt", "cohere", "mamba2"])
def test_formed_gradients_leave_the_step_its_bits(name: str) -> None:
    a, b = (weights_after(odd_models.make(name), tapped) for tapped in (True, False))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_experts_leave_the_step_within_rounding() -> None:
    a, b = (weights_after(odd_models.make("mixtral"), tapped, steps=1) for tapped in (True, False))
    # AdamW's first step is lr * sign(g) where |g| is far above eps; where g is nearly 0, rounding may turn its sign.
    off = torch.cat([(x - y).abs().flatten() for x, y in zip(a, b, strict=True)])
    assert off.median() <= 1e-6 and (off > 1e-4).float().mean() < 0.01


# ------------------------------------------------------------------------------------------ ways of training
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    got = captured(checkpointed("llama", reentrant).train(), made.grpo)
    made.assert_right(got, partial(zoo.make, "llama"), made.of_step(made.grpo, Step()))


def test_lora() -> None:
    """The adapters alone; autograd as it trains them."""

    def make(dtype: torch.dtype) -> nn.Module:
        return with_lora("llama").eval().to(dtype)

    got = captured(make(torch.float32), made.grpo)
    made.assert_right(got, make, made.of_step(made.grpo, Step()))


def test_lora_that_is_checkpointed_by_reentry() -> None:
    """Nothing that is trained lies outside of the checkpoints: the self-test has to run them all the same."""
    import peft

    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        return zoo.with_adapter(zoo.make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"])).to(dtype)

    model: Any = make()
    model.enable_input_require_grads()
    checkpoint_layers(model, {"use_reentrant": True})
    made.assert_right(captured(model.train(), made.grpo), make, made.of_step(made.grpo, Step()))


def test_formed_adapters_under_autocast() -> None:
    """The step's check knows that autocast rounds what a formed float32 gradient is made of."""
    import peft

    def make(dtype: torch.dtype = torch.float32) -> nn.Module:
        config = peft.LoHaConfig(r=4, target_modules=["q_proj"])
        return zoo.with_adapter(zoo.make("llama"), config).to(dtype)

    part = made.of_step(made.grpo, Step())
    wide = made.prompt_gradients(make(torch.float64), part)
    with autocast():
        own = made.prompt_gradients(make(), part)
        got = captured(make(), made.grpo)
    zoo.assert_close(got, make(), wide, own)


def test_autocast() -> None:
    """At most twice as far from the exact gradients as autograd under the same autocast."""
    model, part = zoo.make("llama-tied"), made.of_step(made.grpo, Step())
    wide = made.prompt_gradients(zoo.make("llama-tied", torch.float64), part)
    with autocast():
        own = made.prompt_gradients(zoo.make("llama-tied"), part)
        got = captured(model, made.grpo)
    zoo.assert_close(got, zoo.make("llama-tied"), wide, own)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_validation_prompts_are_sketched_between_steps(name: str) -> None:
    """By another sketcher, which sees the experts' own code beneath the taps of this one; both give what each gives by
    itself."""
    model, step = odd_models.make(name), Step()
    given = {"segments": torch.arange(6), "labels": step.ids, "weights": step.advantages}

    def validation() -> torch.Tensor:
        with GradientSketcher(model, SPEC) as sketcher:
            return sketcher.policy_gradient(step.ids, attention_mask=None, **given).sketches

    def training(live: LiveSketcher) -> torch.Tensor:
        with live.batch(step.prompts, shape=step.shape) as got:
            made.grpo(made.logits_of(model, step), step, step.rows(None)).backward()
        return got.sketches

    alone = validation()
    with LiveSketcher(model, SPEC) as live:
        first, between, second = training(live), validation(), training(live)
    assert torch.equal(between, alone) and torch.equal(validation(), alone)
    # The first batch is compared with autograd, tap by tap: the same sums in another order.
    assert (first - second).norm() <= 1e-6 * first.norm() and bool(first.any())
    assert not any("forward" in vars(module) for module in model.modules())


def test_micro_batches_add_up() -> None:
    model, step = zoo.make("llama"), Step()
    whole = captured(model, made.grpo)
    model.zero_grad()
    total = torch.zeros_like(whole)
    with LiveSketcher(model, SPEC) as live:
        for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
            own = step.part(part)
            rows = torch.ones(len(own.ids), 1)
            with live.batch(own.prompts, shape=own.shape, num_segments=zoo.N_SEGMENTS) as sketch:
                made.grpo(made.logits_of(model, own), own, rows).backward()
            total -= sketch.sketches
    # Float32 sums in another order: some thousand terms, each rounded to 2^-24 of its size.
    assert (total - whole).norm() <= 1e-5 * whole.norm()


def test_default_device_does_not_matter() -> None:
    """Experts too, which are recognised by a trial on numbers of their own."""

    def loss(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1)[..., 0].sum()

    model, step = odd_models.make("mixtral"), Step()
    want = captured(model, loss, step)
    with torch.device("meta"):
        got = captured(model, loss, step)
    assert torch.equal(got, want) and bool(want.any())


class Scaled(nn.Module):
    """A parameter that is used in a way of its own: its gradient is formed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.scale)


@pytest.mark.parametrize("kind", ["slab", "countsketch", "kron", "tensor"])
def test_a_backward_pass_that_is_differentiated_again(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16), nn.LayerNorm(16), Scaled())
    ids, sketches = torch.randint(16, (4, 6)), []
    with LiveSketcher(model, SketchSpec(1024, kind=kind)) as live:
        for create_graph in (False, True):
            with live.batch(torch.tensor([0, 0, 1, 1]), shape=(4, 6)) as sketch:
                grads = torch.autograd.grad(
                    model(ids).square().sum(), [*model.parameters()], create_graph=create_graph
                )
            sketches.append(sketch.sketches)
    assert all(g.requires_grad for g in grads) and not sketches[1].requires_grad
    torch.testing.assert_close(sketches[1], sketches[0], rtol=1e-6, atol=1e-6)


class Doubling:
    def get_scale(self) -> float:
        return 1024.0


def test_what_the_loss_is_scaled_by_is_divided_out() -> None:
    model, step = zoo.make("llama"), Step()
    want = captured(zoo.make("llama"), made.grpo)
    with (
        LiveSketcher(model, SPEC) as live,
        live.batch(step.prompts, shape=step.shape, scale=Doubling()) as got,
    ):
        (1024.0 * made.grpo(made.logits_of(model, step), step, step.rows(None))).backward()
    assert torch.equal(-got.sketches, want), "a power of two changes no bit"


def test_a_head_on_the_last_columns() -> None:
    """As trainers run it: logits of the completion alone."""
    step, keep = Step(), 4

    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        out = model(input_ids=step.ids, attention_mask=step.mask, use_cache=False, logits_to_keep=keep).logits
        logp = out.to(torch.promote_types(out.dtype, torch.float32)).log_softmax(-1)[..., 5]
        return (logp * rows * step.advantages[:, None].to(logp)).sum()

    model = zoo.make("llama-tied")
    with LiveSketcher(model, SPEC) as live, live.batch(step.prompts, shape=step.shape) as got:
        loss(model, step.rows(None)).backward()
    made.assert_right(
        -got.sketches, partial(zoo.make, "llama-tied"), lambda model, prompt: loss(model, step.rows(prompt))
    )


class FusedLogProbs(torch.autograd.Function):
    """A head that multiplies by its weight itself, as trainers' fused ones do: log-probs and entropies, no logits."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
        ctx.save_for_backward(h, weight, targets)
        logp = FusedLogProbs.of(h, weight)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    @staticmethod
    def of(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (15.0 * torch.tanh(1.5 * (h @ weight.T) / 15.0) / 0.7).log_softmax(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        h, weight, targets = (x.detach() for x in ctx.saved_tensors)
        with torch.enable_grad():
            h, weight = h.requires_grad_(), weight.requires_grad_()
            logp = FusedLogProbs.of(h, weight)
            out = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
            return (*torch.autograd.grad(out, (h, weight), grads), None)


@pytest.mark.parametrize("told", [True, False])
def test_a_fused_head(told: bool) -> None:
    """Its sketch is made of what goes in and out, with a factor, a cap, a temperature and an entropy bonus; a trainer
    that does not tell of it is told by the parameter's name."""
    step = Step()
    rows = torch.arange(step.shape[0])[:, None].expand(-1, step.shape[1] - 1).reshape(-1)

    def loss(model: Any, mine: torch.Tensor, live: LiveSketcher | None) -> torch.Tensor:
        hidden = model.model(input_ids=step.ids, attention_mask=step.mask, use_cache=False).last_hidden_state
        hidden, targets = hidden[:, :-1].flatten(0, 1), step.ids[:, 1:].flatten()
        logp, entropy = FusedLogProbs.apply(hidden, model.lm_head.weight, targets)
        if live is not None:
            live.fused_head(hidden, targets, rows, logp, entropy, temperature=0.7, softcap=15.0, scale=1.5)
        each = (logp * step.advantages.to(logp)[rows] + 0.1 * entropy) * step.scored.flatten()
        return -(each * mine.to(logp)[:, 0][rows]).sum() / 7.0

    model = zoo.make("llama-tied")
    with LiveSketcher(model, SPEC) as live:
        expected = contextlib.nullcontext() if told else pytest.raises(SelfTestError, match="embed_tokens")
        with expected, live.batch(step.prompts, shape=step.shape) as got:
            loss(model, step.rows(None), live if told else None).backward()
    if told:
        make = partial(zoo.make, "llama-tied")
        made.assert_right(-got.sketches, make, lambda model, prompt: loss(model, step.rows(prompt), None))


@pytest.mark.long
@pytest.mark.parametrize("trained", [["weight"], ["weight", "bias"], ["bias"]])
def test_a_fused_head_of_packed_rows(trained: list[str]) -> None:
    """A row of several prompts does not say whose a token is: the error names what can be done, and that works."""
    step, model = Step(), zoo.make("llama")
    names = [f"lm_head.{key}" for key in trained]
    if "bias" in trained:
        model.lm_head.bias = nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    model.lm_head.weight.requires_grad_("weight" in trained)
    rows = torch.arange(step.shape[0])[:, None].expand(-1, step.shape[1] - 1).reshape(-1)
    per_token = step.prompts[:, None].expand(step.shape)

    def sketched(segments: torch.Tensor, exclude: list[str]) -> torch.Tensor:
        with LiveSketcher(model, SPEC, exclude) as live, live.batch(segments, shape=step.shape) as got:
            hidden = model.model(
                input_ids=step.ids, attention_mask=step.mask, use_cache=False
            ).last_hidden_state
            hidden, targets = hidden[:, :-1].flatten(0, 1), step.ids[:, 1:].flatten()
            logp, _ = FusedLogProbs.apply(hidden, model.lm_head.weight, targets)
            live.fused_head(hidden, targets, rows, logp, temperature=0.7, softcap=15.0, scale=1.5)
            (logp * step.advantages[rows] * step.scored.flatten()).sum().backward()
        return got.sketches

    with pytest.raises(
        ValueError, match=r"per token: give every prompt a row .* exclude=" + re.escape(str(names))
    ):
        sketched(per_token, [])
    alone = sketched(per_token, names)
    torch.testing.assert_close(alone, sketched(step.prompts, names), rtol=0, atol=1e-5 * float(alone.norm()))
    assert alone.any(dim=1).all()


def test_ids_per_token() -> None:
    """Two prompts in one row of a packed batch."""
    batch = zoo.packed()
    weights = zoo.weights_of(batch)

    def loss(model: nn.Module, mine: torch.Tensor) -> torch.Tensor:
        logp = batch.logprobs(model, use_cache=False)
        return (logp * weights.to(logp) * mine).sum()

    model = zoo.make("llama")
    with LiveSketcher(model, SPEC) as live, live.batch(batch.segments) as got:
        loss(model, torch.ones(len(weights))).backward()
    owner, make = batch.segments[0][batch.positions], partial(zoo.make, "llama")
    made.assert_right(-got.sketches, make, lambda model, prompt: loss(model, (owner == prompt).float()))


# ---------------------------------------------------------------------------------------- models in wrappers
def same_bits_twice(model: nn.Module) -> LiveSketcher:
    """Batches of two steps have the bits that they have without a wrapper; gives the sketcher."""
    step, want = Step(), captured(zoo.make("llama"), made.grpo)
    with LiveSketcher(model, SPEC) as live:
        for _ in range(2):
            with live.batch(step.prompts, shape=step.shape) as got:
                made.grpo(made.logits_of(model, step), step, step.rows(None)).backward()
            assert torch.equal(-got.sketches, want)
    return live


def test_data_parallel(one_rank: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(zoo.make("llama"))
    assert same_bits_twice(wrapped).loss == "a sum over prompts"


@FSDP2
def test_sharded(one_rank: None) -> None:
    """FSDP2: the taps see whole weights' products, autograd leaves shards."""
    from torch.distributed.fsdp import fully_shard

    model: Any = zoo.make("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    same_bits_twice(model)
    assert all(hasattr(p.grad, "placements") for p in model.parameters())


@pytest.mark.slow
def test_compiled_modules() -> None:
    """Compiled before the taps came or after: a compiled module sees hooks come."""
    model: Any = zoo.make("llama")
    step = Step()
    torch.compiler.reset()
    model.model.layers[0].mlp.compile(backend="eager")
    made.grpo(made.logits_of(model, step), step, step.rows(None)).backward()
    assert same_bits_twice(model).loss == "not checked: modules are compiled"
    torch.compiler.reset()
