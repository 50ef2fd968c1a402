"""What a training step's time is made of: ``python -m benchmarks.rlvr_mini.steps``, once the experiment has run.

Processor seconds of steps on the prompts that full data and the arm ``then_long_pool3`` visit, under the base policy
and under the policy that each ended with, for seed 0: with the micro-batches of the scale and with short ones, with and
without taps. All ways of a policy take the same prompts and draw the same numbers, in turns.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.lib.environment import describe
from benchmarks.lib.script import publish
from benchmarks.rlvr_mini.arms import CUT, LEVERS
from benchmarks.rlvr_mini.config import SCALES, Scale, options_of_finished
from benchmarks.rlvr_mini.data import SeedData, base_model, seed_data
from benchmarks.rlvr_mini.grpo import Trainer
from benchmarks.rlvr_mini.live import Live
from cropi.errors import CropiError

VISITED = {"full_pool3": "full data", "then_long_pool3": "live, visits at their time"}
Way = tuple[int, bool]  # tokens of a micro-batch, and whether there are taps
PARTS = ("generate", "forward", "backward", "all")
HEAD = (
    "| prompts of | policy | tokens a micro-batch | taps | prompts with a gradient | tokens | with padding "
    "| generate, ms | forward | backward | all |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: list[str] | None = None) -> None:
    parser = options_of_finished(__doc__)
    parser.add_argument("--steps", type=int, default=8, help="of each way, a turn (default: 8)")
    parser.add_argument("--turns", type=int, default=3, help="the median counts (default: 3)")
    args = parser.parse_args(arguments)
    scale = SCALES[args.scale]
    folder = args.work / scale.name / "seed0"
    for name in VISITED:
        if not (folder / name / "policy.pt").exists():
            raise CropiError(f"{folder / name} has no policy.pt; run python -m benchmarks.rlvr_mini first")
    torch.set_num_threads(1)
    model = base_model(scale, args.work / scale.name)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    data = seed_data(scale, 0, model, folder, LEVERS["full_pool3"].pool)
    lines = [
        f"A step of {scale.prompts} prompts x {scale.group} responses, seed 0: processor milliseconds of one core, "
        f"median of {args.turns} turns of {args.steps} steps each. {describe()}.",
        "",
        HEAD,
    ]
    for policy in ("base", "last"):
        for name, label in VISITED.items():
            selections = json.loads((folder / name / "result.json").read_text())["selections"]
            # The third draw knows something already; full data names no prompts.
            chosen = selections[min(2, len(selections) - 1) if policy == "base" else -1]["chosen"]
            weights = torch.load(folder / name / "policy.pt") if policy == "last" else base
            visited = _order(chosen or sorted(data.problems), args.steps * scale.prompts)
            found = _measured(model, weights, scale, data, visited, args.turns)
            for (tokens, taps), means in found.items():
                cells = [
                    label, policy, str(tokens), "yes" if taps else "no", f"{means['mixed']:.1f}",
                    f"{means['tokens']:.0f}", f"{means['padded']:.0f}",
                    *(f"{1e3 * means[part]:.0f}" for part in PARTS),
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    publish(args.out, lines)


def _order(names: Sequence[str], count: int) -> list[str]:
    """So many visits, in an order that is the same in every run."""
    shuffled = random.Random(0).sample(list(names), len(names))
    return [shuffled[i % len(shuffled)] for i in range(count)]


def _measured(
    model: Any,
    weights: dict[str, torch.Tensor],
    scale: Scale,
    data: SeedData,
    visited: Sequence[str],
    turns: int,
) -> dict[Way, dict[str, float]]:
    """Of each way, the medians over turns of the means over steps."""
    ways = [(tokens, taps) for tokens in (scale.tokens, CUT) for taps in (False, True)]
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(turns):
        for tokens, taps in ways:
            model.load_state_dict(weights)
            found[tokens, taps].append(_turn(model, scale, data, visited, tokens, taps))
    return {
        way: {key: statistics.median(one[key] for one in each) for key in each[0]}
        for way, each in found.items()
    }


def _turn(
    model: Any, scale: Scale, data: SeedData, visited: Sequence[str], tokens: int, taps: bool
) -> dict[str, float]:
    live = Live(model, scale, 0, data.pool) if taps else None
    trainer = Trainer(model, scale.lr, scale.warmup, tokens, live)

    def step(i: int) -> float:
        names = visited[i * scale.prompts : (i + 1) * scale.prompts]
        generator = torch.Generator(scale.device).manual_seed(i)
        return trainer.step([data.problems[n] for n in names], scale.group, generator, names).mixed

    with contextlib.nullcontext() if live is None else live.sketcher:
        step(0)  # what is done once: the checks of the taps among it
        trainer.spent.clear()
        begun, count = time.process_time(), len(visited) // scale.prompts
        mixed = statistics.fmean(step(i) for i in range(count))
        spent = trainer.spent + Counter({"all": time.process_time() - begun})
    return {"mixed": scale.prompts * mixed} | {key: value / count for key, value in spent.items()}


if __name__ == "__main__":
    main()
