"""What all arms of one seed share: the base policy, the pool, the validation and test sets, and the stored rollouts."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.generate import generate
from benchmarks.rlvr_mini.model import make_model
from benchmarks.rlvr_mini.pretrain import pretrain
from benchmarks.rlvr_mini.rollouts import to_record
from benchmarks.rlvr_mini.tasks import FAMILIES, Problem, encode, make_set, verify
from cropi.atomic import replacing, write_atomic
from cropi.data.readers import read
from cropi.data.records import PromptGroup


@dataclass(frozen=True)
class SeedData:
    """``problems`` maps the pool's ids to its problems; ``pool`` and ``valid`` are their stored trajectories.

    ``collect_cpu`` is the processor time in seconds that the rollouts took.
    """

    problems: dict[str, Problem]
    pool: list[PromptGroup]
    valid: list[PromptGroup]
    test: dict[str, list[Problem]]
    collect_cpu: float


def save_torch(path: Path, value: Any) -> None:
    """``torch.save``, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(value, temporary)


def base_model(scale: Scale, work: Path) -> Any:
    """The base policy: trained on the first call (with a checkpoint now and then), read back afterwards."""
    model, path = make_model(scale, 0), work / "base.pt"
    if not path.exists():
        begun = time.process_time()
        pretrain(model, scale, 0, work / "base-unfinished.pt")
        print(f"base policy trained: {time.process_time() - begun:.0f} s of processor time", flush=True)
        save_torch(path, model.state_dict())
        (work / "base-unfinished.pt").unlink(missing_ok=True)
    model.load_state_dict(torch.load(path, map_location=scale.device))
    return model.eval()


def seed_data(scale: Scale, seed: int, model: Any, folder: Path, pool_times: int = 1) -> SeedData:
    """The problems of a seed (made again every time: they follow from it) and their rollouts (made once).

    With ``pool_times`` above 1 the pool has so many times the problems per cell: the seed's own with their rollouts,
    and further ones. Validation and test sets are the seed's own, so arms on both pools answer the same questions.
    """
    rng, taken = random.Random(f"problems {seed}"), set[str]()
    pool = make_set(scale.pool_cell, rng, evaluation=False)
    valid = make_set(scale.valid_cell, rng, evaluation=True, families=scale.targeted, taken=taken)
    test = {f: make_set(scale.test_cell, rng, evaluation=True, families=(f,), taken=taken) for f in FAMILIES}
    problems = {f"{p.family}-{p.difficulty}-{i:04d}": p for i, p in enumerate(pool)}
    named = {f"valid-{p.family}-{p.difficulty}-{i:04d}": p for i, p in enumerate(valid)}
    generator = torch.Generator(scale.device).manual_seed(1000 + seed)
    begun, done = time.process_time(), folder / "collected.json"
    if not done.exists():
        _collect(model, problems, scale.train_rollouts, generator, folder / "pool.jsonl.gz", None)
        _collect(model, named, scale.valid_rollouts, generator, folder / "valid.jsonl.gz", "family")
        write_atomic(done, json.dumps({"cpu": time.process_time() - begun}))
    data = SeedData(
        problems,
        list(read(folder / "pool.jsonl.gz")),
        list(read(folder / "valid.jsonl.gz")),
        test,
        float(json.loads(done.read_text())["cpu"]),
    )
    return data if pool_times == 1 else _enlarge(data, scale, seed, model, folder, pool_times)


def _enlarge(data: SeedData, scale: Scale, seed: int, model: Any, folder: Path, times: int) -> SeedData:
    rng, taken = random.Random(f"problems {seed}, pool x {times}"), {p.prompt for p in data.problems.values()}
    made = make_set((times - 1) * scale.pool_cell, rng, evaluation=False, taken=taken)
    more = {f"{p.family}-{p.difficulty}-{i:04d}": p for i, p in enumerate(made, len(data.problems))}
    path, done = folder / f"pool-x{times}.jsonl.gz", folder / f"collected-x{times}.json"
    if not done.exists():
        begun = time.process_time()
        generator = torch.Generator(scale.device).manual_seed(2000 + 100 * times + seed)
        _collect(model, more, scale.train_rollouts, generator, path, None)
        write_atomic(done, json.dumps({"cpu": time.process_time() - begun}))
    cpu = data.collect_cpu + float(json.loads(done.read_text())["cpu"])
    pool = sorted([*data.pool, *read(path)], key=lambda record: record.id)
    return SeedData(data.problems | more, pool, data.valid, data.test, cpu)


def _collect(
    model: Any,
    problems: dict[str, Problem],
    count: int,
    generator: torch.Generator,
    path: Path,
    sets: str | None,
) -> None:
    """Roll out in order of length (little padding), and store the records with the log-probs as sampled."""
    names = sorted(problems, key=lambda name: (len(problems[name].prompt), name))
    rollouts = generate(model, [encode(problems[n].prompt) for n in names], count, generator=generator)
    records = [
        to_record(problems[n], made, n, problems[n].family if sets else None)
        for n, made in zip(names, rollouts, strict=True)
    ]
    records.sort(key=lambda record: record.id)
    lines = "".join(json.dumps(record.to_record(), ensure_ascii=False) + "\n" for record in records)
    write_atomic(path, gzip.compress(lines.encode()))


def accuracy(model: Any, problems: Sequence[Problem], samples: int, seed: int) -> float:
    """Share of right answers, ``samples`` responses per problem at temperature 1; 0: the greedy answer."""
    generator = torch.Generator(model.device).manual_seed(seed) if samples else None
    ordered = sorted(problems, key=lambda p: len(p.prompt))
    rollouts = generate(model, [encode(p.prompt) for p in ordered], samples or 1, generator=generator)
    right = [verify(p, r.ids) for p, made in zip(ordered, rollouts, strict=True) for r in made]
    return sum(right) / len(right)
