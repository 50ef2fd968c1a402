"""What live capture costs a training step on a CPU: ``python -m benchmarks.live`` (about 4 minutes on 2 cores).

Steps of a model with SmolLM2-135M's shapes and random weights: forward, a clipped GRPO loss over the completions,
backward, AdamW; plain, and with `LiveSketcher`. They alternate in one process on the same rows, and medians of paired
ratios are taken, of seconds and of processor seconds; memory is that of processes of their own. The sketches are
held to plain autograd of one prompt at a time in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.timing import Cost, timed
from benchmarks.lib.environment import describe
from cropi_kernels import LiveSketcher, SketchSpec
from cropi_kernels.names import canonical_name

# Rows of a step, tokens of a row and of its prompt, responses to a prompt.
ROWS, LENGTH, PROMPT, EACH = 8, 128, 32, 4
SHAPES: dict[str, Any] = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


class Step:
    """A model, its optimizer, and rows of two prompts with four responses each."""

    def __init__(self, layers: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.model: Any = LlamaForCausalLM(LlamaConfig(**{**SHAPES, "num_hidden_layers": layers}))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.ids = torch.randint(0, SHAPES["vocab_size"], (ROWS, LENGTH))
        self.prompts = torch.arange(ROWS) // EACH
        self.advantages = torch.randn(ROWS)
        self.live = LiveSketcher(self.model)

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(self.ids, use_cache=False, logits_to_keep=LENGTH - PROMPT + 1).logits[:, :-1]
        targets = self.ids[:, PROMPT:, None]
        logp = logits.gather(2, targets)[..., 0] - logits.logsumexp(-1)
        ratio, a = (logp - logp.detach()).exp(), (self.advantages * rows)[:, None]
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()

    def run(self, live: bool) -> torch.Tensor | None:
        around: Any = contextlib.nullcontext()
        if live:
            around = self.live.batch(self.prompts, shape=(ROWS, LENGTH))
        with around as sketch:
            self.loss(torch.ones(ROWS)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sketch.sketches if live else None

    def agreement(self) -> float:
        """Largest error of a cosine of two prompts' sketches with exact gradients' cosine, in 1 / sqrt(dim)."""
        with self.live, self.live.batch(self.prompts, shape=(ROWS, LENGTH)) as sketch:
            self.loss(torch.ones(ROWS)).backward()
        exact = []
        for prompt in range(ROWS // EACH):
            self.model.zero_grad()
            self.loss((self.prompts == prompt).float()).backward()
            exact.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        self.model.zero_grad()
        names = {canonical_name(n) for n, _ in self.model.named_parameters()}
        assert names == set(self.live.coverage.names)
        got = torch.nn.functional.cosine_similarity(sketch.sketches[0], sketch.sketches[1], dim=0)
        want = torch.nn.functional.cosine_similarity(exact[0], exact[1], dim=0)
        return float((got - want).abs()) * SketchSpec().dim ** 0.5


def measure(layers: int, rounds: int) -> tuple[dict[str, list[Cost]], float]:
    """The cost of every step, by kind; and `Step.agreement`."""
    step = Step(layers)
    costs: dict[str, list[Cost]] = {"plain": [], "live": []}
    for round_ in range(rounds + 1):
        for kind in ("plain", "live") if round_ % 2 else ("live", "plain"):
            with step.live if kind == "live" else contextlib.nullcontext():
                cost = timed(lambda: step.run(kind == "live"))  # noqa: B023
            if round_:  # the first is the self-test's and the audit's
                costs[kind].append(cost)
    return costs, step.agreement()


def peak(layers: int, live: bool) -> int:
    """KiB resident at the peak of steps after the first."""
    step = Step(layers)
    with step.live:
        step.run(live)
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(2):
            step.run(live)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=SHAPES["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/live.md"))
    parser.add_argument("--peak", choices=("plain", "live"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.layers, args.peak == "live")))
        return
    costs, off = measure(args.layers, args.rounds)
    pairs = list(zip(costs["live"], costs["plain"], strict=True))
    wall, processor = [a.seconds / b.seconds for a, b in pairs], [a.processor / b.processor for a, b in pairs]
    peaks = {}
    for kind in costs:
        command = [sys.executable, "-m", "benchmarks.live", "--peak", kind, "--layers", str(args.layers)]
        peaks[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    middle = {kind: statistics.median(cost.seconds for cost in costs[kind]) for kind in costs}
    text = f"""# Live capture: cost of a training step

{ROWS} x {LENGTH} tokens, {args.layers} layers of SmolLM2-135M's shapes, float32: forward, GRPO loss, backward, AdamW.
{args.rounds} pairs of steps; {describe()}

| step | seconds | of plain (median of pairs, quartiles) | processor seconds, of plain | peak memory, MiB |
| --- | --- | --- | --- | --- |
| plain | {middle["plain"]:.2f} | 1 | 1 | {peaks["plain"] / 1024:.0f} |
| `LiveSketcher` | {middle["live"]:.2f} | {_spread(wall)} | {_spread(processor)} | {_more(peaks)} |

The cosine of the two prompts' sketches is off from that of their exact gradients by {off:.2f} / sqrt(32768).
"""
    args.out.write_text(text)
    print(text)


def _spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _more(peaks: dict[str, int]) -> str:
    return f"{peaks['live'] / 1024:.0f} ({peaks['live'] / peaks['plain'] - 1:+.1%})"


if __name__ == "__main__":
    main()
