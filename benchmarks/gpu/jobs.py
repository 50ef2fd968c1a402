"""Whole jobs on a GPU, as users start them.

Stores made on the device beside the CPU's, for several kinds of models; the self-test at a real size; batches by
memory, and memory that runs out; the command line, from files to a choice.
"""

from __future__ import annotations

import contextlib
import cProfile
import io
import json
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import model as whole
import torch

import cropi
from cropi.store.rows import SKIPPED
from cropi_kernels import GradientSketcher, SketchSpec

sys.path.append(str(common.ROOT / "tests"))
WORDS, PROMPTS, RESPONSES, LONGEST = 1000, 24, 4, 60
SIZE = {
    "vocab_size": WORDS, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZE,
    "qwen2": SIZE | {"tie_word_embeddings": True},
    "qwen3": SIZE,
    "gemma3_text": SIZE | {"sliding_window": 16},
    "gpt2": {"vocab_size": WORDS, "n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 512},
    "qwen3_moe": SIZE | EXPERTS,
}
# Of the CPU's sketch. Float32 passes of three layers differ by some 1e-6; the product of two errors is far below.
FLOAT32_APART = 1e-3
DEVICE = "cuda"  # of the command line
LONG = 512  # tokens of a response of the large model
FEW = 8  # prompts of the large model
MANY, TOKENS, TURNS = 64, 8192, 4  # of its job of many batches
LAYERS, AGAIN = 14, 8  # of the model whose bits are compared, and how often


def made(kind: str) -> Any:
    """A model of the kind with random weights that are not small, so that a wrong mask or order shows."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if p.ndim == 1 else 0.02)
    return model


def records(n: int, words: int, longest: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with responses of any length up to ``longest``, right now and then."""
    rng = random.Random(seed)
    ids = lambda least, most: [rng.randrange(2, words) for _ in range(rng.randint(least, most))]  # noqa: E731
    return [
        {
            "id": f"{seed}-{i}", "prompt_ids": ids(2, 20), "response_ids": [ids(1, longest) for _ in range(RESPONSES)],
            "rewards": [1.0, 0.0] + [float(rng.random() < 0.5) for _ in range(RESPONSES - 2)],
        }
        for i in range(n)
    ]  # fmt: skip


def sketched(model: Any, data: list[dict[str, Any]], **options: Any) -> torch.Tensor:
    """Sketches [prompts, dim], in the order of the records; zeros of a prompt whose gradient is zero (all clipped)."""
    store = cropi.sketch(model, data, progress=False, **options)
    by_id = {row.id: v for rows, vectors in store.shards() for row, v in zip(rows, vectors, strict=True)}
    zeros = torch.zeros_like(next(iter(by_id.values())))
    by_id |= {row.id: zeros for row in store.rows() if row.status == SKIPPED}
    return torch.stack([by_id[record["id"]] for record in data]).double()


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest distance of a prompt's sketch, of its length."""
    # A sketch of zeros is as it should be, or infinitely far.
    return float(((got - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-30)).max())


def beside_the_cpu(kind: str) -> dict[str, Any]:
    """A store in float32 on the device, twice; one in bfloat16, which may be off by twice what the CPU's is."""
    data, model = records(PROMPTS, WORDS, LONGEST), made(kind)
    right = sketched(model, data)
    half_cpu = apart(sketched(made(kind).bfloat16(), data), right)
    model = model.cuda()
    got, again = sketched(model, data), sketched(model, data)
    half = sketched(made(kind).bfloat16().cuda(), data)
    row = {"error": apart(got, right), "repeatable": torch.equal(got, again)}
    row |= {"bfloat16_error": apart(half, right), "cpu_bfloat16_error": half_cpu}
    right_enough = row["error"] <= FLOAT32_APART and row["bfloat16_error"] <= 2 * half_cpu
    return row | {"ok": right_enough and row["repeatable"]}


def fused_beside() -> dict[str, Any]:
    """A sketcher with fused taps beside one without, on the device, in float32."""
    model = made("llama").cuda()
    ids = torch.randint(2, WORDS, (4, 100), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    at = torch.arange(400, device="cuda").view(4, 100)[:, :-1].reshape(-1)
    data = {"input_ids": ids, "positions": at, "targets": ids[:, 1:].reshape(-1), "segments": torch.arange(4)}
    got = []
    for fused in (False, True):
        with GradientSketcher(model, SketchSpec(), fused=fused) as sketcher:
            done = sketcher.policy_gradient(**data, weigh=lambda p, a, b: torch.ones_like(p))
        got.append(done.sketches.double().cpu())
    error = apart(got[1], got[0])
    return {"error": error, "ok": error <= FLOAT32_APART}


def same_bits(width: int, fused: bool) -> dict[str, Any]:
    """Sketches of one batch, again and again, in a model of a real width. With eager attention: the backward passes of
    cuDNN's attention and of flash attention give other bits on every run, and so do the sketches of what they give."""
    shape = whole.SHAPE
    try:
        whole.SHAPE = shape | {"num_hidden_layers": LAYERS}
        model = whole.build().eval()
    finally:
        whole.SHAPE = shape
    model.set_attn_implementation("eager")
    data = whole.batch(FEW)
    with GradientSketcher(model, SketchSpec(width=width), verify=False, fused=fused) as sketcher:
        weigh = lambda p, a, b: torch.ones_like(p)  # noqa: E731
        runs = [sketcher.policy_gradient(**data, weigh=weigh).sketches for _ in range(AGAIN)]
    different = sum(not torch.equal(runs[0], other) for other in runs[1:])
    return {"repeats": AGAIN, "different": different, "ok": different == 0 and bool(runs[0].any())}


@contextlib.contextmanager
def profiled() -> Iterator[None]:
    """Prints where the host spends the time, for the log."""
    profile = cProfile.Profile()
    with profile:
        yield
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(45)
    print(text.getvalue(), flush=True)


def seconds(run: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def self_test(model: Any) -> dict[str, Any]:
    """The first call on a model, with everything that is checked and compiled before it, and the second."""
    data = whole.batch(4, whole.LENGTH)
    with GradientSketcher(model, SketchSpec()) as sketcher:
        step = lambda: sketcher.policy_gradient(**data, weigh=lambda p, a, b: torch.ones_like(p))  # noqa: E731
        with profiled():
            first = seconds(step)
        return {"first_s": first, "second_s": seconds(step), "of_self_test": str(sketcher.self_test)}


def by_memory(model: Any, share: float | None = None) -> dict[str, Any]:
    """A job of the large model, whose batches are as the memory allows; with ``share`` of it, in batches that do
    not fit."""
    words = whole.SHAPE["vocab_size"]
    data = records(FEW, words, LONG)
    tokens = sum(len(r["prompt_ids"]) + len(x) for r in data for x in r["response_ids"])
    out: list[torch.Tensor] = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    options: dict[str, Any] = {"layout": "padded"}
    if share is not None:
        torch.cuda.set_per_process_memory_fraction(share)
        options |= {"tokens_per_batch": 10**6, "verify": False}
    try:
        took = seconds(lambda: out.append(sketched(model, data, **options)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    row = {"tokens": tokens, "job_s": took, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return row | {"finite": bool(out[0].isfinite().all()), "ok": bool(out[0].isfinite().all())}


def running_ahead(model: Any) -> dict[str, Any]:
    """A job of many batches: each pass launched before the results of the one before it are looked at, and one after
    the other, in turns. As near to each other as two runs of one kind: attention may add in another order every time.
    """
    from cropi.sketching import passes

    data, devices = records(MANY, whole.SHAPE["vocab_size"], LONG, seed=2), passes.AHEAD
    tokens = sum(len(r["prompt_ids"]) + len(x) for r in data for x in r["response_ids"])
    policy = cropi.Policy(model)  # which keeps what it finds out of a model before its first pass
    out: dict[str, list[torch.Tensor]] = {"ahead": [], "one by one": []}
    times: dict[str, list[float]] = {"ahead": [], "one by one": []}

    def job(name: str) -> None:
        out[name] = [*out[name][-1:], sketched(policy, data, tokens_per_batch=TOKENS, verify=False)]

    try:
        for turn in range(TURNS + 1):
            for name, there in (("ahead", devices), ("one by one", ())):
                passes.AHEAD = there
                took = seconds(lambda name=name: job(name))
                times[name] += [took] if turn else []  # the first also loads and compiles
    finally:
        passes.AHEAD = devices
    row = {f"{name.replace(' ', '_')}_s": statistics.median(t) for name, t in times.items()}
    row |= {
        "times_faster": common.share(times["ahead"], times["one by one"]),
        "tokens_per_s": tokens / row["ahead_s"],
        "apart": apart(out["ahead"][-1], out["one by one"][-1]),
        "one_kind_apart": apart(*out["one by one"]),
    }
    return row | {"ok": row["apart"] <= 2 * row["one_kind_apart"] + FLOAT32_APART}


def command_line() -> dict[str, Any]:
    """``cropi run`` on a model and files on disk: rollouts in text, a choice at the end; and once more, which finds all
    of it done."""
    from support.made_data import make_model, make_records, make_tokenizer, write_lines

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        make_model("llama", hidden_size=64, head_dim=16).save_pretrained(here / "model")
        make_tokenizer().save_pretrained(here / "model")
        train = write_lines(here / "train.jsonl", make_records(60))
        valid = write_lines(here / "valid.jsonl", make_records(12, seed=1))
        words = ["run", "--model", here / "model", "--train", train, "--valid", valid, "--out", here / "out"]
        words += ["--no-progress"]
        command = [sys.executable, "-m", "cropi", *map(str, words), "--device", DEVICE]
        runs = [subprocess.run(command, capture_output=True, text=True) for _ in "ab"]
        print(*(r.stdout + r.stderr for r in runs), sep="\n", flush=True)
        chosen = sorted(here.glob("out/**/*.jsonl"))
        ids = [json.loads(line)["id"] for path in chosen for line in path.read_text().splitlines()]
    return {
        "statuses": [r.returncode for r in runs],
        "chosen": len(ids),
        "ok": not any(r.returncode for r in runs),
    }


def main() -> None:
    results = common.Results("jobs")
    for kind in KINDS:
        results.attempt(f"{kind}: a store by the device and by the CPU", lambda k=kind: beside_the_cpu(k))
    results.attempt("fused taps beside the others", fused_beside)
    for width, fused in ((64, False), (128, False), (256, False), (64, True)):
        name = f"the same bits, width {width}{', fused' if fused else ''}"
        results.attempt(name, lambda w=width, f=fused: same_bits(w, f))
    results.attempt("cropi run", command_line)
    model: Any = None

    def large() -> dict[str, Any]:
        nonlocal model
        model = whole.build().eval()
        return self_test(model)

    results.attempt("the first call with the self-test", large)
    results.attempt("batches by memory", lambda: by_memory(model))
    results.attempt("batches that do not fit", lambda: by_memory(model, 0.2))
    results.finish()


if __name__ == "__main__":
    main()
