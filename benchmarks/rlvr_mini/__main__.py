"""The miniature RLVR experiment, from nothing to table and plots: ``python -m benchmarks.rlvr_mini``.

Everything is kept under ``--work``; the same command goes on where it stopped, whatever stopped it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch

from benchmarks.lib.script import options
from benchmarks.rlvr_mini.arms import ARMS, LEVERS
from benchmarks.rlvr_mini.config import SCALES
from benchmarks.rlvr_mini.data import base_model, seed_data
from benchmarks.rlvr_mini.report import write_report
from benchmarks.rlvr_mini.run import run_arm
from cropi.atomic import write_atomic
from cropi.errors import CropiError


def main(arguments: list[str] | None = None) -> None:
    known = {**ARMS, **LEVERS}
    parser = options(__doc__)
    parser.add_argument(
        "--scale", choices=sorted(SCALES), default="cpu", help="size of everything (default: cpu)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="the same as --scale smoke: minutes on two cores"
    )
    parser.add_argument(
        "--arms", nargs="+", choices=sorted(known), help="default: the eight arms, without levers"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 .. the scale's number of seeds - 1")
    parser.add_argument(
        "--work", type=Path, default=Path("out/rlvr_mini"), help="where everything unfinished is kept"
    )
    parser.add_argument("--out", type=Path, help="where table and plots go (default: WORK/SCALE/report)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is finished")
    args = parser.parse_args(arguments)
    scale = SCALES["smoke" if args.smoke else args.scale]
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise CropiError(f"scale {scale.name!r} needs a CUDA device and torch sees none; use --scale cpu")
    torch.set_num_threads(args.threads)
    work = args.work / scale.name
    _check_scale(work, json.loads(json.dumps(dataclasses.asdict(scale))))
    names = args.arms or list(ARMS)
    seeds = args.seeds if args.seeds is not None else list(range(scale.seeds))
    for seed in [] if args.report_only else seeds:
        for name in names:
            folder = work / f"seed{seed}" / name
            if (folder / "result.json").exists():
                continue
            model = base_model(scale, work)
            data = seed_data(scale, seed, model, work / f"seed{seed}", known[name].pool)
            begun = time.process_time()
            result = run_arm(known[name], scale, seed, model, data, folder)
            last = result["evaluations"][-1]["accuracy"]
            targeted = sum(last[f] for f in scale.targeted) / len(scale.targeted)
            print(
                f"seed {seed} {name}: targeted {targeted:.3f}, {time.process_time() - begun:.0f} s of processor time",
                flush=True,
            )
    write_report(scale, work, args.out or work / "report")


def _check_scale(work: Path, wanted: dict[str, object]) -> None:
    """Numbers of two settings must not mix in one folder."""
    path = work / "scale.json"
    if not path.exists():
        write_atomic(path, json.dumps(wanted, indent=2) + "\n")
        return
    made = json.loads(path.read_text())
    for key in sorted(wanted.keys() | made.keys()):
        if made.get(key) != wanted.get(key):
            raise CropiError(
                f"{work} was made with {key} = {made.get(key)!r}, and this run has {wanted.get(key)!r}; "
                "give another --work, or remove that folder"
            )


if __name__ == "__main__":
    main()
