"""Models of equal weights are told apart by their configurations, adapters and buffers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.versions import checkpoint_layers

from cropi.errors import CropiError
from cropi.model.fingerprint import model_fingerprint
from cropi.model.policy import Policy
from cropi.model.settings import model_settings
from cropi.ranking.influence import influence
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.differences import first_difference
from cropi.store.merging import merge
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

SPEC = SketchSpec(512)
IDS = torch.tensor([[5, 9, 11, 7, 20, 31, 8, 15, 42, 3]])
MOE = {"num_local_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
# Family and settings, each of which changes what a model of the same weights computes.
CHANGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "base of RoPE": ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "scaled RoPE": (
        "llama", {}, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "activation": ("llama", {}, {"hidden_act": "gelu"}),
    "epsilon": ("llama", {}, {"rms_norm_eps": 0.1}),
    "window": ("mistral", {"sliding_window": None}, {"sliding_window": 4}),
    "types of layers": (
        "gemma2", {"sliding_window": 4}, {"layer_types": ["full_attention", "full_attention"]},
    ),
    "cap of attention": ("gemma2", {"query_pre_attn_scalar": 1}, {"attn_logit_softcapping": 0.05}),
    "cap of logits": ("gemma2", {}, {"final_logit_softcapping": 0.5}),
    "scale of attention": ("gemma2", {}, {"query_pre_attn_scalar": 1}),
    "scale of logits": ("granite", {}, {"logits_scaling": 4.0}),
    "experts a token": ("qwen3_moe", MOE, {"num_experts_per_tok": 1}),
    "their weights": ("qwen3_moe", MOE | {"norm_topk_prob": True}, {"norm_topk_prob": False}),
}  # fmt: skip


def twins(kind: str, given: dict[str, Any], changes: dict[str, Any]) -> tuple[Any, Any]:
    """Two models of equal weights, the second with changed settings."""
    first, second = (make_model(kind, **(given | more)) for more in ({}, changes))
    second.load_state_dict(first.state_dict())
    return first, second


@torch.no_grad()
def farthest(first: Any, second: Any) -> float:
    return float((first(input_ids=IDS).logits - second(input_ids=IDS).logits).abs().max())


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_the_output_is_named(name: str) -> None:
    kind, given, changes = CHANGES[name]
    first, second = twins(kind, given, changes)
    assert farthest(first, second) > 1e-3
    one, other = ({"model": model_fingerprint(model)} for model in (first, second))
    assert one["model"]["weights"] == other["model"]["weights"]
    differs = first_difference(one, other)
    assert differs is not None and differs.field == "model.config" and set(changes) <= differs.left.keys()
    assert json.loads(json.dumps(one)) == one


def test_settings_that_change_no_gradient_are_left_out() -> None:
    model = make_model("qwen3_moe", **MOE)
    first, before = Policy(model), copy.deepcopy(model.config)
    made = first.fingerprint
    model.config.use_cache, model.config.pad_token_id, model.config.name_or_path = False, 7, "elsewhere"
    model.config.attention_dropout = model.config.router_aux_loss_coef = model.config.initializer_range = 0.5
    model.config.output_router_logits = True
    model.set_attn_implementation("eager")
    checkpoint_layers(model)
    assert model.config.to_dict() != before.to_dict() and first.fingerprint == made
    model.config.norm_topk_prob = not model.config.norm_topk_prob
    assert first.fingerprint["config"] != made["config"], "a policy notices what is changed later"


@pytest.mark.long
def test_a_store_of_other_settings_is_refused_and_the_settings_are_named(tmp_path: Path) -> None:
    first, second = twins("mistral", {"sliding_window": None}, {"sliding_window": 4, "rms_norm_eps": 0.01})
    policies = [Policy(model, make_tokenizer()) for model in (first, second)]
    jobs = {}
    for number, name in enumerate(("train", "valid")):
        path = write_lines(tmp_path / f"{name}.jsonl", make_records(6, seed=number))
        jobs[name] = SketchJob([path], tmp_path / name, SPEC)
        sketch(policies[number], jobs[name], progress=False)
    named = r"model.config = \{'rms_norm_eps': 1e-06, 'sliding_window': None\}.*'rms_norm_eps': 0.01, 'sliding_window'"
    with pytest.raises(CropiError, match=f"was made with {named}"):
        sketch(policies[1], jobs["train"], progress=False)
    stores = [SketchStore.open(tmp_path / name) for name in jobs]
    with pytest.raises(CropiError, match=f"cannot be compared: {named}"):
        influence(stores[0], [stores[1]])


@pytest.mark.long
def test_another_release_of_transformers_may_know_other_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(make_model(), make_tokenizer())
    jobs = []
    for number in range(2):
        path = write_lines(tmp_path / f"{number}.jsonl", make_records(6, seed=number))
        jobs.append(SketchJob([path], tmp_path / str(number), SPEC))
    config = {key: value for key, value in model_settings(policy.model).items() if key != "mlp_bias"}
    with monkeypatch.context() as other_release:
        other_release.setattr(
            "cropi.model.policy.model_settings", lambda model: {**config, "a_new_scale": 1.0}
        )
        sketch(policy, jobs[0], progress=False)
    sketch(policy, jobs[1], progress=False)
    assert sketch(policy, jobs[0], progress=False).resumed == 6
    stores = [SketchStore.open(tmp_path / str(number)) for number in range(2)]
    assert stores[0].manifest["model"]["config"] == {**config, "a_new_scale": 1.0}
    influence(*reversed(stores[:1]), [stores[1]])
    merged = merge(tmp_path / "both", stores)
    assert len(merged) == 12 and merged.manifest["model"] in [store.manifest["model"] for store in stores]
    assert len(merge(tmp_path / "both", stores)) == 12


def test_buffers_of_a_checkpoint_count() -> None:
    class Corrected(torch.nn.Module):
        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("e_score_correction_bias", torch.zeros(4))
            self.register_buffer("inv_freq", torch.ones(2), persistent=False)

    model = Corrected()
    policy = Policy(model)
    first = policy.fingerprint
    model.inv_freq.mul_(2)
    assert policy.fingerprint == first
    model.e_score_correction_bias[3] = 1e-3
    now = policy.fingerprint
    assert now["weights"] == first["weights"] and now["buffers"] != first["buffers"]
    differs = first_difference({"model": first}, {"model": now})
    assert differs is not None and differs.field == "model.buffers"
    assert (
        first_difference({"model": {k: v for k, v in first.items() if k != "buffers"}}, {"model": now})
        is None
    )


@pytest.mark.long
def test_settings_of_an_adapter_are_named() -> None:
    peft = pytest.importorskip("peft")
    made = []
    for scale in (8, 16):
        config = peft.LoraConfig(
            r=2, lora_alpha=scale, target_modules=["v_proj", "q_proj"], init_lora_weights=False
        )
        torch.manual_seed(0)
        made.append(Policy(peft.get_peft_model(make_model(), config).eval()))
    assert farthest(made[0].model, made[1].model) > 1e-3
    differs = first_difference(*({"model": policy.fingerprint} for policy in made))
    assert differs is not None and differs.left == {"adapter.default.lora_alpha": 8}
    with made[0].model.disable_adapter():
        assert not any(key.startswith("adapter.") for key in made[0].fingerprint["config"])
