"""Which levers change what is chosen, without the noise of training: ``python -m benchmarks.rlvr_mini.choices``.

Two runs differ by chance more than most levers change them. So each lever chooses once more under the policy that
CROPI's own run ended with, where the ratio pi / beta is no longer 1, and its choice is compared with that of exact
gradients under the same policy.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.lib.environment import describe
from benchmarks.lib.script import publish
from benchmarks.rlvr_mini.arms import ARMS, LEVERS, choose
from benchmarks.rlvr_mini.config import SCALES, Scale, options_of_finished
from benchmarks.rlvr_mini.data import base_model, seed_data
from cropi.atomic import write_atomic
from cropi.errors import CropiError

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
    parser = options_of_finished(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 .. the scale's number of seeds - 1")
    args = parser.parse_args(arguments)
    scale = SCALES[args.scale]
    work = args.work / scale.name
    seeds = list(range(scale.seeds)) if args.seeds is None else args.seeds
    for path in [work / f"seed{seed}" / "cropi" / "policy.pt" for seed in seeds]:
        if not path.exists():
            raise CropiError(f"{path} is missing; run python -m benchmarks.rlvr_mini --arms cropi first")
    torch.set_num_threads(1)
    shared: dict[str, list[float]] = {arm.label: [] for arm in COMPARED}
    targeted: dict[str, list[float]] = {arm.label: [] for arm in (ARMS["cropi_exact"], *COMPARED)}
    for seed in seeds:
        found = _choices(scale, seed, work)
        exact = set(found[ARMS["cropi_exact"].label])
        for label, each in shared.items():
            each.append(len(exact & set(found[label])) / len(exact))
        for label, each in targeted.items():
            # Ids begin with the family.
            among = [name.split("-")[0] in scale.targeted for name in found[label]]
            each.append(sum(among) / len(among))
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
    publish(args.out, lines)


def _choices(scale: Scale, seed: int, work: Path) -> dict[str, list[str]]:
    """What each way chooses with one seed, by label; kept in the work folder, so a stopped command goes on."""
    folder = work / f"seed{seed}"
    path = folder / "choices.json"
    found: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    model = base_model(scale, work)
    data = seed_data(scale, seed, model, folder)  # collected by the base policy, as the arms' was
    model.load_state_dict(torch.load(folder / "cropi" / "policy.pt", map_location=scale.device))
    for arm in (ARMS["cropi_exact"], *COMPARED):
        if arm.label not in found:
            with tempfile.TemporaryDirectory() as kept:
                sketches = Path(kept) / "sketches"
                found[arm.label] = choose(arm, scale, seed, 0, model, data.pool, data.valid, sketches)
            write_atomic(path, json.dumps(found))
    return found


if __name__ == "__main__":
    main()
