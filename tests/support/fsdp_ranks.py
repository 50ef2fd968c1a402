"""One rank of a job on a sharded model: `tests/sketcher/test_sharded.py` starts two. Prints what it found, as JSON.

PYTHONPATH=tests python tests/support/fsdp_ranks.py CASE ...       with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from cropi_kernels import GradientSketcher, LiveSketcher, SketchSpec, canonical_name, token_logprobs
from support import moe, odd_models, seeing, zoo
from support.launch import as_rank
from support.seeing import Seeing
from support.tensors import off
from support.versions import checkpoint_layers

SPEC = SketchSpec(width=16, vocab_width=64)
GROUPS = {"first": ["*layers.0.*"], "norms": ["*.1.*norm*"], "others": ["rest"]}


def layers_and_root(model: Any, **options: Any) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def root_resharded(model: Any) -> None:
    layers_and_root(model, reshard_after_forward=True)


def head_alone(model: Any) -> None:
    fully_shard(model.lm_head)
    layers_and_root(model)


def norm_and_head(model: Any) -> None:
    """As transformers' own plan groups them."""
    fully_shard(model.model.embed_tokens)
    fully_shard([model.model.norm, model.lm_head])
    layers_and_root(model)


def decoder_alone(model: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.model)


def offloaded(model: Any) -> None:
    layers_and_root(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def compiled(model: Any) -> None:
    """Layers, not the root: FSDP2's hooks are not part of a graph."""
    layers_and_root(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")


def mixed(model: Any) -> None:
    layers_and_root(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


WAYS = {
    f.__name__: f
    for f in (
        layers_and_root, root_resharded, head_alone, norm_and_head, decoder_alone, offloaded, compiled, mixed,
    )
}  # fmt: skip
MODELS = {"llama": lambda: zoo.make("llama"),
          "llama-one": lambda: zoo.make("llama", num_hidden_layers=1),
          "llama-lora": lambda: lora_on_the_head(zoo.make("llama")),
          "llama-tied": lambda: zoo.make("llama-tied"),
          "gemma2": lambda: zoo.make("gemma2"), "qwen3_moe": lambda: moe.small("qwen3_moe")}  # fmt: skip


def lora_on_the_head(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()  # type: ignore[arg-type]


def batch_for(rank: int) -> zoo.Batch:
    """Every rank has prompts of its own: sketches need no communication."""
    return (zoo.padded, zoo.packed)[rank]()


def gathered(model: nn.Module) -> int:
    """Numbers of parameters that this rank holds whole though they should be sharded."""
    return sum(p.numel() for p in model.parameters() if not hasattr(p, "placements"))


def bfloat16_sketches(model: nn.Module, batch: zoo.Batch) -> torch.Tensor:
    with GradientSketcher(model.to(torch.bfloat16), SPEC) as sketcher:
        return batch.sketch(sketcher).sketches


def by_groups(model: nn.Module, batch: zoo.Batch) -> torch.Tensor:
    """Sketches of one unit's parameters, of some of another's, and of the rest."""
    with GradientSketcher(model, SPEC, groups=GROUPS, verify=False) as sketcher:
        made = [batch.sketch(sketcher).sketches, batch.through(sketcher, model, use_cache=False)]
    return torch.stack(made).view(2, -1, len(GROUPS), SPEC.dim)


def run(model_name: str, way: str, rank: int) -> dict[str, Any]:
    plain, model, batch = MODELS[model_name](), MODELS[model_name](), batch_for(rank)
    checkpointed = model_name == "llama-tied"
    for m in (plain, model):
        if checkpointed:
            checkpoint_layers(m.train(), {"use_reentrant": False})
    whole = gathered(model)
    with GradientSketcher(plain, SPEC, verify=False) as sketcher:  # other tests say that it is right
        want = batch.sketch(sketcher).sketches
        want_batch = batch.through(sketcher, plain, use_cache=False)
    groups = by_groups(plain, batch) if model_name == "llama-tied" else None
    half = off(bfloat16_sketches(plain, batch), want) if way == "mixed" else 0.0
    WAYS[way](model)
    results, held, tested = [], [], []
    # The self-test runs layers in many ways, each a graph: a compiled model is tried without.
    compiling = way == "compiled"
    with GradientSketcher(model, SPEC, verify=not compiling) as sketcher:
        for _ in range(3):
            results.append(batch.sketch(sketcher).sketches)
            held.append(gathered(model))
            tested.append(set(sketcher.self_test.names) if sketcher.self_test else set())
        zoo.fail_in_weights(sketcher, batch)
        results.append(batch.sketch(sketcher).sketches)
        of_batch = batch.through(sketcher, model, use_cache=False)
        zoo.fail_in_block(sketcher, model, batch)
        results.append(batch.sketch(sketcher).sketches)
    arguments = dict(positions=batch.positions, targets=batch.targets, attention_mask=batch.attention_mask)
    logp, own = (
        token_logprobs(m, batch.input_ids, position_ids=batch.position_ids, **arguments)
        for m in (model, plain)
    )
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    names = {canonical_name(n) for n, p in model.named_parameters() if p.requires_grad}
    wanted = [n for n, p in plain.named_parameters() if p.requires_grad]

    return {
        "bfloat16": half,
        "errors": [off(x, want) for x in results],
        "batch": off(of_batch, want_batch),
        "bits": all(torch.equal(x, want) for x in results) and torch.equal(of_batch, want_batch),
        "groups": groups is not None
        and bool(groups.norm(dim=3).min() > 0)
        and torch.equal(by_groups(model, batch), groups),
        "logp": float((logp - own).abs().max()),
        "held": max(held) / whole,
        "untested": [] if compiling else sorted(names - tested[0]),
        "graphs": torch._dynamo.utils.counters["frames"].get("ok", 0),
        "weight gradients": grads,
        "frozen": [n for n, p in model.named_parameters() if n in wanted and not p.requires_grad],
    }


def raised(act: Callable[[], object]) -> str:
    """The first words of the error, or of none."""
    try:
        act()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def packing(rank: int) -> dict[str, Any]:
    """Rows of several sequences beside a mask, under which the model does not keep them apart; on one of the ranks, or
    where the mask is left out, nothing mixes."""
    model, packed, padded = zoo.make("llama"), zoo.packed(), zoo.padded()
    layers_and_root(model)
    each = padded.segments[:, None].repeat(1, padded.input_ids.shape[1])
    alone = dataclasses.replace(padded, segments=each)
    ones = torch.ones_like(packed.input_ids)
    mixed = dataclasses.replace(packed, attention_mask=ones)
    mine = alone if rank == 0 else mixed
    found: dict[str, Any] = {}
    with GradientSketcher(model, SPEC) as sketcher:
        # The first two say nothing, so that the third is looked at.
        first, second, *found["batch"] = [
            raised(lambda b=b: b.through(sketcher, model, use_cache=False))
            for b in (padded, padded, mine, packed)
        ]
        assert not first and not second
    for p in model.parameters():
        p.requires_grad_(True)
    with LiveSketcher(model, SPEC) as live:

        def step(batch: zoo.Batch) -> None:
            with live.batch(batch.segments):
                (batch.logprobs(model, use_cache=False) * zoo.weights_of(batch)).sum().backward()

        found["live"] = [raised(lambda b=b: step(b)) for b in (mine, packed)]
    given = dict(positions=packed.positions, targets=packed.targets, position_ids=packed.position_ids)
    plain = token_logprobs(model, packed.input_ids, **given)  # type: ignore[arg-type]
    whole = token_logprobs(zoo.make("llama"), packed.input_ids, **given)  # type: ignore[arg-type]
    found["logp"] = float((plain - whole).abs().max())
    found["token_logprobs"] = raised(
        lambda: token_logprobs(model, packed.input_ids, attention_mask=ones, **given)  # type: ignore[arg-type]
    )
    return found


def longer(rank: int) -> dict[str, Any]:
    """Packed rows that are longer than those that every model is measured on: of one rank, and of both where the model
    scales queries of long rows by the column."""
    ids = torch.randint(3, zoo.VOCAB, (1, 120), generator=torch.Generator().manual_seed(rank))
    found: dict[str, Any] = {"packed": [], "said": []}
    for model, lengths in ((zoo.make("llama"), (24, 120 if rank else 24)), (odd_models.llama4(), (24, 120))):
        layers_and_root(model)
        for length in lengths:
            half = length // 2
            last = torch.tensor([half - 2, length - 2])
            row: dict[str, Any] = dict(
                input_ids=ids[:, :length], position_ids=torch.arange(half).repeat(2)[None]
            )
            row |= dict(positions=last, targets=ids[0, last + 1])
            rest: dict[str, Any] = dict(
                segments=torch.arange(2).repeat_interleave(half)[None], weights=torch.ones(2)
            )
            with GradientSketcher(model, SPEC) as sketcher:
                acts = (
                    partial(sketcher.policy_gradient, **row, **rest),
                    partial(token_logprobs, model, **row),
                )
                found["said"].append([raised(act) for act in (*acts, *acts)])
            assert sketcher.probe is not None
            found["packed"].append(sketcher.probe.packed)
    return found


def images(rank: int) -> list[bool]:
    """Batches with images behind one without: of one rank alone, and of both, which have one segment and four."""
    plain, model = Seeing(), Seeing()
    fully_shard(model)
    segments = torch.arange(seeing.ROWS) * rank
    found = []
    with (
        GradientSketcher(plain, seeing.SPEC, verify=False) as whole,
        GradientSketcher(model, seeing.SPEC) as sketcher,
    ):
        for step, seen in enumerate((False, rank == 0, True, rank == 1)):
            both = []
            for one, run in ((whole, plain), (sketcher, model)):
                with one.batch(segments, shape=(seeing.ROWS, seeing.LENGTH)) as got:
                    seeing.loss_of(run, step, seen).backward()
                both.append(got.sketches)
            assert sketcher.self_test is not None
            found += [torch.equal(*both), "tower.weight" in sketcher.self_test.names]
    return found


CASES = {"packing": packing, "longer": longer, "images": images}

if __name__ == "__main__":
    as_rank(
        lambda: {
            case: CASES[case](dist.get_rank()) if case in CASES else run(*case.split(":"), dist.get_rank())
            for case in sys.argv[1:]
        }
    )
