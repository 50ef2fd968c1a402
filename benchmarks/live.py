"""What live capture costs a training step on a CPU: ``python -m benchmarks.live`` (about 4 minutes on 2 cores).

Steps of a model with SmolLM2-135M's shapes and random weights: forward, a clipped GRPO loss over the completions,
backward, AdamW; plain, and with `LiveSketcher`. They alternate in one process on the same rows, and medians of paired
ratios are taken, of seconds and of processor seconds; memory is that of processes of their own. In the same run the
sketches are compared with plain autograd, one prompt at a time. Where `dattri_llm` is installed, its capture of the
same step with the products of all rows' gradients (`HookManager`, `Gradient.similarity`) is a third kind.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.timing import Cost, rotated, timed
from benchmarks.lib import memory
from benchmarks.lib.environment import describe
from benchmarks.lib.script import options, publish
from cropi_kernels import LiveSketcher, SketchSpec
from cropi_kernels.names import canonical_name

# Rows of a step, tokens of a row and of its prompt, responses to a prompt.
ROWS, LENGTH, PROMPT, EACH = 8, 128, 32, 4
PEER = "dattri-llm"
NAMES = {
    "plain": "plain",
    "live": "`LiveSketcher`, 32768 numbers a prompt",
    PEER: "dattri-llm: capture, and products of all rows",
}
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

    def run(self, kind: str) -> None:
        around: Any = contextlib.nullcontext()
        if kind == "live":
            around = self.live.batch(self.prompts, shape=(ROWS, LENGTH))
        with around:
            self.loss(torch.ones(ROWS)).backward()
        if kind == PEER:
            gradient = self.peer.get_gradient()
            gradient.similarity(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def tapped(self, kind: str) -> Iterator[None]:
        """The model as steps of this kind need it."""
        with contextlib.ExitStack() as stack:
            if kind == "live":
                stack.enter_context(self.live)
            elif kind == PEER:
                import dattri_llm

                config = dattri_llm.HookManagerConfig(linear_io=dattri_llm.REGISTER_ALL)
                self.peer = dattri_llm.HookManager(self.model, config=config, callbacks=[])
                stack.callback(self.peer.remove)
                stack.enter_context(self.peer.collect())
            yield

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
    costs: dict[str, list[Cost]] = {kind: [] for kind in kinds()}
    for round_ in range(rounds + 1):
        for kind in rotated(costs, round_):
            with step.tapped(kind):
                cost = timed(functools.partial(step.run, kind))
            if round_:  # the first is the self-test's and the audit's
                costs[kind].append(cost)
    return costs, step.agreement()


def kinds() -> list[str]:
    return ["plain", "live"] + ([PEER] if importlib.util.find_spec("dattri_llm") else [])


def peak(layers: int, kind: str) -> int:
    """Bytes resident at the peak of steps after the first."""
    step = Step(layers)
    with step.tapped(kind):
        step.run(kind)
        return memory.peak(lambda: [step.run(kind) for _ in range(2)])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=SHAPES["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/live.md"))
    parser.add_argument("--peak", choices=("plain", "live", PEER), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.layers, args.peak)))
        return
    costs, off = measure(args.layers, args.rounds)
    peaks = {}
    for kind in costs:
        command = [sys.executable, "-m", "benchmarks.live", "--peak", kind, "--layers", str(args.layers)]
        peaks[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [
        f"| {NAMES[kind]} | {statistics.median(cost.seconds for cost in costs[kind]):.2f} | "
        f"{_spread([a.seconds / b.seconds for a, b in zip(costs[kind], costs['plain'], strict=True)])} | "
        f"{_spread([a.processor / b.processor for a, b in zip(costs[kind], costs['plain'], strict=True)])} | "
        f"{peaks[kind] / 2**20:.0f} ({peaks[kind] / peaks['plain'] - 1:+.1%}) |"
        for kind in costs
    ]
    text = f"""# Live capture: cost of a training step

{ROWS} x {LENGTH} tokens, {args.layers} layers of SmolLM2-135M's shapes, float32: forward, GRPO loss, backward, AdamW.
{args.rounds} rounds; {describe()}

| step | seconds | of plain (median of pairs, quartiles) | processor seconds, of plain | peak memory, MiB |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

The cosine of the two prompts' sketches is off from that of their exact gradients by {off:.2f} / sqrt(32768).
"""
    publish(args.out, text.splitlines())


def _spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
