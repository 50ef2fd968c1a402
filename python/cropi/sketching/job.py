"""The options of a sketching job, and the manifest that they make."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cropi.data.readers import read_trajectories
from cropi.data.rewards import no_gradient_reason
from cropi.data.scan import Scan
from cropi.errors import CropiError, RecordError, optional
from cropi.gradient.estimators import ESTIMATORS, Estimator
from cropi.gradient.tokenize import Tokenize, TooLong, template_text
from cropi.model.fingerprint import model_fingerprint, tokenizer_fingerprint
from cropi_kernels import Coverage, SketchSpec


@dataclass
class SketchJob:
    """Everything that a job depends on besides the model. The fields are the options of ``cropi sketch``."""

    trajectories: Sequence[str | Path]
    out: str | Path
    spec: SketchSpec = field(default_factory=SketchSpec)
    exclude: Sequence[str] = ()
    estimator: Estimator = ESTIMATORS["cropi"]
    behaviour: str = "auto"
    behaviour_model: Any = None
    temperature: float | None = None
    chat_template: str = "auto"
    eos: bool = True
    max_length: int | None = None
    too_long: str = "error"
    layout: str = "auto"
    tokens_per_batch: int = 1024
    dtype: str = "float32"
    stage: str = "0"
    set: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    shard_rows: int = 64
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens_per_batch", "shard_rows", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CropiError(f"{name} must be at least 1, got {value}")


def check_dropout(model: Any, name: str) -> None:
    """Check that a model leaves nothing to chance: active dropout would give every pass another gradient.

    Training mode alone is no mistake: gradient checkpointing of ``transformers`` works in no other.

    Args:
        model: a module.
        name: what it is called, for messages.

    Raises:
        CropiError: a module in training mode has a dropout rate (or a router's noise) above 0.
    """
    for path, module in model.named_modules():
        dropout = isinstance(module, torch.nn.modules.dropout._DropoutNd)
        for key, rate in vars(module).items() if module.training else ():
            named = "drop" in key or "jitter" in key or (dropout and key == "p")
            if named and isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0:
                raise CropiError(
                    f"{name} is in training mode, and {path or type(module).__name__} has {key} = {rate}: every pass "
                    "would drop other activations, so that its gradient is left to chance; call model.eval(), or set "
                    "every such rate to 0 where gradient checkpointing needs training mode"
                )


def make_tokenize(model: Any, tokenizer: Any, job: SketchJob, found: Scan) -> Tokenize:
    """The tokenisation rules for this model.

    Raises:
        RecordError: a stored token id is beyond the vocabulary.
        CropiError: an option does not fit the model or the tokenizer.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if found.largest_id[0] >= vocabulary and not job.skip_bad:
        raise RecordError(
            found.largest_id[1],
            f"token id {found.largest_id[0]} is beyond the model's vocabulary of {vocabulary}",
            "use the model that made the trajectories, or pass --skip-bad",
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Tokenize(
        tokenizer, vocabulary, context, chat_template=job.chat_template, eos=job.eos,
        max_length=job.max_length, too_long=job.too_long, temperature=job.temperature,
    )  # fmt: skip


def check_tokens(tokens: Tokenize, job: SketchJob, found: Scan, progress: bool = False) -> None:
    """Tokenise every prompt that has a gradient once, so that one that does not fit shows before any compute.

    Raises:
        RecordError: as :meth:`Tokenize.__call__`.
    """
    if found.tokens_checked or job.skip_bad:
        return
    bar = optional("tqdm").tqdm
    groups = islice(read_trajectories(job.trajectories), job.limit)
    total = min(found.prompts, job.limit or found.prompts)
    for group in bar(groups, "checking", total, unit="prompt", disable=not progress, delay=2, leave=False):
        if no_gradient_reason(group.rewards) is None:
            with suppress(TooLong):
                tokens(group)
    found.tokens_checked = True


def make_manifest(
    model: Any, tokenizer: Any, job: SketchJob, found: Scan, source: str, coverage: Coverage
) -> dict[str, Any]:
    """What the store's rows will depend on; ``notes`` apart, a run with other values may not continue the store."""
    behaviour_model = job.behaviour_model if source == "model" else None
    return {
        "spec": job.spec.to_dict(),
        "spec_fingerprint": job.spec.fingerprint(),
        "hash_version": job.spec.version,
        "stage": job.stage,
        "model": model_fingerprint(model),
        "parameters": {
            "covered": coverage.covered,
            "total": coverage.total,
            "excluded": sorted(coverage.excluded),
        },
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "trajectories": found.fingerprint,
        "set": job.set,
        "estimator": job.estimator.to_dict(),
        "behaviour": {"source": source, "model": behaviour_model and model_fingerprint(behaviour_model)},
        "temperature": job.temperature,
        "tokens": {name: getattr(job, name) for name in ("eos", "max_length", "too_long")}
        | {"chat_template": template_text(job.chat_template)},
        "dtype": job.dtype,
        "prompts": min(found.prompts, job.limit or found.prompts),
        "notes": {"trajectories": [str(path) for path in job.trajectories], **job.notes},
    }
