"""The options of a rollout, for the command line and Python. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from cropi.errors import CropiError
from cropi.option_fields import Options, listed, option

ENGINES = ("hf", "vllm", "openai-url")


@dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How responses are drawn."""

    n: int = option(8, "responses to each prompt", kind="count", metavar="N", flag="-n")
    temperature: float = option(1.0, "temperature of the sampling", kind="positive")
    top_k: int = option(
        0, "draw only from the N most probable tokens; 0: from all", kind="whole", metavar="N"
    )
    top_p: float = option(
        1.0, "draw only from the most probable tokens that have this probability together", kind="share"
    )
    max_tokens: int = option(1024, "the longest response, in tokens", kind="count", metavar="N")
    seed: int = option(0, "seed of all draws", kind="whole")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 0 or self.seed < 0:
            name = "top_k" if self.top_k < 0 else "seed"
            raise CropiError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1.0


@dataclass(frozen=True, kw_only=True)
class Prompting(Options):
    """How prompts are read and become token ids."""

    columns: str | None = option(
        None, "names of the columns, where they are other ones: prompt=question,answer=reward_model.ground_truth",
        metavar="NAME=COLUMN,...", shown="prompt, answer, id", table=True,
    )  # fmt: skip
    system: str | None = option(
        None, "a system message in front of prompts that have none", metavar="TEXT", shown="none"
    )
    chat_template: str = option(
        "auto", "auto: the tokenizer's template, if it has one; none: prompts as they are; or a Jinja template, or a "
        "file with one", metavar="auto|none|FILE",
    )  # fmt: skip
    template_date: str | None = option(
        None,
        "the date that the chat template prints, where it prints one",
        metavar="YYYY-MM-DD",
        shown="today's",
    )
    limit: int | None = option(None, "use only the first N prompts", kind="count", metavar="N", shown="all")
    skip_bad: bool = option(
        False, "leave out prompts that cannot be read or scored, and count them", kind="switch"
    )


@dataclass(frozen=True, kw_only=True)
class Engines(Options):
    """Which engine samples."""

    engine: str = option(
        "hf", "hf: the model in this process; vllm: vLLM in this process; openai-url: a server at --url",
        choices=ENGINES,
    )  # fmt: skip
    rows: int | None = option(
        None, "responses that hf decodes at once", kind="count", metavar="N",
        shown="what half of the free memory holds; at most 256, of short responses 1024",
    )  # fmt: skip
    url: str | None = option(
        None, "address of the server, with its version: http://localhost:8000/v1", metavar="URL", shown="none"
    )
    served_model: str | None = option(
        None, "what the server calls the model", metavar="NAME", shown="the only one it has"
    )
    api: str = option(
        "completions", "completions: prompts go as token ids; chat: as messages, which the server renders",
        choices=("completions", "chat"),
    )  # fmt: skip
    server_logprobs: str = option(
        "raw", "what the server's log-probs are: raw, of the model's own distribution (vLLM's default); processed, "
        "after temperature, top-k and top-p (vLLM: --logprobs-mode processed_logprobs); none, do not record any. They "
        "are recorded where they are those that an estimator needs", choices=("raw", "processed", "none"),
    )  # fmt: skip
    concurrency: int = option(32, "requests at a time", kind="count", metavar="N")
    timeout: float = option(600.0, "seconds for an answer of the server", kind="positive")
    retries: int = option(6, "times that a request is repeated, after longer and longer pauses", kind="whole")
    api_key: str = option("OPENAI_API_KEY", "environment variable with the server's key", metavar="VARIABLE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retries < 0:
            raise CropiError(f"retries must be 0 or more, got {self.retries}")


@listed
@dataclass(frozen=True, kw_only=True)
class Rollout(Sampling, Prompting, Engines):
    """How prompts become trajectories.

    >>> Rollout(n=4, temperature=0.7).top_p
    1.0
    """
