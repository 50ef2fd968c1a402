"""A scoring pass runs in the dtypes of the weights: whatever wraps the model, and however small the weights are."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import zoo
from support.versions import COMPILED_MODELS
from support.zoo import Batch, make, padded, weights_of
from torch import nn
from torch.overrides import TorchFunctionMode

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.names import canonical_name
from cropi_kernels.sketcher.model import precision, recognise
from cropi_kernels.sketcher.model.precision import product_eps
from cropi_kernels.sketcher.policy import measure
from cropi_kernels.sketcher.taps import again
from cropi_kernels.testing import sketch_gradients

SPEC = SketchSpec(dim=1024)
HALF = (torch.float16, torch.bfloat16)


def sketches(model: nn.Module, batch: Batch | None = None, **changes: Any) -> torch.Tensor:
    with GradientSketcher(model, SPEC) as sketcher:
        return (batch or padded()).sketch(sketcher, **changes).sketches


def by_accelerate(model: nn.Module) -> nn.Module:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # of an earlier test's trainer, without autocast
    wrapped: nn.Module = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert "_original_forward" in vars(wrapped)
    return wrapped


def by_autocast(model: nn.Module) -> nn.Module:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def by_autocast_of_the_function(model: nn.Module) -> nn.Module:
    model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(type(model).forward), model)
    return model


def by_two_trainers(model: nn.Module) -> nn.Module:
    """TRL's own forward calls the one that it found, behind which stands an earlier trainer's autocast."""
    for _ in range(2):
        model.forward = MethodType(_calling(by_accelerate(model).forward), model)
    return model


def _calling(found: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return found(*args, **kwargs)

    return forward


def by_compile(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend="eager")
    return compiled


def by_data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def by_all(model: nn.Module) -> nn.Module:
    return by_data_parallel(by_compile(by_accelerate(model)))


WRAPPERS = [
    by_accelerate, by_autocast, by_autocast_of_the_function, by_two_trainers, by_data_parallel,
    *(pytest.param(wrap, marks=COMPILED_MODELS) for wrap in (by_compile, by_all)),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_a_trainer_puts_around_a_model_changes_no_bit(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, model = make("llama"), wrap(make("llama"))
    forward = vars(model).get("forward")
    assert torch.equal(sketches(model), sketches(plain))
    assert vars(model).get("forward") is forward
    ids = torch.arange(6)[None]
    # The wrapper is back: training goes on under autocast.
    autocast = wrap not in (by_compile, by_data_parallel)
    assert torch.equal(model(input_ids=ids).logits.float(), plain(input_ids=ids).logits) is not autocast


def test_distributed_data_parallel_is_looked_through(tmp_path: Any) -> None:
    def passes() -> None:
        model = nn.parallel.DistributedDataParallel(make("llama"))
        assert torch.equal(sketches(model), sketches(make("llama")))
        for _ in range(2):  # the reducer waits for nothing of the pass
            model(input_ids=torch.arange(6)[None]).logits.sum().backward()

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        passes()
        # A reducer that is the last to hold the group joins gloo's threads with Python's lock held, and they may wait
        # for it: seen once to hang.
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.long
def test_lora_under_accelerate_and_autocast_of_the_caller() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model: nn.Module = peft.get_peft_model(make("llama"), config).eval()
        return model

    expected = sketches(adapted())
    assert torch.equal(sketches(by_accelerate(adapted())), expected)
    # Adapters on a model that an earlier trainer has trained.
    trained = adapted()
    by_accelerate(trained.base_model.model)  # type: ignore[union-attr,arg-type]
    assert torch.equal(sketches(trained), expected)
    assert torch.equal(sketches(by_autocast(trained)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sketches(adapted()), expected)
        assert torch.is_autocast_enabled("cpu")


def test_layers_are_recognised_under_autocast_of_the_caller() -> None:
    """GPT-2's layers are recognised by what they compute, which autocast rounds."""
    want = zoo.sketched(zoo.make("gpt2"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(zoo.sketched(zoo.make("gpt2")), want)


def test_a_wrapper_that_may_change_the_output_is_not_taken_off() -> None:
    """It is outside of the autocast: to run without it would be to score another model."""
    model = by_autocast(make("llama"))
    inside = model.forward

    def halved(*args: Any, **kwargs: Any) -> Any:
        out = inside(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    halved.__wrapped__ = inside  # type: ignore[attr-defined]
    model.forward = halved
    with pytest.raises(ValueError, match="do not give its logits"):
        sketches(model)
    assert model.forward is halved


def exact(model: nn.Module, batch: Batch, weights: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Gradients by plain autograd in the model's own arithmetic, a segment at a time, as float64."""
    terms = batch.logprobs(model, use_cache=False) * weights
    rows = batch.segments[batch.positions // batch.input_ids.shape[1]]
    named = dict(model.named_parameters())
    result = []
    for s in range(int(rows.max()) + 1):
        found = torch.autograd.grad(terms[rows == s].sum(), list(named.values()), retain_graph=True)
        result.append({canonical_name(n): g.double() for n, g in zip(named, found)})
    return result


def errors(model: nn.Module, batch: Batch, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative errors against float64, by segment: ours, and those of plain torch with its weights scaled to 1."""
    wide = copy.deepcopy(model).double()
    wide.lm_head.__dict__.pop("forward", None)
    got = sketches(model, batch, weigh=lambda logp, a, b: weights[a:b])
    scale = 2.0 ** -float(torch.log2(weights.abs().max()).ceil())
    right, theirs = (
        torch.stack([sketch_gradients(wide, gradients, SPEC) for gradients in found])
        for found in (exact(wide, batch, weights.double()), exact(model, batch, weights * scale))
    )
    size = right.norm(dim=1)
    return (got - right).norm(dim=1) / size, (theirs / scale - right).norm(dim=1) / size


@pytest.mark.parametrize("dtype", HALF)
def test_a_float32_head_on_a_half_precision_decoder(dtype: torch.dtype) -> None:
    """As TRL's cast_lm_head_to_fp32 makes it."""
    model = make("llama", dtype)
    head: Any = model.lm_head.float()
    head.forward = lambda hidden: nn.functional.linear(hidden.float(), head.weight)
    ours, theirs = errors(model, padded(), weights_of(padded()))
    assert bool((ours <= 2 * theirs).all())


def test_mixed_dtypes_that_run_under_autocast_alone_are_an_error_that_says_so() -> None:
    model = make("llama", torch.bfloat16)
    model.model.norm.float()
    with pytest.raises(
        ValueError, match="does not run in the precision of its weights.*torch.bfloat16, torch.float32"
    ):
        sketches(by_accelerate(model))


def test_weights_that_are_not_on_one_device_are_an_error() -> None:
    model = make("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match="meta device.*device_map=None"):
        sketches(model)


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        return x * (score > 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class Gated(nn.Module):
    """The gate's own weights have no gradient at all: None, which autograd takes as zero."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.score = base, nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Gate.apply(self.base(x), self.score(x))
        return out


def test_no_gradient_at_all_is_a_zero() -> None:
    model, batch = make("llama"), padded()
    torch.manual_seed(5)
    model.model.layers[0].mlp = Gated(model.model.layers[0].mlp)
    wide = copy.deepcopy(model).double()
    named = {canonical_name(n): p for n, p in wide.named_parameters()}
    loss = (batch.logprobs(wide) * weights_of(batch)).sum()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    right = sketch_gradients(
        wide, {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found)}, SPEC
    )
    got = sketches(model, batch).sum(0)
    assert float((got - right).norm() / right.norm()) < 1e-5
    with GradientSketcher(model, SPEC) as sketcher:
        got = batch.through(sketcher, model).sum(0)
    assert float((got - right).norm() / right.norm()) < 1e-5


def test_merged_adapters_are_an_error_and_unmerged_ones_are_not() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("llama"), config).eval()
    expected = sketches(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: the adapter 'default' is merged.*unmerge_adapter"):
        sketches(model)
    model.unmerge_adapter()
    torch.testing.assert_close(sketches(model), expected, rtol=1e-4, atol=1e-5)


def test_a_head_on_other_features_than_the_decoders_is_named() -> None:
    """Electra: a head of its own stands between."""
    import transformers

    config = transformers.ElectraConfig(
        vocab_size=97, embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, is_decoder=True,
    )  # fmt: skip
    model = transformers.ElectraForCausalLM(config).eval()
    with pytest.raises(
        ValueError, match="hidden states of Electra.* have 32 features, and its head takes 16.*sketcher.batch"
    ):
        sketches(model)


# ------------------------------------------------------------------------------------------ small weights
def response(length: int) -> Batch:
    """Two prompts of 4 tokens with a response each, of ``length`` and of half as many tokens."""
    ids = torch.randint(3, 97, (2, 4 + length), generator=torch.Generator().manual_seed(length))
    rows = [(0, length), (1, length // 2)]
    positions = torch.cat([torch.arange(3, 3 + n) + row * (3 + length) for row, n in rows])
    targets = torch.cat([ids[row, 4 : 4 + n] for row, n in rows])
    return Batch(ids[:, :-1].clone(), torch.tensor([0, 1]), positions, targets, torch.ones(2, 3 + length))


@pytest.mark.parametrize("length", [8, 128, 1024])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_does_not_lose_long_responses(dtype: torch.dtype, length: int) -> None:
    """Weights 1 / (8 tokens), as a mean over 8 responses gives; one segment 1000 times smaller than the other."""
    batch = response(length)
    weights = torch.full((len(batch.targets),), 1 / (8 * length))
    weights[length:] /= 1000
    ours, theirs = errors(make("llama", dtype, max_position_embeddings=2048), batch, weights)
    eps = torch.finfo(dtype).eps
    # A gradient passes about 32 roundings a layer, forward and backward, each of at most eps / 2: a random walk.
    assert bool((ours <= eps / 2 * (2 * 32) ** 0.5).all()) and bool((ours <= 2 * theirs).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("power", [-100, -40, 40])
def test_weights_scaled_by_a_power_of_two_give_the_same_bits(dtype: torch.dtype, power: int) -> None:
    model, batch = make("llama-tied", dtype), padded()
    weights = weights_of(batch).to(torch.promote_types(dtype, torch.float32))
    with GradientSketcher(model, SPEC) as sketcher:
        plain = batch.sketch(sketcher, weigh=lambda logp, a, b: weights[a:b])
        scaled = batch.sketch(sketcher, weigh=lambda logp, a, b: weights[a:b] * 2.0**power)
    assert torch.equal(scaled.sketches * 2.0**-power, plain.sketches)
    assert torch.equal(scaled.weights, weights * 2.0**power) and torch.equal(plain.weights, weights)


@pytest.mark.long
def test_weights_of_one_segment_do_not_touch_the_bits_of_another_nor_do_zeros() -> None:
    batch = padded()
    weights = weights_of(batch)
    other = weights.clone()
    segment = batch.segments[batch.positions // batch.input_ids.shape[1]]
    other[segment == 1] *= 1e6
    other[segment == 2] = 0.0
    first, second = (
        sketches(make("llama"), batch, weigh=lambda logp, a, b, w=w: w[a:b]) for w in (weights, other)
    )
    assert torch.equal(first[0], second[0]) and not bool(second[2].any())
    other[segment == 1] = torch.nan
    failed = sketches(make("llama"), batch, weigh=lambda logp, a, b: other[a:b])
    assert torch.equal(failed[0], first[0]) and bool(failed[1].isnan().all())


# ------------------------------------------------------------------------------- products of float32 matrices
ON_A_GPU: Any = SimpleNamespace(dtype=torch.float32, is_cuda=True)
MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def older_switch() -> Iterator[Any]:
    """Afterwards, nothing has been chosen by any switch."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = MATMUL.fp32_precision = "none"


@pytest.fixture
def switches(older_switch: Any) -> Any:
    """The newer switch of all backends."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the older switch alone")
    return torch.backends


def test_tf32_is_seen_by_either_switch(switches: Any) -> None:
    """Read the older way, the newer one's choice is a RuntimeError: transformers makes it for every GPU with tf32."""
    assert product_eps(ON_A_GPU) == 2.0**-23
    switches.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        MATMUL.allow_tf32  # noqa: B018
    assert product_eps(ON_A_GPU) == 2.0**-10
    MATMUL.fp32_precision = "ieee"
    assert product_eps(ON_A_GPU) == 2.0**-23
    MATMUL.fp32_precision = "none"
    switches.fp32_precision = "none"
    MATMUL.allow_tf32 = True
    assert product_eps(ON_A_GPU) == 2.0**-10
    half = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)
    assert product_eps(half) == 2.0**-7  # type: ignore[arg-type]


def test_products_of_a_cpu_in_bfloat16_are_seen(switches: Any) -> None:
    assert product_eps(torch.zeros(1)) == 2.0**-23 and product_eps(torch.zeros(1).double()) == 2.0**-52
    torch.set_float32_matmul_precision("medium")
    assert product_eps(torch.zeros(1)) == 2.0**-7


def test_products_of_a_cpu_in_bfloat16_are_seen_by_the_older_switch(
    older_switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in torch 2.6, whose oneDNN has no switch of its own."""
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    for chosen, eps in ("high", 2.0**-23), ("medium", 2.0**-7), ("highest", 2.0**-23):
        older_switch(chosen)
        assert product_eps(torch.zeros(1)) == eps


def test_sketches_where_transformers_has_chosen_tf32(switches: Any) -> None:
    wanted = sketches(make("llama", torch.float32))
    switches.fp32_precision = "tf32"
    assert torch.equal(sketches(make("llama", torch.float32)), wanted)


class Tf32(TorchFunctionMode):
    """Products of float32 matrices as a GPU with tf32 makes them: operands have 10 bits behind the point. A product
    with a vector stays exact."""

    PRODUCTS = (nn.functional.linear, torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS and all(x.dtype == torch.float32 and x.ndim > 1 for x in args[:2]):
            args = (*map(self.rounded, args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x: torch.Tensor) -> torch.Tensor:
        bits = x.detach().contiguous().view(torch.int32)
        near = ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)
        return x + (near - x).detach()


def test_a_head_whose_forward_was_replaced_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's ``cast_lm_head_to_fp32`` puts a function in place of the head's own, and its trainers turn tf32 on."""
    want = sketches(make("llama"))
    for module in (again, measure, precision, recognise):
        monkeypatch.setattr(
            module, "product_eps", lambda x: 2.0**-10 if x.dtype == torch.float32 else 2.0**-52
        )
    model = make("llama")
    head = model.lm_head
    head.forward = lambda h: nn.functional.linear(h.to(torch.float32), head.weight)
    with Tf32():
        got = sketches(model)
    assert 0 < (got - want).norm() <= 1e-2 * want.norm()
    head.forward = lambda h: nn.functional.linear(h, head.weight) * 1.01
    assert recognise.is_linear(model.model.layers[0].mlp.up_proj) and not recognise.is_linear(head)
