"""Which levers change what is chosen, without the noise of training: ``python -m benchmarks.rlvr_mini.choices``.

Two runs differ by chance more than most levers can move them. So each lever chooses once more under the policy that
CROPI's own run ended with, where the ratio pi / beta is no longer 1, and its choice is laid beside that of exact
gradients under the same policy.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.lib.environment import describe
from benchmarks.rlvr_mini.arms import ARMS, LEVERS, choose
from benchmarks.rlvr_mini.config import SCALES
from benchmarks.rlvr_mini.data import base_model, seed_data
from cropi.errors import CropiError
from cropi.files import write_atomic

QUARTER = dataclasses.replace(LEVERS["cropi_quarter60"], label="CROPI, a quarter of the stored responses")
LEVER_NAMES = (
    "cropi_nofold",
    "cropi_width16",
    "cropi_half",
    "cropi_noratio",
    "cropi_normalised",
    "cropi_max",
)
COMPARED = (ARMS["cropi"], *(LEVERS[name] for name in LEVER_NAMES), QUARTER)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu", help="default: cpu")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 .. the scale's number of seeds - 1")
    parser.add_argument("--work", type=Path, default=Path("out/rlvr_mini"), help="the experiment's folder")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args(arguments)
    scale = SCALES[args.scale]
    work = args.work / scale.name
    seeds = list(range(scale.seeds)) if args.seeds is None else args.seeds
    policies = {seed: work / f"seed{seed}" / "cropi" / "policy.pt" for seed in seeds}
    for path in policies.values():
        if not path.exists():
            raise CropiError(f"{path} is missing; run python -m benchmarks.rlvr_mini --arms cropi first")
    torch.set_num_threads(1)
    shared: dict[str, list[float]] = {arm.label: [] for arm in COMPARED}
    targeted: dict[str, list[float]] = {arm.label: [] for arm in (ARMS["cropi_exact"], *COMPARED)}
    for seed, path in policies.items():
        model = base_model(scale, work)
        data = seed_data(
            scale, seed, model, work / f"seed{seed}"
        )  # collected by the base policy, as the arms' was
        model.load_state_dict(torch.load(path, map_location=scale.device))
        found: dict[str, set[str]] = {}
        for arm in (ARMS["cropi_exact"], *COMPARED):
            with tempfile.TemporaryDirectory() as kept:
                chosen = choose(arm, scale, seed, 0, model, data.pool, data.valid, Path(kept) / "sketches")
            found[arm.label] = set(chosen)
            among = [data.problems[name].family in scale.targeted for name in chosen]
            targeted[arm.label].append(sum(among) / len(among))
        exact = found[ARMS["cropi_exact"].label]
        for label, each in shared.items():
            each.append(len(exact & found[label]) / len(exact))
    lines = [
        f"Choices under the last policy of CROPI's run, seeds {', '.join(map(str, seeds))}. {describe()}.",
        "",
        "| how | of exact gradients' choice, per seed | mean | of the targeted families |",
        "|---|---|---|---|",
    ]
    for label, family in targeted.items():
        each = shared.get(label, [1.0] * len(seeds))
        cells = [label, ", ".join(f"{share:.2f}" for share in each), f"{statistics.fmean(each):.2f}"]
        lines.append("| " + " | ".join([*cells, f"{statistics.fmean(family):.2f}"]) + " |")
    write_atomic(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
