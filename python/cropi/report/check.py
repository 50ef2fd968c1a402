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
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from cropi.data.readers import read
from cropi.data.rewards import no_gradient_reason
from cropi.errors import CropiError
from cropi.gradient.behaviour import Behaviour, resolve_behaviour
from cropi.gradient.estimators import ESTIMATORS, Estimator
from cropi.gradient.tokenize import TokenGroup, TooLong
from cropi.model.placing import tokens_at_once
from cropi.model.policy import Policy, check_dropout
from cropi.report.exact import by_depth, exact_bytes, exact_gradients, leave_one_out
from cropi.report.policy import is_close, policy_text
from cropi.sketching.groups import sketch_groups
from cropi.sketching.interrupt import Interrupted
from cropi.sketching.job import SketchJob, make_tokenize, open_store, with_date
from cropi.sketching.passes import Others
from cropi.sketching.run import check_tokens, scan_groups
from cropi.sketching.summary import peak_memory_gib
from cropi_kernels import Coverage, SketchSpec

OK, WARN, FAIL = "ok", "warning", "failed"
SEEDS = 8  # other seeds, where there are no exact gradients
EXACT_LIMIT = 4 << 30  # bytes of exact gradients that are kept at once
MOVED = 0.04, 0.08  # what drawing 16 validation prompts a set anew does to scores (docs/trust.md)
# Bounds of the verdict. The error: a quarter of what other validation prompts do is invisible, and as much is not.
# Rounding: sums of T float32 products differ by about
# 2^-24 sqrt(T) between two orders; the rest is the model's own forward in its dtype.
ERROR_OK, ERROR_BAD = 0.02, 0.06
FAR = 4  # times 1/sqrt(dim): layers of one model reach 2 (docs/fidelity.md)
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Finding:
    """One line of the verdict: ``level`` is "ok", "warning" or "failed"."""

    name: str
    level: str
    text: str


@dataclass
class CheckReport:
    """The figures that :func:`cropi.check` measured, and its verdict.

    Attributes:
        prompts: in the sample.
        dim: numbers in a sketch.
        method: "exact" or "seeds": what sketched scores were compared with.
        error: rms of sketched minus exact scores, or its estimate from other seeds.
        seeds: how many other seeds; 0 for exact gradients.
        theory: ``1 / sqrt(dim)``, the standard error of a cosine near zero.
        agreement: share of the sample's top quarter by exact scores that sketches find too (None by seeds).
        layouts, batches, attention: largest relative difference of a sketch between shared and padded rows, between
            prompts together and alone, between the model's attention and eager attention; None: not tried.
        seconds, exact_seconds: per prompt. ``tokens_per_second`` through the model. ``peak_gib``: most memory in use.
        ratio, ess: of the sample's tokens (:class:`cropi.gradient.health.Health`); None where no log-probs of the
            policy that made them are used.
        bytes_per_prompt: of a store row in ``float32``.
        coverage: what is sketched. ``by_layer``, ``by_type``: share of the squared gradient norm (exact only).
        findings: the verdict, line by line.

    >>> import cropi
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> records = [{"id": str(i), "prompt_ids": [5, i], "response_ids": [[8, 1], [9, 1]], "rewards": [1.0, 0.0]}
    ...     for i in range(6)]
    >>> report = cropi.check(model, records, dim=8192, progress=False)
    >>> report.prompts, report.method, report.error < 0.06
    (6, 'exact', True)
    >>> [finding.name for finding in report.findings if finding.level == "failed"]
    []
    """

    prompts: int
    dim: int
    method: str
    error: float
    theory: float
    agreement: float | None
    layouts: float | None
    batches: float | None
    attention: float | None
    seconds: float
    exact_seconds: float | None
    tokens_per_second: float
    bytes_per_prompt: int
    coverage: str
    seeds: int = 0
    ratio: float | None = None
    ess: float | None = None
    peak_gib: float = 0.0
    by_layer: dict[str, float] = field(default_factory=dict)
    by_type: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(finding.level != FAIL for finding in self.findings)

    @property
    def verdict(self) -> str:
        """All findings in one sentence."""
        failed, doubtful = (
            ", ".join(finding.name for finding in self.findings if finding.level == level)
            for level in (FAIL, WARN)
        )
        if failed:
            return f"do not sketch the pool yet: what failed ({failed}) would make its scores wrong"
        if doubtful:
            return f"the pool can be sketched, but read the warnings first ({doubtful})"
        return (
            f"the pool can be sketched: scores will be off by about {self.error:.4f}, where other validation prompts "
            f"move them by {MOVED[0]} to {MOVED[1]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"ok": self.ok, "verdict": self.verdict}

    def pool(self, prompts: int) -> str:
        """What a pool of so many prompts would cost, in words."""
        gigabytes = prompts * self.bytes_per_prompt / 1e9
        return (
            f"{prompts:,} prompts: {_duration(prompts * self.seconds)} on this machine, a store of {gigabytes:.2g} GB "
            f"in float32 ({gigabytes / 4:.2g} GB in int8)"
        )

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        mark = {OK: "ok     ", WARN: "warning", FAIL: "FAILED "}
        lines = [f"{mark[f.level]}  {f.name:<{width}}  {f.text}" for f in self.findings]
        return "\n".join([*lines, f"verdict: {self.verdict}"])


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
    """Hold the sketch to exact gradients on a sample of prompts.

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
    >>> found = check_groups(Policy(model), sample, spec=SketchSpec(dim=4096))
    >>> found.method, found.prompts, found.ok
    ('exact', 6, True)
    """
    check_dropout(policy.model, "model")
    spec = SketchSpec() if spec is None else spec
    source = behaviour if isinstance(behaviour, Behaviour) else Behaviour(behaviour)
    sample = [group for group in groups if no_gradient_reason(group.group.rewards) is None]
    if len(sample) < 4:
        raise CropiError(
            f"the sample holds {len(sample)} prompts with a gradient ({len(groups)} in all): give at least 4, better "
            "16, whose rewards differ"
        )

    def sketched(
        some: Sequence[TokenGroup], seed: int = spec.seed, **changes: Any
    ) -> tuple[torch.Tensor, Any]:
        options: dict[str, Any] = {"layout": "auto", "tokens_per_batch": tokens_per_batch} | changes
        job = SketchJob((), None, replace(spec, seed=seed), exclude=exclude, estimator=estimator)
        with open_store(policy, job, source) as store:
            summary = sketch_groups(
                policy, some, store, estimator, behaviour=source, exclude=exclude, **options
            )
        if summary.interrupted:
            raise Interrupted(None, summary)
        rows = {row.id: vector for kept, table in store.shards() for row, vector in zip(kept, table)}
        bad = [row for row in store.rows() if row.id not in rows]
        if bad:
            raise CropiError(f"prompt {bad[0].id!r} of the sample has no usable sketch: {bad[0].reason}")
        return torch.stack([rows[group.id] for group in some]).double(), summary

    coverage = _coverage(policy, spec, exclude)
    if exact is None:
        exact = exact_bytes(policy, coverage.names, len(sample)) <= EXACT_LIMIT
    # Gradients that are formed one by one (few models have some) are formed for one sketch at a time.
    count = 0 if exact else 1 if coverage.by_kind.get("exact") else SEEDS
    others = Others([replace(spec, seed=spec.seed + 1 + i) for i in range(count)])
    say(f"sketching {len(sample)} prompts" + (f", by {count} other seeds too" if count > 1 else ""))
    begun = time.monotonic()
    first, summary = sketched(sample, others=others if count > 1 else None)
    seconds = (time.monotonic() - begun) / len(sample)
    scores = leave_one_out(first @ first.T)
    report = CheckReport(
        len(sample), spec.dim, "exact", 0.0, 1 / math.sqrt(spec.dim), None, None, None, None, seconds, None,
        summary.model_tokens / max(summary.wall, 1e-9), 4 * spec.dim, summary.coverage,
    )  # fmt: skip
    if estimator.ratio and source.source != "current":
        report.ratio, report.ess = summary.health.ratio, summary.health.ess
    if exact:
        say("forming their exact gradients, one at a time")
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
    else:
        report.method, report.seeds = "seeds", count
        if count == 1:
            say("sketching them by another seed")
            tables = [sketched(sample, seed=others.specs[0].seed)[0]]
        else:
            tables = list(torch.stack([others.sums[group.id] for group in sample], dim=1).double())
        report.error = error_by_seeds(scores, torch.stack([leave_one_out(rows @ rows.T) for rows in tables]))
    say("trying other layouts, batches and attention")
    _invariances(policy, sample, first, sketched, report)
    report.peak_gib = peak_memory_gib(policy.device)
    _verdict(policy, report, pool, exact_bytes(policy, coverage.names, len(sample)))
    return report


def _invariances(
    policy: Policy,
    sample: Sequence[TokenGroup],
    first: torch.Tensor,
    sketched: Callable[..., tuple[torch.Tensor, Any]],
    report: CheckReport,
) -> None:
    """Compute the sketches of the four shortest prompts in other layouts, batches and attentions, and compare them."""
    size = {group.id: len(group.prompt) + sum(map(len, group.responses)) for group in sample}
    some = sorted(range(len(sample)), key=lambda i: size[sample[i].id])[:4]
    few, want = [sample[i] for i in some], first[some]
    report.layouts = _difference(sketched(few, layout="padded")[0], want)
    report.batches = _difference(torch.cat([sketched([group], tokens_per_batch=1)[0] for group in few]), want)
    model: Any = policy.model
    before = getattr(model.config, "_attn_implementation", None)
    if before not in (None, "eager") and hasattr(model, "set_attn_implementation"):
        try:
            model.set_attn_implementation("eager")
            report.attention = _difference(sketched(few, layout="padded")[0], want)
        finally:
            model.set_attn_implementation(before)


def _verdict(policy: Policy, report: CheckReport, pool: int | None, needed: int) -> None:
    """Every figure in words; ``needed``: bytes of the sample's exact gradients."""

    def add(name: str, level: str, text: str) -> None:
        report.findings.append(Finding(name, level, text))

    against = (
        "exact gradients"
        if report.method == "exact"
        else f"{report.seeds} other seed{'s' * (report.seeds > 1)} of the sketch; exact gradients would take "
        f"{needed / 1e9:.1f} GB, --against exact"
    )
    strange = report.error > FAR * report.theory
    level = FAIL if strange or report.error > ERROR_BAD else OK if report.error <= ERROR_OK else WARN
    advice = (
        "; no sketch is so far off by chance: report this model"
        if strange
        else "; a larger --dim makes it smaller"
    )
    add(
        "sketch error",
        level,
        f"scores are off by {report.error:.4f} (rms over {report.prompts} prompts, against {against}); the theory's "
        f"1/sqrt({report.dim}) is {report.theory:.4f}" + ("" if level == OK else advice),
    )
    if report.agreement is not None:
        top = max(1, report.prompts // 4)
        add(
            "top quarter",
            OK if report.agreement >= 0.5 else WARN,
            f"{report.agreement:.0%} of the best {top} are found",
        )
    bound = ROUNDING.get(policy.dtype, 1e-3)
    for name, value, what in (
        ("layout", report.layouts, "a prompt's responses in one row or in rows of their own"),
        ("batch", report.batches, "prompts together or alone"),
        ("attention", report.attention, "the model's attention or eager attention"),
    ):
        if value is not None:
            add(
                name,
                OK if value <= bound else FAIL,
                f"{what}: sketches differ by {value:.1e} of their length (rounding: up to {bound:.0e})",
            )
    close = report.ratio is None or is_close(report.ratio, report.ess)
    add(
        "policy",
        OK if close else WARN,
        "ratio 1 is taken: no log-probs of the policy that made the responses are used"
        if report.ratio is None
        else policy_text(report.ratio, report.ess, "the tokens"),
    )
    add("coverage", OK, report.coverage.splitlines()[0])
    if report.by_type:
        ranked = sorted(report.by_type.items(), key=lambda pair: -pair[1])[:4]
        add(
            "gradient",
            OK,
            "squared norm by type: " + ", ".join(f"{kind} {share:.0%}" for kind, share in ranked),
        )
    slower = (
        f"; an exact gradient takes {report.exact_seconds:.2f} s" if report.exact_seconds is not None else ""
    )
    rate = f"{report.seconds:.2f} s a prompt, {report.tokens_per_second:.0f} tokens/s{slower}"
    add("cost", OK, f"{rate}; {report.peak_gib:.1f} GiB of memory at most, this check's included")
    if pool:
        add("pool", OK, report.pool(pool))


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


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


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
    if n < 4:
        raise CropiError(f"n must be at least 4, got {n}")
    if job.grouped:
        raise CropiError("layer_groups, groups: the sketch of all parameters is checked; leave them out here")
    groups = read(job.trajectories, skip_bad=job.skip_bad, columns=job.columns)
    scan = scan_groups(policy, job, groups)
    check_tokens(policy, job, groups, scan)
    behaviour = resolve_behaviour(job.behaviour, scan, job.estimator, job.behaviour_model)
    job = with_date(policy, job, scan)
    tokens = make_tokenize(policy, job)
    usable = [group.id for group in groups.each() if no_gradient_reason(group.rewards) is None]
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
    picked = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count]
    return [names[i] for i in sorted(picked.tolist())]
