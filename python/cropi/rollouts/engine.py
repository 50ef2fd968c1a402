"""What samples responses: an engine is handed prompts and gives their responses, in batches that it plans itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cropi.errors import CropiError
from cropi.rollouts.options import Sampling as Sampling


@dataclass(frozen=True)
class Request:
    """A prompt to be sampled from: its name, which seeds the draws, its token ids, and its messages for chat."""

    name: str
    prompt: Sequence[int]
    messages: Any = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Attributes:
        ids: token ids, with the end token where it ended by itself; empty where the engine gives text alone.
        logprobs: of ``ids``, under the distribution that they were drawn from, before ``top_k`` and ``top_p``; None
            where the engine does not give those.
        truncated: it was cut by ``max_tokens``.
        text: as the engine gives it; None: it is made from ``ids``.
    """

    ids: list[int]
    logprobs: list[float] | None
    truncated: bool
    text: str | None = None


# Why an engine says that a response is over: by an end token, or by the limit.
ENDED, CUT = ("stop", "eos_token", "stop_sequence"), "length"


def is_cut(reason: str | None, what: str) -> bool:
    """Whether a response was cut by ``max_tokens``, by the engine's reason for its end; one without a reason was not.

    Raises:
        CropiError: it ended in another way, and is no response of the policy; ``what`` begins the message.
    """
    if reason not in (None, CUT, *ENDED):
        raise CropiError(
            f"{what} was ended by {reason!r}, not by its end token or --max-tokens, so that it is only a part; "
            "run the same command again, or leave the prompt out"
        )
    return reason == CUT


class Engine(Protocol):
    """Samples from one policy."""

    name: str
    # Called with the number of tokens that a response of the batch under way has by now, at most; by no engine whose
    # responses arrive one by one.
    stepped: Callable[[int], None] | None

    def describe(self) -> str:
        """The engine in the line that is printed at the start."""

    def identity(self) -> dict[str, Any]:
        """What the responses depend on besides the prompts and the sampling, by name; None where it is not known."""

    def prepare(self, requests: Sequence[Request], notes: dict[str, Any]) -> None:
        """Get ready, once and before work begins; ``notes`` are those of the run that is gone on with."""

    def notes(self) -> dict[str, Any]:
        """What a run that goes on later should know, to sample the same."""

    def plan(self, requests: Sequence[Request], n: int) -> Iterator[list[Request]]:
        """The prompts in batches that are sampled together, the same ones for the same prompts."""

    def sample(
        self, batch: Sequence[Request], n: int, done: Callable[[str], bool]
    ) -> Iterator[tuple[Request, list[Response]]]:
        """The responses to each prompt of a batch, as they are finished.

        ``done`` tells which prompts are not asked for any more; they may be given all the same.
        """
