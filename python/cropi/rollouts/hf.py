"""The embedded engine: a Hugging Face model in this process.

A batch is planned from the prompts alone, those with the same beginning together, longest first and of similar lengths,
and holds whole prompts: a run that is continued samples the same batches, to the bit on the same machine. The
log-probs of a row depend on its batch by rounding, and so do its tokens where a draw falls that near to the end of a
token's share.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cropi.errors import CropiError, warn
from cropi.gradient.tokenize import Tokenize
from cropi.model.policy import Policy, check_dropout
from cropi.rollouts.beginnings import families
from cropi.rollouts.cache import bytes_of, make_cache
from cropi.rollouts.engine import Request, Response
from cropi.rollouts.file import MODEL
from cropi.rollouts.generate import generate, past
from cropi.rollouts.options import Sampling
from cropi.rollouts.trial import way_of
from cropi.store.differences import OPTIONAL
from cropi_kernels.frozen import Linears, PackedLinears, unsupported
from cropi_kernels.memory import is_out_of_memory
from cropi_kernels.sketcher.model.precision import own_precision

# Responses at once, and tokens that a kill may cost. On a CPU a step costs as much as 25 rows more than it has, and a
# row stands for several responses; a GPU is left half idle below 256.
LEAST_ROWS, MOST_ROWS, MOST_TOKENS = 256, 1024, 2**18
SHARE_OF_MEMORY = 0.5  # of what is free, for keys, values and logits
DRAWN = 4  # float32 copies of a row's logits while a token is drawn
GAIN, MEASURED, ROUNDS = 0.9, 64, 3  # of torch's time, at most; rows and repetitions of the measurement
SHARE_OF_COPIES = 0.25  # of what is free, for weights in oneDNN's order
LEAST_FREE = 2**31  # assumed where the system does not say how much is free


class FewerRows(UserWarning):
    """Memory ran out: the batch is sampled again in smaller parts."""


class HfEngine:
    """Samples with a :class:`cropi.Policy`.

    Args:
        policy: its model is taken as it is.
        tokens: knows which tokens end a response.
        sampling: how.
        rows: responses that are decoded at once; None: as many as memory allows, and :func:`most_rows`.
    """

    name = "hf"
    stepped: Callable[[int], None] | None = None

    def __init__(self, policy: Policy, tokens: Tokenize, sampling: Sampling, rows: int | None = None) -> None:
        self.policy, self.sampling, self.rows = policy, sampling, rows
        self.ends = tokens.all_ends
        self.way = ""
        self.linears: Linears = "torch"  # which library multiplies; see cropi_kernels.frozen
        self._packed: PackedLinears | None = None

    def describe(self) -> str:
        """Dtype, device, rows at once, and how prompts share a batch."""
        dtype = str(self.policy.dtype).removeprefix("torch.")
        how = {"shared": "", "padded": "", "alone": ", prompts of one length together"}[self.way]
        return f"{dtype} on {self.policy.device}, at most {self.rows} responses at once{how}"

    def identity(self) -> dict[str, Any]:
        """The weights, and what the model is beside them."""
        made = self.policy.fingerprint
        return {"weights": made["weights"], MODEL: {key: made[key] for key in OPTIONAL if key in made}}

    def notes(self) -> dict[str, Any]:
        """The rows at once, on which batches depend, and who multiplies, on which rounding depends."""
        return {"rows": self.rows, "linears": self.linears}

    def prepare(self, requests: Sequence[Request], notes: dict[str, Any]) -> None:
        """Try the model, and find how many rows fit; once, before work begins.

        Raises:
            CropiError: active dropout, or a model that cannot be sampled here.
        """
        model = self.policy.model
        check_dropout(model, "model")
        lengths = [len(request.prompt) for request in requests]
        with own_precision(model):
            self.way = way_of(model, max(lengths), self.sampling.max_tokens, min(lengths))
        if self.rows is None:
            self.rows = notes.get("rows")
        if self.rows is None:
            self.rows = self._fitting(max(lengths) + self.sampling.max_tokens)
        self.linears = notes.get("linears") or self._faster(self.rows)
        self._packed = PackedLinears(model.parameters(), self.linears, inference=True)

    def plan(self, requests: Sequence[Request], n: int) -> Iterator[list[Request]]:
        """At most ``rows`` responses a batch (but one prompt at least), longest prompts first, families together."""
        each = max(1, (self.rows or most_rows(self.sampling.max_tokens)) // n)
        batch: list[Request] = []
        for request in ordered(requests, shared=self.way == "shared"):
            other = self.way == "alone" and batch and len(batch[0].prompt) != len(request.prompt)
            if len(batch) == each or other:
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def sample(
        self, batch: Sequence[Request], n: int, done: Callable[[str], bool] = lambda name: False
    ) -> Iterator[tuple[Request, list[Response]]]:
        """The responses to each prompt of the batch, those that are done among them: a batch is the same whenever it is
        sampled.

        Raises:
            CropiError: the model's output is not a number, or one prompt alone does not fit in memory.
        """
        try:
            made = self._generate(batch, n)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            made = None
        if made is None:  # outside of the handler, whose traceback holds the tensors
            yield from self._halves(batch, n)
            return
        for request, responses in zip(batch, made):
            for response in responses:
                if any(value != value for value in response.logprobs or ()):
                    raise CropiError(
                        f"prompt {request.name!r:.100}: the model's output is not finite in "
                        f"{str(self.policy.dtype).removeprefix('torch.')}; use another --dtype"
                    )
            yield request, responses

    def _generate(self, batch: Sequence[Request], n: int) -> list[list[Response]]:
        model, packed = self.policy.model, self._packed
        assert packed is not None
        with torch.inference_mode(), own_precision(model), packed.around(model):
            return generate(
                model, batch, n, self.sampling, self.ends, shared=self.way == "shared", stepped=self.stepped
            )

    def _halves(self, batch: Sequence[Request], n: int) -> Iterator[tuple[Request, list[Response]]]:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            raise CropiError(
                f"prompt {batch[0].name!r:.100}: {n} responses do not fit into the memory of {self.policy.device}; "
                "give a smaller -n or --max-tokens"
            )
        warn(
            f"memory ran out with {len(batch) * n} responses at once; their prompts are sampled in two parts (a "
            "smaller --rows does not waste this time)", FewerRows,
        )  # fmt: skip
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            yield from self.sample(half, n)

    @torch.inference_mode()
    def _faster(self, rows: int) -> Linears:
        """Which library multiplies faster by this model's weights, measured on one step of ``rows`` rows."""
        model = self.policy.model
        device = self.policy.device
        if unsupported() is not None or device.type != "cpu" or self.policy.dtype != torch.float32:
            return "torch"
        copies = sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim == 2)
        if copies > SHARE_OF_COPIES * free_memory(device):
            return "torch"
        ids = torch.zeros(min(rows, MEASURED), 1, dtype=torch.long, device="cpu")
        kinds: tuple[Linears, ...] = ("torch", "onednn")
        ways = {kind: PackedLinears(model.parameters(), kind, inference=True) for kind in kinds}
        best = dict.fromkeys(kinds, math.inf)
        # In turn, so that another's load falls on both; the first round packs the weights.
        for number in range(1 + ROUNDS):
            for kind, packed in ways.items():
                with own_precision(model), packed.around(model):
                    start = time.thread_time()
                    model(input_ids=ids, use_cache=False)
                    if number:
                        best[kind] = min(best[kind], time.thread_time() - start)
        return "onednn" if best["onednn"] <= GAIN * best["torch"] else "torch"

    @torch.inference_mode()
    def _fitting(self, length: int) -> int:
        """Rows of ``length`` tokens whose keys, values and logits fit into a share of the free memory."""
        model, device = self.policy.model, self.policy.device
        sizes = []
        for count in (8, 16):
            cache = make_cache(model)
            ids = torch.zeros(1, count, dtype=torch.long, device=device)
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **past(model, cache))
            sizes.append(bytes_of(cache))
        grows = max(sizes[1] - sizes[0], 0) / 8
        # Half as much again is for the room of keys and values to grow, and for the rows that leave.
        row = (
            1.5 * max(1.0, sizes[0] + grows * (length - 8))
            + DRAWN * 4 * model.get_input_embeddings().weight.shape[0]
        )
        most = most_rows(self.sampling.max_tokens)
        return max(1, min(most, int(SHARE_OF_MEMORY * free_memory(device) / row)))


def most_rows(max_tokens: int) -> int:
    """Rows at once where memory has room: the shorter the responses, the more, since fewer tokens are at stake."""
    return min(MOST_ROWS, max(LEAST_ROWS, MOST_TOKENS // max_tokens))


def ordered(requests: Sequence[Request], *, shared: bool) -> list[Request]:
    """Longest prompts first, in the order of the file where they are equal; with ``shared``, families together."""
    groups = families([request.prompt for request in requests]) if shared else [list(range(len(requests)))]
    places = [sorted(group, key=lambda i: (-len(requests[i].prompt), i)) for group in groups]
    places.sort(key=lambda group: (-len(requests[group[0]].prompt), group[0]))
    return [requests[i] for group in places for i in group]


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if "kB" in line}
        return sizes["MemAvailable"]
    except (OSError, KeyError, ValueError):
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
        return pages * os.sysconf("SC_PAGE_SIZE") // 4 if pages > 0 else LEAST_FREE
