"""A whole model (random weights, Qwen2.5-1.5B's shape): forward + backward + sketch of everything, against plain steps
and against the loops that people run per prompt.

``model.py 7b``: Qwen2.5-7B's shape, with 8192 tokens, against plain steps with frozen weights. ``model.py moe``: eight
of the 48 layers of Qwen3-30B-A3B's shape, with 16k tokens, likewise."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import torch

from cropi_kernels import GradientSketcher, SketchSpec, logprob_and_grad
from cropi_kernels.sketcher.batch.host import sent

LENGTH, ROWS = 1024, 16  # 16k tokens, 16 prompts
WIDTHS = (64, 128, 256)
# Of the dense projection: its size, coordinates drawn at once, blocks measured.
DIM, BLOCK, BLOCKS = 32768, 4096, 32
SHAPE = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip

SHAPE_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
SHAPE_MOE = {
    "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip
ROWS_7B = 8
TURNS = 3


def build(shape: dict[str, Any] | None = None) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = shape or SHAPE
    made, of = (
        (Qwen3MoeForCausalLM, Qwen3MoeConfig) if "num_experts" in shape else (Qwen2ForCausalLM, Qwen2Config)
    )
    config = of(**shape, max_position_embeddings=4096)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = made(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.config._attn_implementation = "sdpa"
    return model.train()


def batch(rows: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """On the host first, as a job makes it, so that no pass waits for its values."""
    length, device = length or LENGTH, torch.empty(0, device="cuda").device
    ids = torch.randint(0, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    at = torch.arange(rows * length).view(rows, length)[:, :-1].reshape(-1)
    return {
        "input_ids": sent(device, ids),
        "positions": sent(device, at),
        "targets": sent(device, ids[:, 1:].reshape(-1)),
        "segments": torch.arange(rows),
    }


def plain_step(model: Any, data: dict[str, torch.Tensor]) -> None:
    """Forward and backward by autograd. The head's part is our own one-pass op for every contestant alike, so that the
    logits never exist at once; a trainable head gets its weight gradient from the same chunks."""
    embedded = model.get_input_embeddings()(data["input_ids"])
    if not embedded.requires_grad:
        embedded.requires_grad_(True)
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    flat, head = hidden.detach().reshape(-1, hidden.shape[-1]), model.lm_head.weight
    picked = flat[data["positions"]]
    head_gradient = torch.zeros_like(head) if head.requires_grad else None

    def add(begin: int, end: int, dz: torch.Tensor) -> None:
        assert head_gradient is not None
        head_gradient.addmm_(dz.t().to(head.dtype), picked[begin:end])  # a GPU gives the dtype already

    _, gradient, _ = logprob_and_grad(
        picked, head.detach(), data["targets"], lambda p, a, b: torch.ones_like(p),
        on_dlogits=None if head_gradient is None else add,
    )  # fmt: skip
    whole = torch.zeros_like(flat)
    whole[data["positions"]] = gradient
    hidden.backward(whole.view_as(hidden))
    if head_gradient is not None:
        head.grad = head_gradient if head.grad is None else head.grad.add_(head_gradient)


def measure(run: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    return {"ms": common.milliseconds(run, repeats=repeats, warm=1), "extra_gb": common.peak_bytes(run) / 1e9}


def main() -> None:
    size = sys.argv[1] if sys.argv[1:] in (["7b"], ["moe"]) else ""
    results = common.Results(f"model_{size}" if size else "model")
    shape, n_rows = {"": (SHAPE, ROWS), "7b": (SHAPE_7B, ROWS_7B), "moe": (SHAPE_MOE, ROWS)}[size]
    model, data = build(shape), batch(n_rows)
    weigh = lambda logp, start, stop: torch.ones_like(logp)  # noqa: E731

    def frozen() -> dict[str, Any]:
        model.requires_grad_(False)
        return measure(lambda: plain_step(model, data))

    def trained() -> dict[str, Any]:
        model.requires_grad_(True)
        return measure(lambda: (plain_step(model, data), model.zero_grad(set_to_none=True)))

    def sketched(width: int, fused: bool = False) -> dict[str, Any]:
        """In turns with a plain pass: passes of either kind, then of the other."""
        model.zero_grad(set_to_none=True)
        row: dict[str, Any] = {}
        times: dict[str, list[float]] = {"plain": [], "sketched": []}
        for turn in range(TURNS):
            model.requires_grad_(False)
            plain = lambda: plain_step(model, data)  # noqa: E731
            times["plain"] += common.in_turns({"plain": plain}, rounds=2, warm=int(turn == 0))["plain"]
            model.requires_grad_(True)
            with GradientSketcher(model, SketchSpec(width=width), verify=False, fused=fused) as sketcher:
                step = lambda: sketcher.policy_gradient(**data, weigh=weigh)  # noqa: E731
                times["sketched"] += common.in_turns({"sketched": step}, rounds=2)["sketched"]
                if turn == TURNS - 1:
                    last = step()
                    row = {"finite": bool(last.sketches.isfinite().all())}
                    row |= {f"{k}_s": v for k, v in last.seconds.items()}
                    row["extra_gb"] = common.peak_bytes(step) / 1e9
        ms = {name: statistics.median(t) for name, t in times.items()}
        over = 1 / common.share(times["sketched"], times["plain"])
        return {"ms": ms["sketched"], "frozen_ms": ms["plain"], "over_frozen": over} | row

    def per_prompt(reduce: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
        """One prompt of the loop: backward, flat float32 gradient, then what the caller does with it."""
        one = batch(1)
        model.requires_grad_(True)
        flat: torch.Tensor | None = None

        def loop() -> None:
            nonlocal flat
            model.zero_grad(set_to_none=True)
            plain_step(model, one)
            flat = torch.cat([p.grad.reshape(-1).float() for p in model.parameters() if p.grad is not None])
            reduce(flat)

        return {"ms_per_prompt": common.milliseconds(loop, repeats=2, warm=1)}

    def dense(flat: torch.Tensor) -> torch.Tensor:
        """Keep a tenth of the coordinates, project them with dense signs drawn block by block (never stored)."""
        kept = flat[::10]
        total = torch.zeros(DIM, device="cuda")
        for b in range(BLOCKS):  # the rest of the blocks costs the same, so the row scales it up
            signs = torch.randint(0, 2, (BLOCK, DIM), device="cuda", dtype=torch.int8).to(torch.bfloat16)
            total += (kept[b * BLOCK : (b + 1) * BLOCK].bfloat16() @ signs).float()
        return total

    def dense_projection() -> dict[str, Any]:
        flat = torch.randn(sum(p.numel() for p in model.parameters()), device="cuda")
        ms = common.milliseconds(lambda: dense(flat), repeats=2, warm=1)
        blocks = flat.numel() // 10 // BLOCK
        return {"ms_per_prompt": ms * blocks / BLOCKS, "extrapolated_from_blocks": BLOCKS, "of": blocks}

    results.attempt("frozen weights", frozen)
    for width in WIDTHS:
        results.attempt(f"sketched, width {width}", lambda w=width: sketched(w))
    results.attempt(f"sketched and fused, width {WIDTHS[0]}", lambda: sketched(WIDTHS[0], True))
    if size:
        results.finish()
    results.attempt("weight gradients", trained)
    results.attempt("loop: backward and flat float32 gradient", lambda: per_prompt(lambda flat: flat.sum()))
    results.attempt("loop: dense projection of a tenth", dense_projection)
    results.finish()


if __name__ == "__main__":
    main()
