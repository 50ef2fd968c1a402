"""What a selection's time is made of: ``python -m benchmarks.rlvr_mini.cost``, once the experiment has run.

Processor seconds of one selection under the base policy, for seed 0: the passes without a sketch, then sketches of two
widths from all, a half and a quarter of the stored responses, each with the share of the exact gradients' choice that
it finds; and the training steps that lie between two selections.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.environment import describe
from benchmarks.lib.script import publish
from benchmarks.rlvr_mini.arms import ARMS, choose
from benchmarks.rlvr_mini.config import SCALES, Scale, options_of_finished
from benchmarks.rlvr_mini.data import SeedData, base_model, seed_data
from benchmarks.rlvr_mini.grpo import ESTIMATOR, layout_of, logprobs
from benchmarks.rlvr_mini.rollouts import to_tokens
from cropi.data.records import PromptGroup
from cropi.data.rewards import no_gradient_reason
from cropi.errors import CropiError
from cropi.gradient.batches import MicroBatch, make_batches
from cropi_kernels.sketcher.policy.decoder import split_model

VARIANTS = ((64, 1), (64, 2), (64, 4), (16, 1), (16, 2), (16, 4))  # width, one in so many responses


def main(arguments: list[str] | None = None) -> None:
    parser = options_of_finished(__doc__)
    parser.add_argument(
        "--repeats", type=int, default=3, help="of everything; the median counts (default: 3)"
    )
    args = parser.parse_args(arguments)
    scale = SCALES[args.scale]
    folder = args.work / scale.name / "seed0"
    exact, run = folder / "cropi_exact" / "result.json", folder / "cropi" / "result.json"
    for path in (exact, run):
        if not path.exists():
            raise CropiError(f"{path} is missing; run python -m benchmarks.rlvr_mini --seeds 0 first")
    torch.set_num_threads(1)
    model = base_model(scale, args.work / scale.name)
    data = seed_data(scale, 0, model, folder)
    wanted = set(json.loads(exact.read_text())["selections"][0]["chosen"])
    train = json.loads(run.read_text())["cpu"]["train"] / scale.steps * scale.stage
    lines = [
        f"One selection, seed 0, base policy: {_counts(data.pool)} of the pool and {_counts(data.valid)} of the "
        f"validation sets have a gradient. A stage's {scale.stage} steps of training took {train:.1f} s in CROPI's "
        f"run. Processor seconds of one core, median of {args.repeats}. {describe()}.",
        "",
        "| what | s | share of a stage with it | of exact gradients' choice |",
        "|---|---|---|---|",
        *(_line(name, _median(work, args.repeats), train) for name, work in _passes(model, data, scale)),
    ]
    for width, thin in VARIANTS:
        arm, found = dataclasses.replace(ARMS["cropi"], width=width, thin=thin), set[str]()

        def select(arm: Any = arm, found: set[str] = found) -> None:
            with tempfile.TemporaryDirectory() as kept:
                found.update(choose(arm, scale, 0, 0, model, data.pool, data.valid, Path(kept) / "sketches"))

        seconds = _median(select, args.repeats)
        name = f"sketches of width {width}, {'all' if thin == 1 else f'1 in {thin}'} of the responses"
        lines.append(_line(name, seconds, train, f"{len(wanted & found) / len(wanted):.2f}"))
    publish(args.out, lines)


def _counts(groups: Sequence[PromptGroup]) -> str:
    mixed = [g for g in groups if not no_gradient_reason(g.rewards)]
    return f"{len(mixed)} prompts with {sum(len(g.rewards) for g in mixed)} responses"


def _line(name: str, seconds: float, train: float, shared: str = "") -> str:
    return f"| {name} | {seconds:.2f} | {seconds / (seconds + train):.1%} | {shared} |"


def _median(work: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def _passes(model: Any, data: SeedData, scale: Scale) -> Iterator[tuple[str, Callable[[], None]]]:
    """Forward, then forward and backward with frozen weights, over what a selection goes over."""
    split = split_model(model)
    groups = [
        to_tokens(g) for part in (data.pool, data.valid) for g in part if not no_gradient_reason(g.rewards)
    ]

    def batches() -> Iterator[MicroBatch]:
        made = make_batches(groups, ESTIMATOR, layout_of(model), budget=scale.tokens, stored_behaviour=True)
        return (batch.to(model.device) for batch in made)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches():
            logprobs(split, batch)

    def both() -> None:
        # The embedding's output asks for a gradient, the weights do not: the pass that a sketch cannot do without.
        hook = model.get_input_embeddings().register_forward_hook(lambda *a: a[2].requires_grad_())
        model.requires_grad_(False)
        try:
            for batch in batches():
                logprobs(split, batch).sum().backward()
        finally:
            hook.remove()
            model.requires_grad_(True)

    yield "forward alone", forward
    yield "forward and backward, frozen weights, no sketch", both


if __name__ == "__main__":
    main()
