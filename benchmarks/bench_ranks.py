"""A job on several processes: how much faster it is, and measurements beside the cost model of docs/scaling.md.

    python -m benchmarks.bench_ranks speed [--processes 2] [--rounds 3] [--prompts 96]  # needs as many free cores
    python -m benchmarks.bench_ranks model                                   # one core, processor time

``speed`` runs `cropi sketch` in one process of one thread and under torchrun, in turns; tokens a second are those of
the passes (the summary's line), beside the time of the whole command. ``model`` runs a job in this process at two sizes
of the model, and predicts processor time, bytes of the store and bytes to the list of work from counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from benchmarks.lib.environment import describe
from cropi.distributed import ranks
from cropi.distributed.team import Team
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import prepare
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

VOCAB, WIDTH, DIM = 2048, 64, 32768
SIZES = {"small": (256, 4), "large": (512, 8)}  # hidden, layers
PROMPT, RESPONSES, LENGTH = 64, 4, 96


def model(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=1024,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def write_records(path: Path, prompts: int) -> Path:
    """Token ids, so that nothing is tokenised; every prompt has a gradient."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    with open(path, "w", encoding="utf-8") as file:
        for i in range(prompts):
            lengths = torch.randint(LENGTH // 2, LENGTH * 3 // 2, (RESPONSES,), generator=generator).tolist()
            record = {
                "id": f"p{i:05d}", "prompt_ids": ids(PROMPT), "response_ids": [ids(n) for n in lengths],
                "rewards": [float(k % 2) for k in range(RESPONSES)],
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return path


# ------------------------------------------------------------------------------------------------------------ speed
def speed(processes: int, rounds: int, prompts: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model(512, 8).save_pretrained(folder / "model")
        _save_tokenizer(folder / "model")
        write_records(folder / "t.jsonl", prompts)
        rates: dict[int, list[float]] = {1: [], processes: []}
        walls: dict[int, list[float]] = {1: [], processes: []}
        for i in range(rounds):
            for count in rates:
                rate, wall = _command(folder, count, folder / f"out-{count}-{i}")
                rates[count].append(rate)
                walls[count].append(wall)
        same = _same(folder / "out-1-0", folder / f"out-{processes}-0")
    gains = [many / one for one, many in zip(rates[1], rates[processes])]
    print(describe())
    print("| processes | tokens/s, median | whole command s, median |\n|---|---|---|")
    for count in rates:
        print(f"| {count} | {statistics.median(rates[count]):.0f} | {statistics.median(walls[count]):.1f} |")
    print(
        f"\n{processes} processes of one thread: {statistics.median(gains):.2f} times one ({min(gains):.2f} to "
        f"{max(gains):.2f}); the stores are {'equal' if same else 'NOT equal'} row by row"
    )


def _command(folder: Path, processes: int, out: Path) -> tuple[float, float]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    words = [
        sys.executable, *launcher, "-m", "cropi", "sketch", "--model", str(folder / "model"), "--trajectories",
        str(folder / "t.jsonl"), "--out", str(out), "--no-progress", "--device", "cpu",
    ]  # fmt: skip
    begun = time.monotonic()
    # Left to a measurement, a process on a busy machine may choose other products, with other roundings.
    fixed = {
        "OMP_NUM_THREADS": "1",
        "CROPI_KERNELS_LINEARS": os.environ.get("CROPI_KERNELS_LINEARS", "onednn"),
    }
    done = subprocess.run(words, env=os.environ | fixed, capture_output=True, text=True, check=False)
    wall = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = re.search(r"([\d.]+) tokens/s", done.stdout)
    assert found is not None, done.stdout
    return float(found[1]), wall


def _same(one: Path, other: Path) -> bool:
    vectors = [
        {row.id: v for rows, table in SketchStore.open(path).shards() for row, v in zip(rows, table)}
        for path in (one, other)
    ]
    return vectors[0].keys() == vectors[1].keys() and all(
        torch.equal(v, vectors[1][k]) for k, v in vectors[0].items()
    )


def _save_tokenizer(folder: Path) -> None:
    """Nothing is tokenised with it, but a checkpoint brings one."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    made.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------ model
def matrix_rate(hidden: int, tokens: int) -> float:
    """Operations a second of processor time in the product of a layer's size, best of several."""
    a, b = torch.randn(tokens, hidden), torch.randn(hidden, 4 * hidden)
    best = float("inf")
    for _ in range(12):
        begun = time.process_time()
        for _ in range(4):
            a @ b
        best = min(best, (time.process_time() - begun) / 4)
    return 2 * a.numel() * b.shape[1] / best


def operations(policy: Policy, tokens: int, scored: int) -> float:
    """4 operations a weight and token (forward, and backward to the inputs), the sketch's share, and the head's."""
    total = 0.0
    head = policy.model.get_output_embeddings().weight
    for name, p in policy.model.named_parameters():
        if p.ndim == 2 and p is not head and "embed" not in name:
            total += tokens * (4.0 * p.numel() + 2.0 * p.shape[0] * WIDTH)
    return total + scored * (4.0 * head.numel() + 2.0 * head.shape[0] * WIDTH)


class Counted:
    """A list of work that counts the bytes of keys and values."""

    def __init__(self, store: Any) -> None:
        self.store, self.bytes, self.lock = store, 0, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)

        def call(*arguments: Any) -> Any:
            found = method(*arguments)
            size = sum(
                len(str(one)) if not isinstance(one, bytes) else len(one) for one in (*arguments, found)
            )
            with self.lock:
                self.bytes += size
            return found

        return call


def measure(size: str, prompts: int) -> dict[str, float]:
    hidden, layers = SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_records(folder / "t.jsonl", prompts)
        job = SketchJob([path], folder / "out", SketchSpec(DIM, width=WIDTH), tokens_per_batch=1024)
        policy = Policy(model(hidden, layers))
        ready = prepare(policy, job, progress=False)
        with ready.open() as store:
            begun = time.process_time()
            ready.fill(store, progress=False)
            used = time.process_time() - begun
        summary = ready.summary
        counted, world = Counted(dist.HashStore()), 2
        policies = [Policy(model(hidden, layers)) for _ in range(world)]
        few = write_records(folder / "few.jsonl", 16)

        def rank(number: int) -> None:
            team = Team(counted, number, world)
            with team.telling():
                small = SketchJob([few], folder / "two", SketchSpec(DIM), tokens_per_batch=256)
                ranks.sketch(team, policies[number], small, progress=False)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = sum(file.stat().st_size for file in (folder / "out").iterdir())
    return {
        "weights": sum(p.numel() for p in policy.model.parameters()), "tokens": summary.model_tokens,
        "seconds": used, "operations": operations(policy, summary.model_tokens, summary.scored_tokens),
        "rate": matrix_rate(hidden, 1024), "store": stored, "rows": summary.sketched, "network": counted.bytes,
    }  # fmt: skip


def cost_model() -> None:
    torch.set_num_threads(1)
    print(describe())
    print(
        "| weights | tokens | processor s | operations | products at | share of that rate | store, bytes a row "
        "(predicted) | list of work, kB (2 processes, 16 prompts) |\n|---|---|---|---|---|---|---|---|"
    )
    shares = []
    for size, prompts in (("small", 48), ("large", 16)):
        found = measure(size, prompts)
        share = found["operations"] / found["seconds"] / found["rate"]
        shares.append(share)
        print(
            f"| {found['weights'] / 1e6:.1f}M | {found['tokens']:.0f} | {found['seconds']:.2f} | "
            f"{found['operations']:.3g} | {found['rate'] / 1e9:.0f} GF/s | {share:.2f} | "
            f"{found['store'] / found['rows']:.0f} ({4 * DIM + 512}) | {found['network'] / 1e3:.1f} |"
        )
    print(
        f"\nThe larger size from the smaller one's share: {shares[1] / shares[0]:.2f} of the measured time."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "model"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=96)
    args = parser.parse_args()
    if args.what == "speed":
        speed(args.processes, args.rounds, args.prompts)
    else:
        cost_model()


if __name__ == "__main__":
    main()
