"""linear_logprob against torch.mm on the same products and nothing else, plain torch, and torch's fused cross entropy.

    python benchmarks/bench_linear_logprob.py [--threads 1] [--tokens 512] [--vocab 49152] [--hidden 576]

Variants are interleaved and the fastest round of each counts, so that a busy machine affects all of them; what is timed
is checked against float64 in the same run. Read the ratios: the times are this machine's.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import pathlib
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from cropi_kernels import _native
from cropi_kernels.ops.linear_logprob import chunks, linear_logprob, logprob_and_grad, oracle

CHECKED = 24  # tokens compared with float64
Result = tuple[torch.Tensor, "torch.Tensor | None"]  # log-probs (or their sum), gradient to hidden


@dataclasses.dataclass
class Variant:
    name: str
    products: int  # of 2 N V D operations each
    run: Callable[[], Result]
    seconds: float = float("inf")
    peak_mib: float = 0.0
    errors: str = ""


class Problem:
    """A linear head as in SmolLM2: logits with a standard deviation near 3."""

    def __init__(self, tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, hidden, generator=generator).to(dtype)
        self.head = (torch.randn(vocab, hidden, generator=generator) * (3 / hidden**0.5)).to(dtype)
        self.targets = torch.randint(0, vocab, (tokens,), generator=generator)
        self.weights = torch.randn(tokens, generator=generator)
        few = (self.hidden[:CHECKED], self.head, self.targets[:CHECKED])
        self.logp = oracle.linear_logprob(*few).logp
        self.grad = oracle.gradients(self.weights[:CHECKED], *few)[1]

    def gemm(self, products: int) -> Result:
        """The floor: the same products by torch.mm in the same dtype, nothing between them."""
        z = self.hidden @ self.head.t()
        return torch.zeros(()), z @ self.head if products > 1 else None

    def forward(self) -> Result:
        return linear_logprob(self.hidden, self.head, self.targets), None

    def autograd(self) -> Result:
        leaf = self.hidden.requires_grad_()
        logp = linear_logprob(leaf, self.head, self.targets)
        return logp.detach(), torch.autograd.grad(logp, leaf, self.weights)[0]

    def one_pass(self) -> Result:
        logp, grad, _ = logprob_and_grad(
            self.hidden, self.head, self.targets, lambda logp, start, stop: self.weights[start:stop]
        )
        return logp, grad

    def _plain(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.head).float()
        return torch.log_softmax(logits, dim=-1).gather(1, self.targets[:, None])[:, 0]

    @torch.no_grad()
    def plain_forward(self) -> Result:
        return self._plain(self.hidden), None

    def plain(self) -> Result:
        leaf = self.hidden.requires_grad_()
        logp = self._plain(leaf)
        return logp.detach(), torch.autograd.grad(logp, leaf, self.weights)[0]

    def torch_fused(self) -> Result:
        """Chunked cross entropy: a plain sum, as it takes no weight per token."""
        leaf = self.hidden.requires_grad_()
        loss = F.linear_cross_entropy(
            leaf, self.head, self.targets, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
        )
        return -loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def errors(self, result: Result) -> str:
        logp, grad = result
        said = f"{(logp[:CHECKED] - self.logp).abs().max():.1e}" if logp.ndim else "-"
        if grad is not None and logp.ndim:
            said += f" / {(grad[:CHECKED] - self.grad).abs().max():.1e}"
        return said


def reset_peak() -> bool:
    """Lets the kernel's high-water mark of this process start again."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def memory_mib(field: str) -> float:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(variants: Sequence[Variant], problem: Problem, rounds: int, clock: Callable[[], float]) -> None:
    libc = ctypes.CDLL(None)
    for variant in variants:  # memory first: one call each, from a settled start
        gc.collect()
        # Freed memory that the allocator keeps would hide what a variant takes.
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        can = reset_peak()
        before = memory_mib("VmRSS")
        result = variant.run()
        variant.peak_mib = memory_mib("VmHWM") - before if can else float("nan")
        variant.errors = problem.errors(result)
        del result
    for _ in range(rounds):
        for variant in variants:
            start = clock()
            variant.run()
            variant.seconds = min(variant.seconds, clock() - start)


def report(args: argparse.Namespace, dtype: torch.dtype) -> None:
    problem = Problem(args.tokens, args.vocab, args.hidden, dtype)
    variants = [
        Variant("torch.mm, 1 product", 1, lambda: problem.gemm(1)),
        Variant("torch.mm, 2 products", 2, lambda: problem.gemm(2)),
        Variant("linear_logprob", 1, problem.forward),
        Variant("linear_logprob + backward", 3, problem.autograd),
        Variant("logprob_and_grad", 2, problem.one_pass),
        Variant("plain torch forward", 1, problem.plain_forward),
        Variant("plain torch + backward", 2, problem.plain),
    ]
    if hasattr(F, "linear_cross_entropy") and not args.skip_fused:
        variants.append(Variant("F.linear_cross_entropy + backward", 2, problem.torch_fused))
    measure(variants, problem, args.rounds, time.process_time if args.cpu_time else time.perf_counter)
    floor = {1: variants[0].seconds, 2: variants[1].seconds}
    torch_seconds = {v.name: v.seconds for v in variants}
    print(
        f"\nN={args.tokens} V={args.vocab} D={args.hidden} {dtype}, {torch.get_num_threads()} thread(s), "
        f"level {_native.native().current_level()}, chunk {chunks.default_chunk(args.tokens, args.vocab)}, "
        f"torch {torch.__version__}"
    )
    print("| variant | ms | GFLOP/s | x floor | x plain torch | extra MiB | error of logp / dhidden |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for v in variants:
        backward = v.products > 1
        rate = 2e-9 * args.tokens * args.vocab * args.hidden * v.products / v.seconds
        plain = torch_seconds["plain torch + backward" if backward else "plain torch forward"]
        ratios = f"{v.seconds / floor[2 if backward else 1]:.2f} | {v.seconds / plain:.2f}"
        print(f"| {v.name} | {v.seconds * 1e3:.0f} | {rate:.0f} | {ratios} | {v.peak_mib:.0f} | {v.errors} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--skip-fused", action="store_true", help="leave out F.linear_cross_entropy, slow on CPUs"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's time, with 1 thread on a busy machine"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.dtypes:
        report(args, getattr(torch, name))


if __name__ == "__main__":
    main()
