"""What sketching a mixture of experts costs: a Qwen3-MoE shape with 8 of 64 experts, widths 1024 and 384.

    python -m benchmarks.bench_moe [--rounds 9] [--tokens 1024] [--threads 1] [--only sketch]

Where bergson is installed (2.5.1 was), its `moe_experts` runs on the same model and tokens: every expert a module of
its own, projected to 16 x 16 numbers each. ``--only`` runs one job in a process of its own and says the peak of its
memory.

Jobs take turns; a ratio is the median over rounds of two costs of the same round. The floor of the sketch is its share
of the multiplications: forward and backward of a matrix [R, C] are 2 R C a row, its sketch is R w, with w = 64.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import resource
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from benchmarks.cost.timing import Cost, alternate
from benchmarks.lib.bergson_collector import collector, rows_of
from benchmarks.lib.environment import describe
from cropi_kernels import GradientSketcher, SketchSpec, logprob_and_grad
from cropi_kernels.sketcher.model.experts import Order, recognise_experts, run_experts
from cropi_kernels.sketcher.policy.decoder import split_parts

SEGMENTS, VOCAB, LAYERS = 4, 2048, 2
HIDDEN, INNER, EXPERTS, TOP_K = 1024, 384, 64, 8


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, moe_intermediate_size=INNER,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).eval()


class Step:
    """One micro-batch of ``tokens`` tokens in four rows; every token but a row's last is scored."""

    def __init__(self, tokens: int) -> None:
        self.model = qwen3_moe()
        self.split = split_parts(self.model)
        generator = torch.Generator().manual_seed(1)
        length = tokens // SEGMENTS
        self.ids = torch.randint(VOCAB, (SEGMENTS, length), generator=generator)
        grid = torch.arange(tokens).view(SEGMENTS, length)
        self.positions, self.targets = grid[:, :-1].reshape(-1), self.ids[:, 1:].reshape(-1)
        self.weights = torch.randn(len(self.positions), generator=generator)
        # torch multiplies by the frozen weights in every job: else the ratio would hold oneDNN's gain too.
        self.sketcher = GradientSketcher(self.model, SketchSpec(), linears="torch")
        for p in self.model.parameters():
            p.requires_grad_(False)

    def weigh(self, logprobs: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return self.weights[start:stop]

    def frozen(self, i: int) -> torch.Tensor:
        embedded = self.model.get_input_embeddings()(self.ids).requires_grad_(True)
        hidden = self.split.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        flat = hidden.detach().flatten(0, 1)
        with torch.no_grad():
            _, grad, _ = logprob_and_grad(
                flat[self.positions], self.split.head.weight, self.targets, self.weigh
            )
            full = torch.zeros_like(flat).index_add_(0, self.positions, grad).view_as(hidden)
        hidden.backward(full)
        assert embedded.grad is not None
        return embedded.grad

    def sorted_frozen(self, i: int) -> torch.Tensor:
        with sorted_experts(self.model):
            return self.frozen(i)

    def sketched(self, i: int) -> torch.Tensor:
        for p in self.model.parameters():
            p.requires_grad_(True)
        with self.sketcher as sketcher:
            result = sketcher.policy_gradient(
                self.ids, segments=torch.arange(SEGMENTS), positions=self.positions, targets=self.targets,
                weigh=self.weigh,
            )  # fmt: skip
        for p in self.model.parameters():
            p.requires_grad_(False)
        return result.sketches


class Bergson:
    """bergson's collector on the same model and tokens."""

    def __init__(self, step: Step) -> None:
        from bergson.moe import expand_moe

        self.step = step
        self.other = Step(step.ids.numel())
        experts = expand_moe(self.other.model, "model.layers.*.mlp.experts")
        linear = {
            n
            for n, m in self.other.model.named_modules()
            if isinstance(m, torch.nn.Linear) and n != "lm_head"
        }
        self.collect = collector(self.other.model, {*experts, *linear})

    def __call__(self, i: int) -> torch.Tensor:
        with self.collect() as collected:
            self.other.frozen(i)
        return rows_of(collected)


@contextmanager
def sorted_experts(model: Any) -> Iterator[None]:
    """The experts as the taps run them, stably sorted, without a sketch: what the taps' own forward is worth."""
    experts = [(m, layout) for m in model.modules() if (layout := recognise_experts(m)) is not None]

    def forward(module: Any, layout: Any, *args: torch.Tensor) -> torch.Tensor:
        order = Order.of(args[1], EXPERTS)
        return run_experts(module, layout, args, lambda name, y, x: y, order)

    for module, layout in experts:
        module.forward = functools.partial(forward, module, layout)
    try:
        yield
    finally:
        for module, _ in experts:
            del module.forward


def floor() -> float:
    """Multiplications of the sketch over those of forward and backward, of the experts alone."""
    width = SketchSpec().width or 0
    matrices = [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
    return sum(r * width for r, _ in matrices) / sum(2 * r * c for r, c in matrices)


def ratio(costs: list[Cost], base: list[Cost], of: Callable[[Cost], float]) -> str:
    ratios = sorted(of(a) / of(b) for a, b in zip(costs, base, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("frozen", "sketch", "bergson"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    step = Step(options.tokens)
    if options.only:
        alone = {"frozen": step.frozen, "sketch": step.sketched}.get(options.only)
        job = Bergson(step) if alone is None else alone
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(options.rounds):
            job(i)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{options.only}: peak {after / 1024:.0f} MiB, {(after - before) / 1024:.0f} MiB above the model's"
        )
        return
    assert (step.frozen(0) - step.sorted_frozen(0)).norm() <= 1e-5 * step.frozen(0).norm()
    assert step.sketched(0).isfinite().all() and step.sketched(0).norm(dim=1).gt(0).all()
    jobs = {
        "forward + backward, frozen, the model's own": step.frozen,
        "the same, experts as the taps run them": step.sorted_frozen,
        "with the sketch": step.sketched,
    }
    if importlib.util.find_spec("bergson") is not None:
        peer = Bergson(step)
        assert peer(0).shape[0] == SEGMENTS and peer(0).isfinite().all()
        jobs["bergson's moe_experts"] = peer
    costs = alternate(jobs, options.rounds)
    base, taps = list(costs.values())[:2]
    print(f"{describe()}\n{options.tokens} tokens, {options.threads} threads, {options.rounds} rounds")
    print(f"multiplications of the sketch: {floor():.1%} of the experts' forward and backward\n")
    print("| job | median s | seconds over the first | processor time over the first | over the second |")
    print("| --- | --- | --- | --- | --- |")
    for name, of_job in costs.items():
        seconds = statistics.median(c.seconds for c in of_job)
        ratios = (
            ratio(of_job, base, lambda c: c.seconds),
            ratio(of_job, base, lambda c: c.processor),
            ratio(of_job, taps, lambda c: c.processor),
        )
        print(f"| {name} | {seconds:.2f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
