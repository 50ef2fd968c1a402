"""What fused taps save on a CPU: a pass of SmolLM2-135M's shape with and without them, in processor seconds.

``python -m benchmarks.fused_taps [--rounds 5] [--tokens 1024] [--layers 30]``; the model has random weights. The two
take turns, and the ratio of each round is of two passes that ran one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from cropi_kernels import GradientSketcher, SketchSpec


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--layers", type=int, default=30)
    given = options.parse_args()
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=given.layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    rows, length = 4, given.tokens // 4
    ids = torch.randint(0, config.vocab_size, (rows, length))
    labels = ids.clone()
    labels[:, : length * 3 // 4] = -100  # a quarter of the tokens is scored
    seconds: dict[bool, list[float]] = {False: [], True: []}
    made = {}
    for turn in range(given.rounds + 1):
        for fused in (False, True):
            with GradientSketcher(
                model, SketchSpec(), verify=False, linears="torch", fused=fused
            ) as sketcher:
                start = time.process_time()
                made[fused] = sketcher.policy_gradient(
                    ids, segments=torch.arange(rows), labels=labels, weights=torch.ones(rows)
                ).sketches
                if turn:  # the first warms up
                    seconds[fused].append(time.process_time() - start)
    apart = float((made[True] - made[False]).norm() / made[False].norm())
    ratios = [fused / stock for stock, fused in zip(seconds[False], seconds[True], strict=True)]
    stock, fused_s = (statistics.median(seconds[way]) for way in (False, True))
    print(f"{given.layers} layers, {rows * length} tokens, {torch.get_num_threads()} threads")
    print(f"stock {stock:.2f} s, fused {fused_s:.2f} s of processor time; sketches {apart:.1e} apart")
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"fused / stock: median {median:.3f}, of {len(ratios)}: {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
