"""What `cropi check` reports: its figures, and the verdict on them in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cropi.amounts import duration, size
from cropi.report.policy import TAKEN, is_close, policy_text

OK, WARN, FAIL = "ok", "warning", "failed"
# Bounds of the verdict. The error: 16 other validation prompts moved scores of the example data by 0.04 to 0.08; a
# quarter of that is invisible beside it, and as much is not.
# Rounding: sums of T float32 products differ by about 2^-24 sqrt(T) between two orders; the rest is the model's own
# forward in its dtype.
ERROR_OK, ERROR_BAD = 0.02, 0.06
FAR = 4  # times 1/sqrt(dim): layers of one model reach 2 (docs/fidelity.md)
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Finding:
    """One line of the verdict: ``level`` is "ok", "warning" or "failed"."""

    name: str
    level: str
    text: str


@dataclass(repr=False)
class CheckReport:
    """The figures that :func:`cropi.check` measured, and its verdict.

    Attributes:
        prompts: in the sample.
        dim: numbers in a sketch.
        method: "exact" or "seeds": what sketched scores were compared with.
        error: rms of sketched minus exact scores, or its estimate from other seeds.
        seeds: how many other seeds; 0 for exact gradients.
        moved: rms standard error of the sample's scores, where the mean of all its other prompts is what a prompt is
            compared with: what as many other validation prompts would move a score by.
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
        spec, model: of the sketches, as a store's manifest has them.

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
    spec: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    moved: float = math.nan

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
            f"the pool can be sketched: scores will be off by about {self.error:.4f}; against {self.prompts - 1} "
            f"validation prompts like the sample's, others would move them by about {self.moved:.4f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"ok": self.ok, "verdict": self.verdict}

    def pool(self, prompts: int) -> str:
        """The cost of a pool of so many prompts, in words."""
        stored = prompts * self.bytes_per_prompt
        return (
            f"{prompts:,} prompts: {duration(prompts * self.seconds)} on this machine, a store of {size(stored)} in "
            f"float32 ({size(stored / 4)} in int8)"
        )

    def judge(self, dtype: torch.dtype, pool: int | None, needed: int) -> None:
        """Put every figure in words, as findings.

        Args:
            dtype: of the weights, which bounds what rounding may do.
            pool: prompts of the whole pool, for its cost; None: it is not said.
            needed: bytes of the sample's exact gradients.
        """
        self.findings.append(self._of_error(needed))
        if self.agreement is not None:
            best = max(1, self.prompts // 4)
            level = OK if self.agreement >= 0.5 else WARN
            self._add(
                "top quarter", level, f"{self.agreement:.0%} of the best {best} are among the sketched best"
            )
        bound = ROUNDING.get(dtype, 1e-3)
        for name, value, what in (
            ("layout", self.layouts, "a prompt's responses in one row or in rows of their own"),
            ("batch", self.batches, "prompts together or alone"),
            ("attention", self.attention, "the model's attention or eager attention"),
        ):
            if value is not None:
                differ = (
                    f"{what}: sketches differ by {value:.1e} of their length (rounding: up to {bound:.0e})"
                )
                self._add(name, OK if value <= bound else FAIL, differ)
        if self.ratio is None:
            self._add("policy", OK, TAKEN)
        else:
            close = is_close(self.ratio, self.ess)
            self._add("policy", OK if close else WARN, policy_text(self.ratio, self.ess, "the tokens"))
        self._add("coverage", OK, self.coverage.splitlines()[0])
        if self.by_type:
            ranked = sorted(self.by_type.items(), key=lambda pair: -pair[1])[:4]
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in ranked)
            self._add("gradient", OK, f"squared norm by type: {shares}")
        rate = f"{self.seconds:.2f} s a prompt, {self.tokens_per_second:.0f} tokens/s"
        if self.exact_seconds is not None:
            rate += f"; an exact gradient takes {self.exact_seconds:.2f} s"
        self._add("cost", OK, f"{rate}; {self.peak_gib:.1f} GiB of memory at most, this check's included")
        if pool:
            self._add("pool", OK, self.pool(pool))

    def _add(self, name: str, level: str, text: str) -> None:
        self.findings.append(Finding(name, level, text))

    def _of_error(self, needed: int) -> Finding:
        """The finding about the error of scores; ``needed``: bytes of the sample's exact gradients."""
        against = "exact gradients"
        if self.method != "exact":
            seeds = f"{self.seeds} other seed{'s' * (self.seeds > 1)} of the sketch"
            against = f"{seeds}; exact gradients would take {needed / 1e9:.1f} GB, --against exact"
        strange = not self.error <= FAR * self.theory  # nor is NaN
        level = FAIL if strange or self.error > ERROR_BAD else OK if self.error <= ERROR_OK else WARN
        text = (
            f"scores are off by {self.error:.4f} (rms over {self.prompts} prompts, against {against}); the theory's "
            f"1/sqrt({self.dim}) is {self.theory:.4f}"
        )
        if strange:
            text += "; no sketch is so far off by chance: report this model"
        elif level != OK:
            text += "; a larger --dim makes it smaller"
        return Finding("sketch error", level, text)

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else "failed"
        against = "exact gradients" if self.method == "exact" else "other seeds"
        return f"CheckReport({self.prompts} prompts: {verdict}, error {self.error:.4f} against {against})"

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        mark = {OK: "ok     ", WARN: "warning", FAIL: "FAILED "}
        lines = [f"{mark[f.level]}  {f.name:<{width}}  {f.text}" for f in self.findings]
        return "\n".join([*lines, f"verdict: {self.verdict}"])
