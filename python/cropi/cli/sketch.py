"""``cropi sketch``: trajectories to a store of sketches."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cropi.cli import dry, options, ranks
from cropi.cli.manners import tell
from cropi.cli.parser import count, shard
from cropi.errors import CropiError
from cropi.options import Reading, Sketching

if TYPE_CHECKING:
    from cropi.distributed.sharding import Group
    from cropi.distributed.team import Team
    from cropi.model.policy import Policy
    from cropi.sketching.job import SketchJob
    from cropi.sketching.summary import Summary

EXAMPLE = "cropi sketch --model Qwen/Qwen2.5-0.5B-Instruct --trajectories train.jsonl --out sketches/train"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--trajectories", nargs="+", required=True, metavar="FILE", help="trajectories (docs/trajectories.md)"
    )
    command.add_argument(
        "--out", required=True, metavar="FOLDER", help="the store; one that is there already is continued"
    )
    command.add_argument(
        "--set", help="name of the validation set, for records that name none (default: none)"
    )
    command.add_argument(
        "--noise", action="store_true",
        help="sketch a draw of the noise of every prompt's gradient, from its finite number of responses, in place of "
        "the gradient, for `cropi influence --noise` (docs/trust.md)",
    )  # fmt: skip
    command.add_argument(
        "--shard", type=shard, metavar="I/N",
        help="sketch only share I of N, which has about as many tokens as the others; each share needs its own --out",
    )  # fmt: skip
    command.add_argument(
        "--ray", metavar="ADDRESS",
        help="run on the nodes of a Ray cluster (auto, host:port, or local), with one worker for each GPU or CPU slot "
        "(docs/scaling.md)",
    )  # fmt: skip
    command.add_argument(
        "--fsdp", type=count, nargs="?", const=0, metavar="N",
        help="under torchrun: N processes (default: all) share the weights (FSDP2), each with prompts of its own",
    )  # fmt: skip
    command.add_argument(
        "--tensor-parallel", type=count, metavar="N",
        help="under torchrun: N processes share the weights and every pass (transformers' tp_plan)",
    )  # fmt: skip
    command.add_argument("--workers", type=count, metavar="N", help="workers of Ray at most (default: all)")
    options.add_model(command, required=True)
    options.add(command, Reading, Sketching)
    options.add_dry_run(command)
    options.add_progress(command)


def run(args: argparse.Namespace) -> int:
    """Sketch, and print the summary."""
    _check_sharing(args)
    if args.ray is not None:
        if args.dry_run:
            raise CropiError("--dry-run is for one process: leave --ray out")
        return _on_ray(args)
    if args.workers is not None:
        raise CropiError(f"--workers {args.workers} is for --ray ADDRESS: give both")
    with ranks.joined(args) as team, ranks.grouped(args, team) as group:
        return _run(args, team, group)


def _check_sharing(args: argparse.Namespace) -> None:
    """Processes that share the weights: what does not go with it.

    Raises:
        CropiError: names both options.
    """
    from cropi.distributed.launch import launched

    given = [name for name in ("fsdp", "tensor_parallel") if getattr(args, name) is not None]
    if not given:
        return
    flag = f"--{given[0].replace('_', '-')}"
    if len(given) == 2:
        raise CropiError("--fsdp and --tensor-parallel are two ways to share the weights: give one")
    apart = ("layer_groups", "groups") if args.tensor_parallel is not None else ()
    for name in ("ray", "shard", "optimizer_state", *apart):
        if getattr(args, name) not in (None, []):
            raise CropiError(f"{flag} does not go with --{name.replace('_', '-')}: leave one out")
    if launched() is None:
        raise CropiError(
            f"{flag} shares the weights among the processes of a launcher, and this one is alone: start it by "
            f"`torchrun --nproc-per-node N -m cropi sketch ... {flag}`, or leave {flag} out"
        )


def _inputs(args: argparse.Namespace, distributed_config: Any = None) -> tuple[Policy, SketchJob]:
    """The policy, not loaded yet, and the job."""
    from cropi.sketching.job import make_job

    policy, behaviour_model = policies(args, distributed_config)
    trajectories = options.opened(args, args.trajectories, policy)
    job = make_job(
        options.made(Sketching, args), trajectories, args.out, set=args.set, behaviour_model=behaviour_model,
        notes=notes(args), noise=args.noise,
    )  # fmt: skip
    return policy, job


def _on_ray(args: argparse.Namespace) -> int:
    from cropi.distributed import ray
    from cropi.distributed.launch import launched

    if args.shard is not None or launched() is not None:
        other = "a launcher's WORLD_SIZE" if args.shard is None else "--shard"
        raise CropiError(f"--ray {args.ray} and {other} are two ways to share one job: give one")
    held = {name: value for name, value in vars(args).items() if name not in ("parser", "run")}
    for name in ("model", "behaviour_model", "adapter", "chat_template", "optimizer_state"):
        if name in held:
            held[name] = ray.absolute(held[name])
    held["trajectories"] = [ray.absolute(path) for path in args.trajectories]
    make = partial(_inputs, argparse.Namespace(**held | {"progress": False}))
    summary = ray.sketch(
        make, args.out, address=args.ray, workers=args.workers, device=args.device, progress=args.progress
    )
    return _said(args, summary)


def _run(args: argparse.Namespace, team: Team | None, group: Group | None) -> int:
    from cropi.sketching.run import check_tokens, scan_groups, sketch

    policy, job = _inputs(args, group and group.config)
    if team is not None:
        from cropi.distributed import ranks as together

        if args.dry_run:
            raise CropiError("--dry-run is for one process: run it without a launcher")
        if args.shard is not None:
            raise CropiError(
                f"--shard {args.shard[0]}/{args.shard[1]} is for processes without a launcher, and WORLD_SIZE="
                f"{team.world} is set: leave --shard out, the processes share the prompts by themselves"
            )
        if team.first:
            print(placed(args, policy, team.world))
        summary = together.sketch(team, policy, job, progress=args.progress, group=group)
        if not team.first:
            return 130 if summary.interrupted else 0
    else:
        job = replace(job, shard=args.shard)
        if args.dry_run:
            job = replace(job, trajectories=job.read())
        scan = scan_groups(policy, job)  # before the time that loading the weights takes is spent
        if args.dry_run:
            check_tokens(policy, job, job.trajectories, scan)
        print(placed(args, policy))
        if args.dry_run:
            return dry.show(args, policy, [("prompts", job.trajectories, job, args.out)])
        summary = sketch(policy, job, scan=scan, progress=args.progress)
    return _said(args, summary)


def _said(args: argparse.Namespace, summary: Summary) -> int:
    from cropi.sketching.interrupt import Interrupted

    print(summary.text())
    tell(args, **summary.to_dict())
    if summary.interrupted:
        return stopped(args, Interrupted(args.out, summary))
    print(f"sketches      {args.out}")
    return 0


def policies(args: argparse.Namespace, distributed_config: Any = None) -> tuple[Policy, Policy | None]:
    """The policy, and the behaviour model or None; weights are loaded when they are first needed.

    ``distributed_config``: how processes share the policy's.
    """
    from cropi.model.policy import Policy

    named = {
        "dtype": args.dtype, "device": args.device, "eos": args.eos, "trust_remote_code": args.trust_remote_code,
        "attn_implementation": args.attn_implementation,
        "progress": args.progress,
    }  # fmt: skip
    behaviour = Policy(args.behaviour_model, **named) if args.behaviour_model else None
    own = {name: getattr(args, name) for name in ("quantize", "adapter", "revision")}  # of the policy alone
    return Policy(args.model, **named, **own, distributed_config=distributed_config), behaviour


def placed(args: argparse.Namespace, policy: Policy, processes: int = 1) -> str:
    """One line that says where the policy runs, in which dtype, and how many tokens at once, which several processes
    agree on later."""
    from cropi.model.placing import tokens_at_once

    device, dtype = policy.plan
    more = "".join(f", {name} {value}" for name in ("quantize", "adapter") if (value := policy.loading[name]))
    if processes > 1:
        kind = str(dtype).removeprefix("torch.")
        return f"running on    {processes} processes, rank 0 on {device}, {kind} weights{more}"
    tokens = tokens_at_once(policy, args.tokens_per_batch)
    return (
        f"running on    {device}, {str(dtype).removeprefix('torch.')} weights{more}, {tokens} tokens a batch"
    )


def notes(args: argparse.Namespace) -> dict[str, str]:
    """What a store notes of the command that made it."""
    return {"model": args.model, "command": _words(args)}


def stopped(args: argparse.Namespace, error: Any) -> int:
    """Say how to go on after Ctrl-C; the exit status."""
    print(
        f"stopped by Ctrl-C; {error.out} keeps the finished prompts. To go on with the rest:", file=sys.stderr
    )
    print(f"  {_words(args)}", file=sys.stderr)
    return 130


def _words(args: argparse.Namespace) -> str:
    return shlex.join(["cropi", args.command, *args.words])
