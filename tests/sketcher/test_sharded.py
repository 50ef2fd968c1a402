"""FSDP2 on two gloo ranks: the sketches of the unsharded model, in the same bits; other shardings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.launch import found_on_ranks, on_ranks
from support.versions import FSDP2, NAMED_HOOKS
from torch import nn

from cropi_kernels import GradientSketcher, SketchSpec

WORKER = Path(__file__).parents[1] / "support" / "fsdp_ranks.py"
EXACT = (
    "llama:layers_and_root", "llama:root_resharded", "llama:head_alone", "llama:norm_and_head", "llama:decoder_alone",
    "llama:offloaded",
    "llama-lora:layers_and_root", "llama-tied:layers_and_root", "gemma2:layers_and_root", "qwen3_moe:layers_and_root",
)  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two processes for all cases: their start takes as long as a case."""
    return found_on_ranks(
        tmp_path_factory, "sharded", WORKER, *EXACT, "llama:mixed", "packing", "longer", "images"
    )


def left_as_it_was(found: dict[str, Any]) -> bool:
    """No weight gradient, so no gradient communication; all weights trainable again; nothing held whole."""
    return not found["weight gradients"] and not found["frozen"] and not found["untested"]


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_sketches_of_the_unsharded_model(case: str, two: list[dict[str, Any]]) -> None:
    """Each rank on prompts of its own: three passes, one that fails in the middle, two of `batch`, again a pass.

    Of a tied weight also the sketches of groups of parameters.
    """
    for found in (rank[case] for rank in two):
        assert found["bits"] and found["logp"] == 0.0 and left_as_it_was(found), found
        if "decoder_alone" not in case:  # whose head is not part of any unit
            assert found["held"] == 0.0, "weights were whole between passes"
        assert found["groups"] == ("llama-tied" in case), "sketches of groups of parameters: other bits"


@pytest.mark.slow
def test_compiled_layers_on_one_rank() -> None:
    """FSDP2's hooks are outside of the layers' graphs, the taps inside; fused operations round otherwise."""
    ((found,),) = (rank.values() for rank in on_ranks(WORKER, "llama-one:compiled", ranks=1))
    assert found["graphs"] > 20 and 0 < max(*found["errors"], found["batch"]) <= 16 * 2.0**-24, found
    assert left_as_it_was(found), found


@pytest.mark.slow
def test_mixed_precision_costs_what_bfloat16_costs(two: list[dict[str, Any]]) -> None:
    for found in (rank["llama:mixed"] for rank in two):
        assert 0 < max(found["errors"]) <= 2 * found["bfloat16"] < 0.1 and left_as_it_was(found), found


@pytest.mark.slow
def test_rows_of_several_sequences_are_checked(two: list[dict[str, Any]]) -> None:
    """Also where one rank's rows alone hold several: all ranks raise, and none waits for another."""
    said = "what the model gives for the tokens of one segment changes with those of another in its row"
    for found in (rank["packing"] for rank in two):
        assert found["batch"][0].startswith(f"SelfTestError: {said}") and not found["batch"][1]
        assert found["live"][0].startswith(f"CoupledLossError: {said}") and not found["live"][1]
        assert "does not keep apart by position_ids beside an attention_mask" in found["token_logprobs"]
        assert found["logp"] == 0.0


@pytest.mark.slow
def test_longer_rows_are_probed_by_all_ranks(two: list[dict[str, Any]]) -> None:
    """Where one rank alone has them too: each knows afterwards what holds of them."""
    refused = "ValueError: row 0 holds several sequences (position_ids restart in column 60), which the model does not"
    for found in (rank["longer"] for rank in two):
        assert found["packed"][1::2] == [120, 120]
        *right, wrong = found["said"]
        assert not any(map(any, right)) and all(said.startswith(refused) for said in wrong)


@pytest.mark.slow
def test_taps_that_both_ranks_reach_are_tested_then(two: list[dict[str, Any]]) -> None:
    """A test forms gradients, which FSDP2 expects of all ranks: it waits for a batch that reaches the taps on each."""
    for found in (rank["images"] for rank in two):
        assert all(found[::2]), "sketches of the unsharded model"
        assert found[1::2] == [False, False, True, True]


# ------------------------------------------------------------------------------------------- refused in words
def refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientSketcher(model, SketchSpec())
    assert all(p.requires_grad for p in model.parameters())


def test_tensor_parallel_within_another_sharding_is_refused(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model, mesh = zoo.make("llama"), init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "tp"))
    norm = model.model.norm  # type: ignore[union-attr]
    norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Replicate(), Shard(0)]))
    refused(model, r"model.norm.weight is spread over ranks by tensor parallel within another sharding")


@NAMED_HOOKS
def test_onednn_by_name_is_refused_where_weights_are_sharded(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.fsdp import fully_shard

    model = zoo.make("llama")
    fully_shard(model)
    with pytest.raises(
        ValueError, match="linears='onednn' packs whole weights, and this model's are sharded"
    ):
        GradientSketcher(model, SketchSpec(), linears="onednn")
    monkeypatch.setenv("CROPI_KERNELS_LINEARS", "onednn")
    refused(model, "CROPI_KERNELS_LINEARS=onednn packs whole weights, and this model's are sharded")


@pytest.mark.parametrize("axis, kind", [("pp", "pipeline"), ("cp", "context"), ("ep", "expert")])
def test_other_meshes_are_refused(axis: str, kind: str, one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    model, mesh = zoo.make("llama"), init_device_mesh("cpu", (1,), mesh_dim_names=(axis,))
    norm = model.model.norm  # type: ignore[union-attr]
    norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Replicate()]))
    refused(model, f"model.norm.weight is spread over ranks by {kind} parallel")


def test_fsdp1_is_refused(one_rank: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(zoo.make("llama"), device_id=torch.device("cpu"), use_orig_params=True)
    refused(
        model, "wrapped by FullyShardedDataParallel .FSDP1.: shard the model by torch.distributed.fsdp.fully"
    )


def test_deepspeed_is_refused() -> None:
    model = zoo.make("llama")
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    refused(model, "sharded by DeepSpeed .ZeRO-3.: shard the model by")

    class DeepSpeedEngine(nn.Module):
        """As it holds a model up to ZeRO-2."""

        def __init__(self) -> None:
            super().__init__()
            self.module = zoo.make("llama")

    refused(
        DeepSpeedEngine(), "DeepSpeedEngine holds DeepSpeed's engine: give the model inside, engine.module"
    )


def test_the_units_of_an_older_torch_are_refused(one_rank: None) -> None:
    """Their class has other methods: taken for a tensor-parallel model's, they would be followed as it is."""
    model = zoo.make("llama")
    methods = dict.fromkeys(("unshard", "reshard", "set_reshard_after_backward"), lambda self: None)
    model.model.__class__ = type("FSDPLlamaModel", (type(model.model),), methods)
    refused(model, "LlamaForCausalLM is sharded by the FSDP2 of torch .*: install a newer torch")


@FSDP2
def test_a_tied_weight_that_was_taken_apart_is_refused(one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = zoo.make("llama-tied")
    fully_shard(model.model)  # type: ignore[arg-type]
    refused(model, "tied by its configuration, but fully_shard has taken them apart: shard the whole model")
