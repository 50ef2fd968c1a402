"""Check the sketch on one's own model and data: how far sketched scores are from exact ones, and what a prompt costs.

The score of a prompt in the sample is the cosine of its gradient with the mean of all the others' (leave one out). It
is computed from sketches and, where memory allows, from exact gradients (plain autograd, the model's own forward).
Where it does not, other seeds of the sketch take their place. Their errors are independent, so that the mean of S of
them is S times nearer to the truth in square, and with v the variance between them ::

    error^2 = mean over prompts of (score - mean of the others)^2  -  v / S

All of them come from one pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from cropi.checked import fits
from cropi.errors import CropiError
from cropi.gradient.behaviour import Behaviour, resolve_behaviour
from cropi.gradient.estimators import ESTIMATORS, Estimator
from cropi.gradient.tokenize import TokenGroup, TooLong
from cropi.model.placing import tokens_at_once
from cropi.model.policy import Policy, check_dropout
from cropi.report.check_report import CheckReport
from cropi.report.exact import by_depth, exact_bytes, exact_gradients, leave_one_out, standard_errors
from cropi.sketching.groups import sketch_groups
from cropi.sketching.interrupt import Interrupted
from cropi.sketching.job import SketchJob, make_tokenize, with_date
from cropi.sketching.job_store import manifest_of, open_store
from cropi.sketching.passes import Others
from cropi.sketching.run import check_tokens, scan_groups
from cropi.sketching.summary import Summary, peak_memory_gib
from cropi_kernels import Coverage, SketchSpec

SEEDS = 8  # other seeds, where there are no exact gradients
EXACT_LIMIT = 4 << 30  # bytes of exact gradients that are kept at once


def check_groups(
    policy: Policy,
    groups: Sequence[TokenGroup],
    *,
    spec: SketchSpec | None = None,
    estimator: Estimator = ESTIMATORS["cropi"],
    behaviour: Behaviour | str = "current",
    exclude: Sequence[str] = (),
    tokens_per_batch: int = 1024,
    pool: int | None = None,
    exact: bool | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> CheckReport:
    """Compare sketches with exact gradients on a sample of prompts.

    Args:
        policy: the current policy.
        groups: the sample, tokenised; prompts whose rewards are all equal are left out. 16 give the error to about 18 %
            (``1 / sqrt(2 n)``).
        spec: the sketch; default ``SketchSpec()``.
        estimator, behaviour, exclude, tokens_per_batch: as for sketching.
        pool: prompts of the whole pool, for the projection of cost.
        exact: compare with exact gradients (True), with other seeds (False), or as memory allows (None): exact
            gradients of the sample take two bytes a parameter and prompt.
        say: takes a line about what is being done.

    Raises:
        CropiError: fewer than four prompts with a gradient, or a model that cannot be sketched.

    >>> import torch, transformers, cropi.gradient.tokenize as t
    >>> from cropi.data.records import PromptGroup
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, hidden_size=32,
    ...     intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)).eval()
    >>> record = PromptGroup("a", None, None, [1.0, 0.0], response_ids=[[3, 4], [5, 6]])
    >>> from dataclasses import replace
    >>> tokenize = t.Tokenize(None, 32, None, eos=False)
    >>> sample = [tokenize(replace(record, id=str(i), prompt_ids=[1, i])) for i in range(6)]
    >>> report = check_groups(Policy(model), sample, spec=SketchSpec(dim=4096))
    >>> report.method, report.prompts, report.ok
    ('exact', 6, True)
    """
    check_dropout(policy.model, "model")
    spec = SketchSpec() if spec is None else spec
    source = behaviour if isinstance(behaviour, Behaviour) else Behaviour(behaviour)
    sample = [group for group in groups if group.group.no_gradient is None]
    if len(sample) < 4:
        raise CropiError(
            f"the sample holds {len(sample)} prompts with a gradient ({len(groups)} in all): give at least 4, better "
            "16, whose rewards differ"
        )

    job = SketchJob((), None, spec, exclude=exclude, estimator=estimator, tokens_per_batch=tokens_per_batch)
    sketches = _Sketches(policy, job, source)
    coverage = _coverage(policy, spec, exclude)
    if exact is None:
        exact = exact_bytes(policy, coverage.names, len(sample)) <= EXACT_LIMIT
    # Gradients that are formed one by one (few models have some) are formed for one sketch at a time.
    count = 0 if exact else 1 if coverage.by_kind.get("exact") else SEEDS
    others = Others([_seeded(spec, spec.seed + 1 + i) for i in range(count)])
    say(f"sketching {len(sample)} prompts" + (f", by {count} other seeds too" if count > 1 else ""))
    begun = time.monotonic()
    first, summary = sketches.of(sample, others=others if count > 1 else None)
    seconds = (time.monotonic() - begun) / len(sample)
    scores = leave_one_out(first @ first.T)
    report = CheckReport(
        len(sample), spec.dim, "exact", 0.0, 1 / math.sqrt(spec.dim), None, None, None, None, seconds, None,
        summary.model_tokens / max(summary.wall, 1e-9), 4 * spec.dim, summary.coverage, spec=spec.to_dict(),
        model=policy.fingerprint, moved=_rms(standard_errors(first @ first.T)),
    )  # fmt: skip
    if estimator.ratio and source.source != "current":
        report.ratio, report.ess = summary.health.ratio, summary.health.ess
    if exact:
        say("forming their exact gradients, one at a time")
        _against_exact(policy, sample, coverage, estimator, source, tokens_per_batch, scores, report)
    else:
        report.method, report.seeds = "seeds", count
        if count == 1:
            say("sketching them by another seed")
            tables = [sketches.of(sample, spec=others.specs[0])[0]]
        else:
            tables = list(torch.stack([others.sums[group.id] for group in sample], dim=1).double())
        report.error = error_by_seeds(scores, torch.stack([leave_one_out(rows @ rows.T) for rows in tables]))
    say("trying other layouts, batches and attention")
    _invariances(sketches, sample, first, report)
    report.peak_gib = peak_memory_gib(policy.device)
    report.judge(policy.dtype, pool, exact_bytes(policy, coverage.names, len(sample)))
    return report


@dataclass(frozen=True)
class _Sketches:
    """How prompts of the sample are sketched, in memory."""

    policy: Policy
    job: SketchJob
    behaviour: Behaviour

    def of(
        self, some: Sequence[TokenGroup], others: Others | None = None, **changes: Any
    ) -> tuple[torch.Tensor, Summary]:
        """Sketches ``[prompts, dim]`` in float64, by a job with other options."""
        job = replace(self.job, **changes)
        with open_store(job, manifest_of(self.policy, job, self.behaviour)) as store:
            summary = sketch_groups(self.policy, some, store, job, self.behaviour, others=others)
        if summary.interrupted:
            raise Interrupted(None, summary)
        rows = {row.id: vector for kept, table in store.shards() for row, vector in zip(kept, table)}
        bad = [row for row in store.rows() if row.id not in rows]
        if bad:
            raise CropiError(f"prompt {bad[0].id!r} of the sample has no usable sketch: {bad[0].reason}")
        return torch.stack([rows[group.id] for group in some]).double(), summary


def _against_exact(
    policy: Policy,
    sample: Sequence[TokenGroup],
    coverage: Coverage,
    estimator: Estimator,
    source: Behaviour,
    tokens_per_batch: int,
    scores: torch.Tensor,
    report: CheckReport,
) -> None:
    """Compare the sample's ``scores`` [n] with those of exact gradients, and share their norm out to layers."""
    begun = time.monotonic()
    made = exact_gradients(
        policy, sample, coverage.names, estimator, source, tokens_per_batch=tokens_per_batch
    )
    report.exact_seconds = (time.monotonic() - begun) / len(sample)
    truth = leave_one_out(made.gram)
    report.error = _rms(scores - truth)
    top = max(1, len(sample) // 4)
    best = [set(values.topk(top).indices.tolist()) for values in (scores, truth)]
    report.agreement = len(best[0] & best[1]) / top
    for layer, kind, share in by_depth(made.squares):
        report.by_type[kind] = report.by_type.get(kind, 0.0) + share
        if layer:
            report.by_layer[layer] = report.by_layer.get(layer, 0.0) + share


def _invariances(
    sketches: _Sketches, sample: Sequence[TokenGroup], first: torch.Tensor, report: CheckReport
) -> None:
    """Compute the sketches of the four shortest prompts in other layouts, batches and attentions, and compare them."""
    size = {group.id: len(group.prompt) + sum(map(len, group.responses)) for group in sample}
    some = sorted(range(len(sample)), key=lambda i: size[sample[i].id])[:4]
    few, want = [sample[i] for i in some], first[some]
    report.layouts = _difference(sketches.of(few, layout="padded")[0], want)
    alone = torch.cat([sketches.of([group], tokens_per_batch=1)[0] for group in few])
    report.batches = _difference(alone, want)
    model: Any = sketches.policy.model
    before = getattr(model.config, "_attn_implementation", None)
    if before not in (None, "eager") and hasattr(model, "set_attn_implementation"):
        try:
            model.set_attn_implementation("eager")
            report.attention = _difference(sketches.of(few, layout="padded")[0], want)
        finally:
            model.set_attn_implementation(before)


def _seeded(spec: SketchSpec, seed: int) -> SketchSpec:
    """The spec with another seed; of one that was stored, all else stays as it is."""
    return SketchSpec.from_dict(spec.to_dict() | {"seed": seed})


def _coverage(policy: Policy, spec: SketchSpec, exclude: Sequence[str]) -> Coverage:
    with policy.sketcher(spec, tuple(exclude)) as sketcher:
        sketcher.check_model()  # which may find more gradients that have to be formed
        return sketcher.coverage


def error_by_seeds(scores: torch.Tensor, others: torch.Tensor) -> float:
    """The rms error of scores ``[n]`` by one seed, from the scores ``[S, n]`` by S others."""
    count = len(others)
    square = float((scores - others.mean(dim=0)).square().mean())
    if count == 1:  # both have the same share in it
        return math.sqrt(square / 2)
    of_mean = float(others.var(dim=0).mean()) / count
    return math.sqrt(max(square - of_mean, of_mean))


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest relative difference between rows of two tables of sketches."""
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def check_job(
    policy: Policy,
    job: SketchJob,
    *,
    n: int = 16,
    seed: int = 0,
    exact: bool | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> CheckReport:
    """:func:`check_groups` on ``n`` prompts with a gradient, drawn at random from a job's trajectories.

    Args:
        policy: the current policy.
        job: the options; ``out`` is not used.
        n: prompts in the sample, at least 4.
        seed: of the draw.
        exact, say: see :func:`check_groups`.

    Raises:
        CropiError: ``n`` below 4, bad records, or fewer than four prompts with a gradient.
    """
    if not fits(n, int):
        raise CropiError(f"n must be an integer, got {n!r}")
    if n < 4:
        raise CropiError(f"n must be at least 4, got {n}")
    if job.grouped:
        raise CropiError("layer_groups, groups: the sketch of all parameters is checked; leave them out here")
    groups = job.read()
    scan = scan_groups(policy, job, groups)
    check_tokens(policy, job, groups, scan)
    behaviour = resolve_behaviour(job.behaviour, scan, job.estimator, job.behaviour_model, policy=policy)
    job = with_date(policy, job, scan)
    tokens = make_tokenize(policy, job)
    usable = [group.id for group in groups.each() if group.no_gradient is None]
    sample = []
    for group in groups.take(_drawn(usable, n, seed)):
        with suppress(TooLong):
            sample.append(tokens(group))
    return check_groups(
        policy, sample, spec=job.spec, estimator=job.estimator, behaviour=behaviour, exclude=job.exclude,
        tokens_per_batch=tokens_at_once(policy, job.tokens_per_batch), pool=scan.prompts, exact=exact, say=say,
    )  # fmt: skip


def _drawn(names: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` of the names, drawn at random with ``seed``, in their order."""
    picked = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed), device="cpu")[:count]
    return [names[i] for i in sorted(picked.tolist())]
