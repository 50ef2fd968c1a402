"""What a dump does not say of itself, and its reader has to be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cropi.trainers.dumps.fields import finite
from cropi.trainers.dumps.pickled import LARGEST

if TYPE_CHECKING:
    from cropi.trainers.dumps.named import DatasetPrompts


@dataclass(frozen=True)
class Reading:
    """How dumps are read; see the options of ``cropi convert``. A reader takes what it has a use for.

    Attributes:
        id_key: where the prompt's id stands; None: where the reader says.
        temperature: of the sampling; None: what the file says, if it does.
        steps: of a prompt with rollouts of several steps those of the last one ("newest") or "all".
        allow_pickle: load pickles with all that they name, which runs their code.
        largest: bytes that a dump may have (:func:`cropi.trainers.dumps.pickled.check_size`).
        columns: ``{"reward": name}`` for files of TRL, ms-swift, slime and verl (text); of records, as for
            :func:`cropi.data.readers.read`.
        requests: the input file of a batch of requests.
        prompts: of the run's dataset, where the dump does not name them.
        tokenizer: gives the model's tokenizer, for tokens that are written as text.
        scorer: a :class:`cropi.trainers.dumps.scoring.Scorer`, in place of the rewards of vLLM's and servers' files.
    """

    id_key: str | None = None
    temperature: float | None = None
    steps: str = "newest"
    allow_pickle: bool = False
    largest: int = LARGEST
    columns: Mapping[str, str] = field(default_factory=dict)
    requests: str | None = None
    prompts: DatasetPrompts | None = None
    tokenizer: Callable[[], Any] | None = None
    scorer: Any = None

    def warmth(self, held: Any, field: str, where: str) -> float | None:
        """The temperature, or where none is given ``held``, what the file says, if it does.

        Raises:
            BadSample: ``held`` is no finite number.
        """
        if self.temperature is not None or held is None:
            return self.temperature
        return finite(held, field, where)


PLAIN = Reading()
