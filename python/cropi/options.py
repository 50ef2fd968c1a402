"""The options of a selection: one place from which the command line, config files and Python take them.

Every field is an option: its name is the keyword in Python and the key in a config file, and with dashes for
underscores the flag of the command line. Its metadata carry the help text, what the value may be, and what ``--help``
shows. Nothing here imports torch, so that ``cropi --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cropi.errors import CropiError
from cropi.grouping import Grouping
from cropi.option_fields import Options, check_used, listed, option, split

ESTIMATORS = ("cropi", "grpo", "ppo", "gspo", "reinforce", "rloo", "dr_grpo", "bnpo", "dapo", "cispo", "sft")
STORE_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4", "int1")
KINDS = ("slab", "countsketch", "dropout", "kron", "tensor")
BASELINES = ("random", "learnability", "pass_rate")  # methods that look at no score


@listed
@dataclass(frozen=True, kw_only=True)
class Loading(Options):
    """How a model is loaded by its name."""

    dtype: str = option(
        "auto", "dtype of the weights; auto: float32 on a CPU, the checkpoint's own on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    device: str = option(
        "auto",
        "where the model runs: cpu, cuda, cuda:1, ...; auto takes a GPU if torch sees one, else the CPU",
    )
    trust_remote_code: bool = option(
        False, "let the model's folder or hub repository bring code of its own, WHICH IS RUN", kind="switch"
    )
    revision: str | None = option(
        None, "branch, tag or commit of a hub id", metavar="NAME", shown="the main branch"
    )
    adapter: str | None = option(
        None,
        "a PEFT adapter on the model, whose parameters are then sketched",
        metavar="PATH_OR_ID",
        shown="none",
    )
    quantize: str | None = option(
        None,
        "pack the weights under an adapter to 4 or 8 bits by bitsandbytes",
        choices=("4bit", "8bit"),
        shown="no",
    )
    attn_implementation: str = option(
        "auto",
        "attention: sdpa, eager, flash_attention_2, ...; auto: sdpa if the model has it",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class Sketch(Options):
    """What a sketch is: see :class:`cropi_kernels.SketchSpec`, which checks the values."""

    dim: int = option(32768, "numbers per sketch", kind="whole", metavar="N")
    width: int | None = option(
        64, "features that a layer's inputs are folded to (kind slab)", kind="width", metavar="N|full"
    )
    vocab_width: int | None = option(
        8192, "rows that a tied head is folded to (kind slab)", kind="vocab_width", metavar="N|full"
    )
    kind: str = option("slab", "kind of sketch", choices=KINDS)
    keep: float = option(1.0, "share of the coordinates that kind dropout keeps", kind="number")
    seed: int = option(0, "seed of the sketch", kind="whole")

    def __post_init__(self) -> None:
        super().__post_init__()
        slab = "kind slab", self.kind == "slab"
        folds = {name: slab for name in ("width", "vocab_width") if getattr(self, name) is not None}
        check_used(self, **folds, keep=("kind dropout", self.kind == "dropout"))


@dataclass(frozen=True, kw_only=True)
class Gradient(Options):
    """Which gradient is sketched."""

    exclude: Sequence[str] = option(
        (),
        "patterns of parameter names to leave out, e.g. '*norm*'",
        metavar="PATTERN",
        shown="none",
        many=True,
    )
    estimator: str = option("cropi", "which policy gradient is sketched (docs/method.md)", choices=ESTIMATORS)
    clip_low: float | None = option(
        None, "tokens with a ratio below 1 minus this have no gradient (estimators with clipping)", kind="number",
        shown="the estimator's own",
    )  # fmt: skip
    clip_high: float | None = option(
        None, "tokens with a ratio above 1 plus this have no gradient (estimators with clipping)", kind="number",
        shown="the estimator's own",
    )  # fmt: skip
    eps: float | None = option(
        None, "number added to the rewards' standard deviation", kind="number", shown="1e-4"
    )
    cap: float | None = option(None, "upper bound of a ratio (cispo)", kind="positive", shown="5")
    length_constant: float | None = option(
        None, "the constant that dr_grpo, bnpo, reinforce and rloo divide by", kind="positive", shown="1"
    )
    optimizer_state: Any = option(
        None,
        "a checkpoint with an optimiser's second moments (Adam, Adafactor): validation gradients are divided by their "
        "roots, as a step of that optimiser divides the training gradient (docs/method.md)",
        metavar="PATH",
        shown="none",
    )
    responses: int | None = option(
        None,
        "sketch at most so many responses of a training prompt, drawn and weighted so that its gradient is right on "
        "average (docs/method.md)",
        kind="count",
        metavar="N",
        shown="all",
    )
    token_share: float | None = option(
        None,
        "weigh, and sketch at the head, this share of each training response's tokens, drawn and weighted likewise; "
        "all of them still go through the model",
        kind="share",
        shown="1, all",
    )
    behaviour: str = option(
        "auto",
        "where the log-probs of the policy that made the rollouts come from: the file, the current policy (ratio 1), "
        "or --behaviour-model; auto takes the file's if every record has them, and the current policy if none has",
        choices=("auto", "file", "current", "model"),
    )
    temperature: float | None = option(
        None,
        "temperature at which the rollouts were sampled",
        kind="positive",
        shown="each record's own, else 1",
    )


SOURCES = (
    "auto", "records", "verl", "slime", "nemo-rl", "trl", "vllm", "openai", "openrlhf", "prime-rl", "skyrl", "areal",
    "ms-swift", "nemo-gym", "open-instruct", "atropos", "art", "roll",
)  # fmt: skip


@listed
@dataclass(frozen=True, kw_only=True)
class Reading(Options):
    """Which program wrote the files of trajectories."""

    source: str = option(
        "auto",
        "which program wrote the files; auto recognises it by their content and prints it; `cropi convert` has more "
        "options",
        choices=SOURCES,
    )


@dataclass(frozen=True, kw_only=True)
class Tokens(Options):
    """How records are read and text becomes token ids; stored ids are always used as they are."""

    columns: str | None = option(
        None, "names of the columns, where they are other ones: prompt=question,response=answer,reward=score",
        metavar="NAME=COLUMN,...", shown="the names of the record", table=True,
    )  # fmt: skip
    chat_template: str = option(
        "auto",
        "auto: the tokenizer's template, if it has one; none: prompts as they are; or a Jinja template, or a file with "
        "one",
        metavar="auto|none|FILE",
    )
    template_date: str | None = option(
        None, "the date that the chat template prints, where it prints one", metavar="YYYY-MM-DD",
        shown="today's, kept with the store",
    )  # fmt: skip
    eos: bool = option(
        True, "append no end token to responses that are given as text", kind="switch", flag="--no-eos"
    )
    max_length: int | None = option(
        None, "limit on prompt + response, in tokens", kind="count", metavar="N", shown="the model's context"
    )
    too_long: str = option(
        "error",
        "what is done above the limit: stop, leave the prompt out, cut the response, or cut the prompt's beginning",
        choices=("error", "skip", "truncate-right", "truncate-left"),
    )


@dataclass(frozen=True, kw_only=True)
class Checks(Options):
    """What is checked before the work and while it runs; docs/checks.md says what each costs."""

    behaviour_check: str = option(
        "error",
        "compare stored log-probs with the policy's on a few prompts before the job; where they differ (another "
        "temperature, base or policy): stop, or warn; off: do not compare them",
        choices=("off", "warn", "error"),
    )
    verify: bool = option(
        True, "leave out the self-test, which compares every layer's sketch with autograd on a few tokens before the "
        "job, and the probe of the policy (whether it is causal, and whether a prompt depends on the others)",
        kind="switch", flag="--no-verify",
    )  # fmt: skip
    zero_check: bool = option(
        True, "also score gradients that are zero except for rounding (equal responses whose advantages cancel)",
        kind="switch", flag="--no-zero-check",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Running(Checks):
    """How the sketching runs; none of these changes a sketch beyond rounding."""

    layout: str = option(
        "auto",
        "shared: the responses to a prompt are in one row; padded: each has a row of its own; auto takes the cheaper",
        choices=("auto", "shared", "padded"),
    )
    tokens_per_batch: int | None = option(
        None, "tokens per forward, padding included", kind="count", metavar="N",
        shown="1024 on a CPU, by its memory on a GPU",
    )  # fmt: skip
    fused: bool = option(
        False,
        "compute the norms and gated products of Llama-like models by kernels that give the sketch in the same pass: "
        "passes of a 1.5B model on an H100 take 0.76 of the time (docs/gpu.md), and activations are rounded less often",
        kind="switch",
    )
    limit: int | None = option(
        None, "use only the first N (training) prompts", kind="count", metavar="N", shown="all"
    )
    skip_bad: bool = option(False, "go on after a bad record, and count it", kind="switch")


@dataclass(frozen=True, kw_only=True)
class Rescoring(Options):
    """How much of a stage of a curriculum goes into scoring its prompts anew."""

    budget: float | None = option(
        None,
        "the most of a stage's time that choosing its prompts may take: those near the cut, and some at random, are "
        "scored anew, the others by sketches of earlier stages; from the second stage on (docs/curriculum.md)",
        kind="share",
        shown="no bound",
    )
    passes: float | None = option(
        None,
        "the share of the training prompts' tokens that a stage passes through the model to score them, in the first "
        "stage too",
        kind="share",
        shown="1, all of them",
    )

    @property
    def asked(self) -> bool:
        """Whether anything is bounded."""
        return self.budget is not None or self.passes is not None


@dataclass(frozen=True, kw_only=True)
class Storing(Options):
    """What the stored sketches are, and which stage they belong to."""

    store_dtype: str = option("float32", "dtype of the stored sketches", choices=STORE_DTYPES)
    shard_bytes: int = option(
        1 << 28,
        "approximate size of a file of the store; smaller files are joined up to it",
        kind="count",
        metavar="N",
    )
    stage: str = option("0", "name of the training stage; sketches of two stages are never compared")


@listed
@dataclass(frozen=True, kw_only=True)
class Sketching(Sketch, Gradient, Grouping, Tokens, Running, Storing):
    """How trajectories become sketches.

    >>> Sketching(dim=4096, estimator="ppo").behaviour
    'auto'
    >>> Sketching(layout="wide")
    Traceback (most recent call last):
        ...
    cropi.errors.CropiError: layout must be one of auto, shared, padded, got 'wide'
    """


@dataclass(frozen=True, kw_only=True)
class Comparing(Options):
    """How training and validation sketches are compared."""

    metric: str = option(
        "cosine", "how two sketches are compared (docs/method.md)", choices=("cosine", "dot")
    )
    mean: str = option(
        "plain",
        "average the validation gradients as they are (plain), or their directions (normalised)",
        choices=("plain", "normalised"),
    )
    aggregate: str = option(
        "mean",
        "score a prompt against the mean of a validation set's gradients, or against the nearest of its prompts",
        choices=("mean", "nearest"),
    )
    minus: str | None = option(
        None, "a validation set that counts against a prompt: its score is subtracted from the others'", metavar="SET",
        shown="none",
    )  # fmt: skip
    minus_weight: float = option(1.0, "factor on the score that --minus subtracts", kind="positive")
    max_valid: int | None = option(
        None, "use at most N prompts of each validation set", kind="count", metavar="N", shown="all"
    )
    draws: int = option(
        200,
        "how often the validation prompts are drawn again, to estimate the uncertainty of scores and choice; 0: never",
        kind="whole",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 0 or self.draws == 1:
            raise CropiError(f"draws must be at least 2, or 0 for none, got {self.draws!r}")
        nearest = self.aggregate == "nearest"
        check_used(self, minus_weight=("minus", self.minus is not None), mean=("aggregate mean", not nearest))


@listed
@dataclass(frozen=True, kw_only=True)
class Influence(Comparing):
    """:class:`Comparing`, and its seed."""

    valid_seed: int = option(0, "seed of the draw for --max-valid", kind="whole")


@dataclass(frozen=True, kw_only=True)
class Choosing(Options):
    """Which prompts are chosen."""

    fraction: float = option(0.1, "share of the pool to choose", kind="share")
    count: int | None = option(
        None, "how many prompts to choose, instead of --fraction", kind="count", metavar="N", shown="by --fraction"
    )  # fmt: skip
    method: str = option(
        "rrf",
        "rrf: CROPI's reciprocal rank fusion over the validation sets; rrf_classic: that of Cormack et al. (constant "
        "60, whole lists); max or mean: highest or mean score; p_selected: how often a prompt is chosen when the "
        "validation prompts are drawn anew; or a baseline",
        choices=("rrf", "rrf_classic", "max", "mean", "p_selected", "random", "learnability", "pass_rate"),
    )
    rrf_constant: float = option(60.0, "constant of --method rrf_classic", kind="number")
    pool: str = option(
        "all",
        "what the fraction is a share of: all prompts, or the usable ones, which have a gradient",
        choices=("all", "usable"),
    )
    per: str = option(
        "pool",
        "choose from the whole pool; or the fraction of every training file by itself, as the released CROPI code "
        "does; or of every task",
        choices=("pool", "file", "task"),
    )
    quota: Sequence[str] = option(
        (),
        "how much of the selection a task (with --per file: a file) gets: gsm8k=0.5 is half of it, gsm8k=40 are 40 "
        "prompts; the others share the rest by rank",
        metavar="NAME=NUMBER",
        shown="none",
        many=True,
        table=True,
    )
    min_score: float | None = option(
        None, "choose no prompt whose highest score is below this", kind="number", shown="no bound"
    )
    confidence: float | None = option(
        None,
        "rank by the lower bound of each score at this one-sided level (0.9: the value that it exceeds in 90 % of "
        "draws of the validation prompts) instead of the score",
        kind="number",
        shown="the score itself",
    )
    draw: str = option(
        "best",
        "best: take the first ones; soft: draw them, better ones more often; p_selected: draw in proportion to "
        "p_selected",
        choices=("best", "soft", "p_selected"),
    )
    draw_temperature: float = option(
        1.0,
        "temperature of --draw soft: near 0 only the best are drawn, far above 1 all are equally likely",
        kind="positive",
    )
    dedup: float | None = option(
        None, "leave out a prompt whose sketch has a cosine above this with that of a better one", kind="number",
        shown="none is left out",
    )  # fmt: skip
    diversity: str = option(
        "none",
        "of the best --candidates, choose prompts whose gradients differ: in turns from k-means clusters of the "
        "sketches, or by facility location",
        choices=("none", "kmeans", "facility"),
    )
    candidates: float = option(
        4.0,
        "how many prompts --diversity chooses among, as a multiple of those that are chosen",
        kind="number",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("confidence", 0.5, 1.0), ("dedup", -1.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not low < value < high:
                raise CropiError(f"{name} must be above {low:g} and below {high:g}, got {value!r}")
        # From 2^53 on, a constant and a rank are the constant in float64, and every prompt's value is the same.
        if not 0 <= self.rrf_constant <= 1e9:
            raise CropiError(f"rrf_constant must be from 0 to 1e9, got {self.rrf_constant!r}")
        if self.candidates < 1:
            raise CropiError(f"candidates must be at least 1, got {self.candidates!r}")
        if self.draw == "p_selected" and self.method in BASELINES:
            raise CropiError(
                f"draw p_selected is for methods that rank by scores, and method is {self.method}, which has no "
                "p_selected; give another draw or method"
            )
        by_scores = self.method not in BASELINES or self.min_score is not None
        check_used(
            self, fraction=("a choice without count", self.count is None),
            pool=("fraction, or per with count", self.count is None or (self.per != "pool" and not self.quota)),
            rrf_constant=("method rrf_classic", self.method == "rrf_classic"),
            draw_temperature=("draw soft", self.draw == "soft"),
            candidates=("diversity kmeans or facility", self.diversity != "none"),
            confidence=(f"methods that rank by scores, and method is {self.method}", by_scores),
        )  # fmt: skip

    @property
    def needs_sketches(self) -> bool:
        """Whether the choice looks at the training prompts' sketches beside their scores."""
        return self.dedup is not None or self.diversity != "none"


@listed
@dataclass(frozen=True, kw_only=True)
class Selecting(Choosing):
    """:class:`Choosing`, and its seed."""

    select_seed: int = option(0, "seed of --method random, and of the baselines' ties", kind="whole")


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """All options between trajectories and chosen prompts."""

    sketching: Sketching = field(default_factory=Sketching)
    influence: Influence = field(default_factory=Influence)
    selecting: Selecting = field(default_factory=Selecting)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SelectionOptions:
        """The options in one mapping of names to values.

        Raises:
            CropiError: a name that is not an option, with the nearest one; or a value that the option does not take.

        >>> SelectionOptions.of({"dim": 4096, "metric": "dot", "fraction": 0.2}).influence.metric
        'dot'
        """
        parts = {"sketching": Sketching, "influence": Influence, "selecting": Selecting}
        return cls(**dict(zip(parts, split(given, *parts.values()))))
