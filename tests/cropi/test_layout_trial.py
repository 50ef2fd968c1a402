"""Sharing a row between responses is tried as it will be used: on long rows, in float32, against measured rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.made_data import make_tokenizer, write_lines
from support.stores import sketches_of
from support.zoo import FAMILIES, SIZES, make, moved

import cropi
from cropi.errors import CropiError
from cropi.gradient.layout import choose_layout, layout_of
from cropi.gradient.layout_trial import LayoutTrial, difference, in_float32, one_unit_off
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi_kernels import SketchSpec

HALF = (torch.float16, torch.bfloat16)
ALL = (torch.float32, *HALF)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def row(prompt: int, *responses: int) -> tuple[list[int], list[list[int]]]:
    return ids(prompt), [ids(n, k + 1) for k, n in enumerate(responses)]


def build(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, name + "Config")(**{**SIZES, **IDS, **config})
    model = getattr(transformers, name.removesuffix("Text") + "ForCausalLM")(made).eval()
    torch.manual_seed(1)
    return moved(model, 0.05)


def gpt_neo() -> Any:
    """Every other layer sees the last 64 columns of the row."""
    return build(
        "GPTNeo", hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=64, max_position_embeddings=256,
    )  # fmt: skip


def llama4() -> Any:
    """Queries are scaled by the index in the row, from index 64 on."""
    return build(
        "Llama4Text", max_position_embeddings=512, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
        floor_scale=64, attn_scale=0.1, no_rope_layers=[0, 0], moe_layers=[], attention_chunk_size=256,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("make_one", [gpt_neo, llama4])
def test_what_shows_in_long_rows_only_is_found_there(make_one: Any, dtype: torch.dtype) -> None:
    model = make_one().to(dtype)
    layout = choose_layout(model)
    assert layout.shared, layout.note
    assert layout.trial is not None and layout.trial.passes(*row(12, 10, 9, 11))
    assert not layout.trial.passes(*row(40, 20, 20, 20))
    assert "40 + 60 tokens" in layout.trial.problem and not layout.shares(10, 10, "p")


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("FalconH1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}),
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    ],
)
def test_what_runs_on_from_one_response_into_the_next_is_found_in_every_dtype(
    name: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    layout = choose_layout(build(name, **config).to(dtype))
    assert not layout.shared and "its output changes by up to" in layout.note


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_families_that_share_do_so_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    trial = choose_layout(make(name, dtype)).trial
    assert trial is not None and trial.passes(*row(12, 10, 9, 1, 11)), trial and trial.problem


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    ("name", "config"),
    [("Mixtral", {"num_local_experts": 4}), ("Qwen3Moe", EXPERTS)],
)
def test_experts_share(name: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    trial = choose_layout(build(name, **config).to(dtype)).trial
    assert trial is not None and trial.passes(*row(12, 10, 9, 1, 11)), trial and trial.problem


def test_layers_of_unequal_heads_have_a_cost() -> None:
    """Gemma 4: head_dim differs by layer, and transformers refuses to name one for all."""
    pytest.importorskip("transformers", "5.15")
    model = build(
        "Gemma4Text", head_dim=8, global_head_dim=16, num_global_key_value_heads=2, vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"], sliding_window=16,
    )  # fmt: skip
    layout = choose_layout(model)
    weights = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens.weight" not in name
    )
    assert layout.shared and layout.window == 16
    assert layout.attention_cost == pytest.approx(3.5 * (4 * 8 + 4 * 16) / weights)


def test_experts_cost_what_a_token_goes_through() -> None:
    pytest.importorskip("transformers", "5.0")
    model = build(
        "Qwen3Moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8, decoder_sparse_step=1,
    )  # fmt: skip
    config, named = model.config, dict(model.named_parameters())
    width = config.num_hidden_layers * config.num_attention_heads * 8
    experts = config.num_hidden_layers * 2 * 3 * 24 * config.hidden_size
    others = sum(
        p.numel() for name, p in named.items() if "self_attn" in name or "gate.weight" in name if p.ndim == 2
    )
    assert choose_layout(model).attention_cost == pytest.approx(3.5 * width / (experts + others))


def records(prompt: int, count: int, length: int) -> list[dict[str, Any]]:
    return [
        {"id": f"p{i}", "prompt_ids": ids(prompt, i), "rewards": [float(k % 2) for k in range(count)],
         "response_ids": [ids(length, 10 * i + k) for k in range(count)]}
        for i in range(2)
    ]  # fmt: skip


def sketched(out: Path, model: Any, rows: list[dict[str, Any]], layout: str) -> dict[str, torch.Tensor]:
    path = write_lines(out.with_suffix(".jsonl"), rows)
    job = SketchJob([path], out, spec=SketchSpec(dim=1024), layout=layout)
    sketch(Policy(model, make_tokenizer()), job, progress=False)
    return sketches_of(out)


def test_a_head_of_several_layers_is_named() -> None:
    model = make("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"not a decoder with a linear head \(its head: .*Sequential\)"):
        cropi.sketch(model, records(5, 2, 3), dim=1024, progress=False)


@pytest.mark.long
def test_a_job_tries_its_longest_row_and_falls_back_or_says_so(tmp_path: Path) -> None:
    """Each prompt with a response has 70 tokens, the row of them 190: the local window cuts the prompt off."""
    model, rows = gpt_neo(), records(40, 5, 31)
    with pytest.warns(
        UserWarning, match="prompts are not shared between responses: its output changes by up to"
    ):
        got = sketched(tmp_path / "auto", model, rows, "auto")
    right = sketched(tmp_path / "padded", model, rows, "padded")
    for name, expected in right.items():
        assert float((got[name] - expected).norm() / expected.norm()) < 1e-5
    with pytest.raises(CropiError, match="layout 'shared' does not work for prompt 'p[01]'.*--layout padded"):
        sketched(tmp_path / "shared", model, rows, "shared")


@pytest.mark.long
def test_another_kind_of_attention_is_tried_anew() -> None:
    """One that takes no mask, set on a policy whose layout is known."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def blind(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **options | {"is_causal": True})

    transformers.AttentionInterface.register("blind", blind)
    policy = Policy(make("llama"))
    assert layout_of(policy).shared
    policy.model.set_attn_implementation("blind")
    assert not layout_of(policy).shared
    policy.model.set_attn_implementation("sdpa")
    assert layout_of(policy).shared


def test_a_difference_is_infinite_where_one_side_is_not_finite() -> None:
    """A NaN is larger than no bound: two layouts of which one gives it would pass for equal."""
    nan, inf = float("nan"), float("inf")
    got = torch.tensor([[3.0, 4.5], [nan, 1.0], [1.0, 1.0], [nan, 2.0], [0.0, 0.0], [inf, 0.0]])
    expected = torch.tensor([[3.0, 4.0], [1.0, 1.0], [nan, 1.0], [nan, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert difference(got, expected).tolist() == [0.1, inf, inf, 1.0, 0.0, inf]


def test_a_row_is_tried_once_and_longer_ones_again() -> None:
    model = make("llama")
    calls: list[int] = []
    model.model.register_forward_hook(lambda module, args, out: calls.append(1))
    trial = LayoutTrial(model)
    assert trial.passes(*row(10, 5, 5)) and calls
    before = len(calls)
    assert trial.passes(*row(10, 5, 4)) and trial.passes(*row(14, 3, 2)) and len(calls) == before
    assert trial.passes(*row(10, 6, 5)) and len(calls) > before
    before = len(calls)
    # Not longer, but its last response is further from the prompt.
    assert trial.passes(*row(2, 8, 4)) and len(calls) > before
    before = len(calls)
    # Its last response is no further from the prompt, which is longer: a window may end within it.
    assert trial.passes(*row(30, 3, 2)) and len(calls) > before
    # One token is predicted by the prompt alone: there is nothing to share.
    assert LayoutTrial(model).passes([3, 4], [[], []])


@pytest.mark.parametrize("dtype", HALF)
def test_float32_for_a_while_gives_the_weights_back(dtype: torch.dtype) -> None:
    model = make("llama-tied", dtype)
    wide = make("llama-tied", dtype).float()
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    tokens = torch.arange(8)[None]
    with torch.no_grad(), in_float32(model):
        got = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    assert torch.equal(got, wide.model(input_ids=tokens, use_cache=False).last_hidden_state)

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("in the middle of a layer")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), in_float32(model):
        model.model(input_ids=tokens)
    handle.remove()
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_unit_is_one_unit() -> None:
    layer = torch.nn.Linear(4, 64)
    x = torch.randn(3, 4)
    with one_unit_off(layer):
        moved = layer(x)
    off = ((moved - layer(x)) / layer(x)).abs()
    eps = torch.finfo(torch.float32).eps
    assert bool((off > 0.4 * eps).all()) and bool((off < 1.6 * eps).all())
