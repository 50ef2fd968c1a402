"""The rows of a batch that a trainer holds: what is said of each of them, checked and on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cropi.checked import absent, is_id
from cropi.data.checks import LOGPROB_SLACK
from cropi.errors import CropiError, article
from cropi.model.policy import Policy
from cropi_kernels.sketcher.batch.one_sequence import numbered, restart
from cropi_kernels.sketcher.policy.lengths import Lengths


class BatchRows:
    """``ids`` ``[batch, length]``, ``mask`` (0 for padding), ``positions``, and checks of what is given for each row or
    token: an error names the argument, the row and the column."""

    def __init__(self, policy: Policy, ids: Any, mask: Any, positions: Any) -> None:
        _check_tensor("input_ids", ids)
        if ids.ndim != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
            raise CropiError(
                f"input_ids is {ids.dtype} {list(ids.shape)}: give int64 [batch, length], a row a response"
            )
        self.batch, self.length = ids.shape
        self.device = policy.device
        if ids.device != self.device:
            raise CropiError(
                f"input_ids is on {ids.device} and the model on {self.device}: move the batch there"
            )
        self.ids = ids
        self._pads, self._ends = _padding_of(policy)
        if mask is None:
            self._check_unpadded()
        self.mask = torch.ones_like(ids) if mask is None else self._shaped("attention_mask", mask)
        if (empty := _first(~self.mask.bool().any(dim=1))) is not None:
            raise CropiError(f"attention_mask: row {empty[0]} is all padding; leave the row out")
        self._check_mask("attention_mask", self.mask, "a row holds a prompt and one response")
        counted = (self.mask.long().cumsum(1) - 1).clamp_min(0)
        # Windows of attention, states and some models' positions count columns. Positions that are given may count
        # those of padding too.
        held = self.mask.bool()
        self.shifted = positions is None and bool((held[:, 1:] & ~held[:, :-1]).any())
        self.positions = counted if positions is None else self._shaped("position_ids", positions)
        if positions is not None and (at := restart(self.positions, self.mask)) is not None:
            raise CropiError(
                f"position_ids restart in row {at[0]}, column {at[1]}: a row holds a prompt and one response; give "
                "every response a row of its own, or use cropi.GradientSketcher, which takes several in a row"
            )

    def together(self, chosen: torch.Tensor, scored: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Ids, mask, positions and ``scored`` of the ``chosen`` rows, in which no padding stands before a token."""
        parts = self.ids[chosen], self.mask[chosen], self.positions[chosen], scored[chosen]
        if not self.shifted:
            return parts
        longest = int(parts[1].bool().sum(dim=1).max())
        order = torch.argsort((~parts[1].bool()).to(torch.int8), dim=1, stable=True)[:, :longest]
        return tuple(part.gather(1, order) for part in parts)

    def cut(self, segments: torch.Tensor, budget: int, lengths: Lengths) -> Iterator[torch.Tensor]:
        """Numbers of rows that go through the model together: sorted by prompt, within the budget."""
        order, step = torch.argsort(segments, stable=True), max(1, int(budget) // self.length)
        if lengths.switch is None:
            yield from order.split(step)
            return
        reach = ((self.positions * self.mask.bool()).amax(dim=1) + 1).tolist()
        chosen: list[int] = []
        # Rows of one prompt that may be in one batch follow each other.
        for row in sorted(order.tolist(), key=lambda row: (int(segments[row]), reach[row])):
            together = [reach[other] for other in (*chosen, row)]
            if chosen and (len(chosen) == step or not lengths.together(min(together), max(together))):
                yield torch.tensor(chosen, device="cpu")
                chosen = []
            chosen.append(row)
        yield torch.tensor(chosen, device="cpu")

    def _check_mask(self, name: str, mask: torch.Tensor, why: str) -> None:
        if (at := numbered(mask)) is not None:
            raise CropiError(
                f"{name} is {mask[at].item():g} in row {at[0]}, column {at[1]}: give 0 and 1 ({why})"
            )

    def _is_one_of(self, ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))

    def _check_unpadded(self) -> None:
        """Padding in front, which all tokens behind it would see, is one token of its own, or an end token twice."""
        first, second = self.ids[:, 0], self.ids[:, min(1, self.length - 1)]
        alone = [token for token in self._pads if token not in self._ends]
        twice = self._is_one_of(first, [*self._pads, *self._ends]) & (first == second)
        padded = self._is_one_of(first, alone) | twice
        if (at := _first(padded)) is not None:
            raise CropiError(
                f"attention_mask is not given, and row {at[0]} begins with the padding token {int(first[at])}, which "
                "its tokens would see: give the mask (of ones, if this is no padding)"
            )

    def _check_end(self, scored: torch.Tensor) -> None:
        last = self.ids[:, -2:]
        padded = (
            scored[:, -2:].all(dim=1) & (last[:, 0] == last[:, -1])
            if self.length > 1
            else scored[:, 0] & False
        )
        padded = padded & self._is_one_of(last[:, -1], [*self._pads, *self._ends])
        if (at := _first(padded)) is not None:
            raise CropiError(
                f"row {at[0]} ends with the padding token {int(last[at][-1])}, and it is scored: a response is scored "
                "up to its first end token; mend response_mask (labels)"
            )

    def _shaped(self, name: str, value: Any) -> torch.Tensor:
        _check_tensor(name, value)
        if tuple(value.shape) != (self.batch, self.length):
            raise CropiError(
                f"{name} has shape {list(value.shape)}: give [{self.batch}, {self.length}], as input_ids"
            )
        return self._here(name, value)

    def _here(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if value.device != self.device:
            raise CropiError(f"{name} is on {value.device} and the model on {self.device}: move it there")
        return value.detach()

    def each_row(self, name: str, value: Any) -> torch.Tensor:
        """A number for each row."""
        _check_tensor(name, value)
        if tuple(value.shape) != (self.batch,):
            raise CropiError(f"{name} has shape {list(value.shape)}: give [{self.batch}], one for each row")
        value = self._here(name, value)
        if (at := _first(~torch.isfinite(value))) is not None:
            raise CropiError(f"{name} holds NaN or infinity in row {at[0]}")
        return value

    def each_token(
        self, name: str, value: Any, scored: torch.Tensor | None = None, *, per_row: bool = True
    ) -> torch.Tensor:
        """A number for each token, in its place: float ``[batch, length]``; 0 where none was given, which may not be
        where a token is ``scored``."""
        _check_tensor(name, value)
        if per_row and tuple(value.shape) == (self.batch,):
            return self.each_row(name, value).float()[:, None].expand(self.batch, self.length)
        if value.ndim != 2 or value.shape[0] != self.batch or not 1 <= value.shape[1] <= self.length:
            row = f"[{self.batch}] (a row), " if per_row else ""
            raise CropiError(
                f"{name} has shape {list(value.shape)}: give {row}[{self.batch}, {self.length}] (a token in its "
                f"place) or [{self.batch}, n] of the last n columns"
            )
        value, first = self._here(name, value), self.length - value.shape[1]
        if scored is not None and (at := _first(scored[:, :first])) is not None:
            raise CropiError(
                f"{name} has shape {list(value.shape)}, so that it begins at column {first}, and the token in row "
                f"{at[0]}, column {at[1]} is scored: give a value for every scored token"
            )
        out = torch.zeros(self.batch, self.length, dtype=torch.float32, device=self.device)
        out[:, first:] = value.float()
        if scored is not None and (at := _first(scored & ~torch.isfinite(out))) is not None:
            raise CropiError(
                f"{name} is {float(out[at])} at the token in row {at[0]}, column {at[1]}, which is scored: "
                "give a finite number, or leave the token out of the mask"
            )
        return out

    def each_logprob(self, name: str, value: Any, scored: torch.Tensor) -> torch.Tensor:
        """A log-prob for each scored token, in its place: float ``[batch, length]``."""
        made = self.each_token(name, value, scored, per_row=False)
        if (at := _first(scored & (made > LOGPROB_SLACK))) is not None:
            raise CropiError(
                f"{name} is {float(made[at]):g} at the token in row {at[0]}, column {at[1]}: a log-prob is at "
                "most 0; give log-probs, and neither probabilities nor negative log-probs"
            )
        return made

    def scored(self, response_mask: Any, labels: Any) -> torch.Tensor:
        """bool ``[batch, length]``: which tokens are scored."""
        if (response_mask is None) == (labels is None):
            raise CropiError("give response_mask or labels, which say what is scored; one of both")
        if labels is not None:
            labels = self._shaped("labels", labels)
            wrong = (labels != -100) & (labels != self.ids)
            wrong[:, 0] = False
            if (at := _first(wrong)) is not None:
                raise CropiError(
                    f"labels[{at[0]}, {at[1]}] is {int(labels[at])}, and the token there {int(self.ids[at])}: labels "
                    "are the tokens in their own places (not shifted), or -100"
                )
            scored = labels != -100
            scored[:, 0] = False  # as Hugging Face models shift labels
        else:
            marks = self.each_token("response_mask", response_mask, per_row=False)
            self._check_mask("response_mask", marks, "weights of tokens go into weights or advantages")
            scored = marks != 0
        # A token behind padding follows the row's last one before it, from which :meth:`together` takes the padding.
        before = self.mask.bool().cumsum(dim=1) if self.shifted else self.mask
        before = torch.nn.functional.pad(before[:, :-1], (1, 0)).bool()
        scored = scored & self.mask.bool()
        if (at := _first(scored & ~before)) is not None:
            apart = bool(self.mask[at[0], : at[1]].any())
            raise CropiError(
                f"the token in row {at[0]}, column {at[1]} is scored, but "
                + (
                    "padding stands before it, which stays where position_ids are given: leave position_ids out"
                    if apart
                    else "nothing stands before it: a row needs a prompt"
                )
            )
        if (at := _first(~scored.any(dim=1))) is not None:
            raise CropiError(f"row {at[0]} has no scored token: leave the row out, or mend its response_mask")
        self._check_end(scored)
        return scored

    def prompts(self, names: Any) -> tuple[list[Any], torch.Tensor]:
        """The prompts in order of their first row, and for each row the number of its prompt: int64 ``[batch]``."""
        if names is None:
            return list(range(self.batch)), torch.arange(self.batch, device="cpu")
        names = names.tolist() if hasattr(names, "tolist") else names
        if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != self.batch:
            got = f"{len(names)} names" if isinstance(names, Sequence) else article(type(names).__name__)
            raise CropiError(f"prompt_ids is {got}: give a list of {self.batch}, one for each row")
        for row, name in enumerate(names):
            if not is_id(name):
                why = "has no id" if absent(name) else f"is {name!r:.100}"
                raise CropiError(
                    f"prompt_ids: the prompt of row {row} {why}: give a string or an integer; rows with one are "
                    "responses to one prompt"
                )
        places: dict[Any, int] = {}
        segments = [places.setdefault(name, len(places)) for name in names]
        return list(places), torch.tensor(segments, device="cpu")


def _padding_of(policy: Policy) -> tuple[list[int], list[int]]:
    """The tokens that pad, as far as model and tokenizer say; and those that begin or end a text, which may pad too."""
    sources = [
        policy.config.get_text_config(),
        getattr(policy.model, "generation_config", None),
        policy.tokenizer,
    ]
    pads, ends = (
        {int(token) for source in sources for name in names for token in _listed(getattr(source, name, None))}
        for names in (("pad_token_id",), ("bos_token_id", "eos_token_id"))
    )
    return sorted(pads), sorted(ends)


def _listed(value: Any) -> Sequence[int]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise CropiError(f"{name} is of type {type(value).__name__}: give a tensor (torch.as_tensor({name}))")


def _first(wrong: torch.Tensor) -> tuple[int, ...] | None:
    """Where the first True of a tensor stands."""
    return tuple(wrong.nonzero()[0].tolist()) if bool(wrong.any()) else None
