"""One rank of a tensor-parallel job: `tests/sketcher/test_tensor_parallel.py` starts several. Prints what it found.

PYTHONPATH=tests python tests/support/tp_ranks.py CASE ...       with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers.distributed import DistributedConfig

from cropi_kernels import GradientSketcher, SketchSpec, token_logprobs
from support import moe, zoo
from support.launch import as_rank
from support.tensors import off

SPEC = SketchSpec(width=16, vocab_width=64)
LAYER = "model.layers.*."


def attention_and_mlp(**reduced: Any) -> dict[str, Any]:
    outer = [LAYER + f"self_attn.{k}_proj" for k in "qkv"] + [LAYER + f"mlp.{k}_proj" for k in ("gate", "up")]
    inner = [LAYER + "self_attn.o_proj", LAYER + "mlp.down_proj"]
    return {name: ColwiseParallel() for name in outer} | {name: RowwiseParallel(**reduced) for name in inner}


def by_hand() -> dict[str, Any]:
    return attention_and_mlp() | {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }


def ends_by_features() -> dict[str, Any]:
    """Embeddings and a head of which a rank has some features of all words."""
    whole = {"output_layouts": Replicate()}
    return by_hand() | {
        "model.embed_tokens": ColwiseParallel(**whole),
        "lm_head": RowwiseParallel(input_layouts=Replicate(), **whole),
    }


def head_norms() -> dict[str, Any]:
    """Norms of this rank's heads: a DTensor of heads, whose gradients torch adds over the ranks."""
    heads = {LAYER + f"self_attn.{k}_proj": ColwiseParallel(use_local_output=False) for k in "qk"}
    norms = {
        LAYER + f"self_attn.{k}_norm": SequenceParallel(sequence_dim=2, use_local_output=True) for k in "qk"
    }
    return by_hand() | heads | norms


def sequence_parallel() -> dict[str, Any]:
    """Between attention and MLP every rank has some tokens of each row."""
    tokens = dict(output_layouts=Shard(1), use_local_output=False)
    norms = {
        name: SequenceParallel() for name in (LAYER + "input_layernorm", LAYER + "post_attention_layernorm")
    }
    whole = {"hidden_states": Replicate()}
    return (
        attention_and_mlp(**tokens)
        | norms
        | {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **tokens),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
            LAYER + "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts=whole
            ),
            LAYER + "mlp": PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            ),
        }
    )


PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (by_hand, ends_by_features, head_norms, sequence_parallel)
}


def make(name: str) -> nn.Module:
    if name.startswith("moe-"):
        return moe.small(name[4:])
    heads = {} if dist.get_world_size() < 4 else {"num_key_value_heads": 4}  # at least one a rank
    return zoo.make(name, **heads)


def spread(model: nn.Module, way: str, mesh: DeviceMesh) -> nn.Module:
    if way in PLANS:
        return parallelize_module(model, mesh, PLANS[way]())
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])  # type: ignore[operator]
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    loaded = type(model).from_pretrained(folder[0], distributed_config=config)  # type: ignore[attr-defined]
    return loaded.eval()  # type: ignore[no-any-return]


def widened(model: nn.Module) -> nn.Module:
    """In float64, which the grouped kernels of experts do not take."""
    return moe.eager(model.double()) if hasattr(model.config, "num_experts_per_tok") else model.double()


def found_on(case: str, mesh: DeviceMesh) -> dict[str, Any]:
    name, way = case.split(":")
    batch, plain = zoo.padded(), make(name)
    exact = zoo.sketches(plain, zoo.gradients(widened(plain)), SPEC).float()
    plain = make(name)
    with GradientSketcher(plain, SPEC, verify=False) as sketcher:  # other tests say that it is right
        own = batch.sketch(sketcher)
        own_batch = batch.through(sketcher, plain, use_cache=False)
    model = spread(make(name), way, mesh)
    with GradientSketcher(model, SPEC) as sketcher:
        tested = []
        results = []
        for _ in range(3):
            results.append(batch.sketch(sketcher))
            tested.append(sketcher.self_test)
        zoo.fail_in_weights(sketcher, batch)
        results.append(batch.sketch(sketcher))
        of_batch = [batch.through(sketcher, model, use_cache=False)]
        zoo.fail_in_block(sketcher, model, batch)
        of_batch.append(batch.through(sketcher, model, use_cache=False))
    logp = token_logprobs(
        model,
        batch.input_ids,
        positions=batch.positions,
        targets=batch.targets,
        attention_mask=batch.attention_mask,
    )
    wanted = {n for n, p in model.named_parameters()}
    return {
        "case": case,
        "error": max(off(r.sketches, exact) for r in results),
        "own error": off(own.sketches, exact),
        "batch error": max(off(r, exact) for r in of_batch),
        "own batch error": off(own_batch, exact),
        "repeats": all(torch.equal(r.sketches, results[0].sketches) for r in results)
        and torch.equal(*of_batch),
        "logp": max(float((r.logprobs - own.logprobs).abs().max()) for r in results),
        "token_logprobs": float((logp - own.logprobs).abs().max()),
        "untested": sorted(wanted - set(tested[0].names if tested[0] else ())),
        "weight gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "spread": sum(hasattr(p, "placements") for p in model.parameters()),
        "sum": float(results[0].sketches.double().sum()),
    }


def errors(mesh: DeviceMesh) -> dict[str, str]:
    """What is refused, in words, on every rank."""
    rank, batch, found = dist.get_rank(), zoo.padded(), {}
    model = spread(zoo.make("llama"), "by_hand", mesh)

    def tried(name: str, run: Callable[[], object]) -> None:
        try:
            run()
        except ValueError as error:
            found[name] = str(error)

    tried("spec", lambda: GradientSketcher(model, SketchSpec(width=16, vocab_width=64, seed=rank)))
    tried("groups", lambda: GradientSketcher(model, SPEC, groups={"all": ["*"]}))
    with GradientSketcher(model, SPEC) as sketcher:
        other = batch.input_ids.clone()
        other[0, 0] += rank
        tried("batch", lambda: batch.sketch(sketcher, input_ids=other))
        found["after"] = str(bool(batch.sketch(sketcher).sketches.isfinite().all()))
    loose = by_hand()
    # The head norms of Qwen3 see this rank's heads: each rank has a gradient of its own of what all have.
    model = parallelize_module(zoo.make("qwen3"), mesh, loose)

    def run() -> None:
        with GradientSketcher(model, SPEC) as sketcher:
            batch.sketch(sketcher)

    tried("apart", run)
    return found


def found_here() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {case: errors(mesh) if case == "errors" else found_on(case, mesh) for case in sys.argv[1:]}


if __name__ == "__main__":
    as_rank(found_here)
