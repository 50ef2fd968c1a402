"""Recording rollouts inside a GRPOTrainer, with token ids and the log-probs that the trainer computes anyway."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cropi.errors import CropiError
from cropi.trainers.trl.options import Recording
from cropi.trainers.trl.ranks import Ranks
from cropi.trainers.trl.records import (
    check_datasets,
    columns_of,
    group_record,
    id_of,
)
from cropi.trainers.trl.rollout_log import RolloutLog
from cropi.trainers.trl.versions import check_batch, check_trainer
from cropi.trainers.values import plain_value, whole_text

if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object

ROWS = "cropi_rows"
logger = logging.getLogger(__name__)


@dataclass
class Generation:
    """One generation batch of this rank, until the log-probs of all its rows are there."""

    kind: str
    records: list[dict[str, Any]]  # one a row: prompt and response, still apart
    rewards: torch.Tensor  # float [rows]
    size: int  # rows a prompt
    lengths: list[int]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    waiting: int = 0

    def logprobs(self) -> list[list[float]] | None:
        """Per row, the log-probs of its tokens."""
        if not self.seen:
            return None
        values: list[list[float]] = [[] for _ in self.records]
        for rows, table in self.seen:
            # A rounding of 1e-6 is below float32's own at the size of a log-prob, and a third of the file.
            for row, line in zip(rows.tolist(), table.float().cpu().double().round(decimals=6).tolist()):
                values[row] = line[: self.lengths[row]]
        return values


class RecordingMixin(Base):
    """Writes the rollouts of a GRPOTrainer to a :class:`RolloutLog`; changes nothing that is trained.

    Log-probs are taken from the forward pass of the loss where the policy has not moved since it generated (then TRL
    computes no others), otherwise they are TRL's "old" log-probs. Both are at the sampling temperature.
    """

    _cropi_recording: Recording | None = None
    _cropi_log: RolloutLog
    _cropi_ranks: Ranks
    _cropi_pending: Generation | None = None
    _cropi_rows_now: torch.Tensor | None = None
    _cropi_scored: tuple[list[dict[str, Any]], list[Any], list[list[int]], torch.Tensor] | None = None
    _cropi_eval_name: str = "valid"
    _cropi_has_sets: bool = True
    _cropi_stage: int = 0

    def __init__(self, *args: Any, recording: Recording | None = None, **kwargs: Any) -> None:
        chosen = Recording() if recording is None else recording
        if not isinstance(chosen, Recording):
            raise CropiError(f"recording must be a Recording, got {type(chosen).__name__}")
        check_datasets(args, kwargs, chosen.id_column, chosen)
        super().__init__(*args, **kwargs)
        self._cropi_start(chosen)

    def _cropi_start(self, recording: Recording | None) -> None:
        check_trainer(self)
        self._cropi_ranks = Ranks()
        self._cropi_left_out: Counter[str] = Counter()
        self._cropi_without_record: Counter[str] = Counter()  # prompts by kind
        self._cropi_recording = recording
        folder = (recording and recording.folder) or Path(self.args.output_dir) / "cropi" / "rollouts"
        self._cropi_log = RolloutLog(folder, self._cropi_ranks.rank)
        if recording is None:
            return
        for problem, reason in (
            (bool(self.tools), "tools: their output stands between the sampled tokens"),
            (
                bool(self.environment_factories),
                "environment_factory: the environment's words are no sampled tokens",
            ),
            (bool(getattr(self, "_is_vlm", False)), "images: a trajectory record holds tokens only"),
        ):
            if problem:
                raise CropiError(
                    f"rollouts cannot be recorded with {reason}; pass recording=None in Curriculum"
                )

    # ------------------------------------------------------------------------------------------ hooks
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._cropi_recording is not None:
            wanted = (
                self._cropi_recording.id_column,
                self._cropi_recording.id_column.split(".")[0],
                self._cropi_recording.set_column,
                *self._cropi_recording.columns,
            )
            self._signature_columns += [name for name in wanted if name not in self._signature_columns]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        self._cropi_eval_name = metric_key_prefix.removeprefix("eval").removeprefix("_") or "valid"
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._cropi_recording is not None:
            self._cropi_scored = (inputs, completions, completion_ids_list, rewards)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._cropi_recording is None:
            return output
        check_batch(self, output)
        if self._cropi_pending is not None and self._cropi_pending.waiting:
            self._cropi_pending = None
            raise CropiError(
                "the loss of the last generation batch was computed without _get_per_token_logps_and_entropies, so its "
                "log-probs were not seen; set logprobs=False in Recording (every ratio is then 1)"
            )
        generation = self._cropi_begin(output)
        known = output.get(
            "sampling_per_token_logps" if self.rollout_func is not None else "old_per_token_logps"
        )
        if self._cropi_recording.logprobs and known is None:
            generation.waiting = len(generation.records)
            self._cropi_pending = generation
            output[ROWS] = torch.arange(len(generation.records), device=output["completion_ids"].device)
        else:
            if self._cropi_recording.logprobs and known is not None:
                generation.seen.append((torch.arange(len(generation.records)), known.detach()))
            self._cropi_write(generation)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._cropi_rows_now = inputs.get(ROWS)
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        finally:
            self._cropi_rows_now = None
        generation = self._cropi_pending
        if generation is not None and not generation.waiting:
            self._cropi_pending = None
            self._cropi_write(generation)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        rows, generation = self._cropi_rows_now, self._cropi_pending
        if rows is not None and generation is not None and generation.waiting:
            generation.seen.append((rows, result[0].detach()))
            generation.waiting -= len(rows)
        self._cropi_rows_now = None
        return result

    # ---------------------------------------------------------------------------------------- records
    def _cropi_begin(self, output: Mapping[str, Any]) -> Generation:
        recording, scored = self._cropi_recording, self._cropi_scored
        assert recording is not None and scored is not None
        inputs, completions, responses, rewards = scored
        self._cropi_scored = None
        training = bool(self.model.training)
        first = self.accelerator.process_index * len(inputs)
        table = rewards[first : first + len(inputs)].detach().float().cpu()
        weights = self.reward_weights.float().cpu()
        total = (table * weights).nansum(dim=1)
        total[torch.isnan(table).all(dim=1)] = math.nan
        prompts = _unpadded(output["prompt_ids"], output["prompt_mask"])
        # Before 1.14 TRL knew the tokenizer's end token only.
        ends = getattr(self, "eos_token_ids", None) or [self._tokenizer.eos_token_id]
        records = []
        for i, row in enumerate(inputs):
            record: dict[str, Any] = {"id": id_of(row, recording.id_column), "prompt_ids": prompts[i]}
            if not training and self._cropi_has_sets:
                record["set"] = str(row.get(recording.set_column) or self._cropi_eval_name)
            record |= columns_of(row, recording.columns, f"the prompt {record['id']!r}")
            record["response_ids"] = [int(token) for token in responses[i]]
            record["truncated"] = not responses[i] or responses[i][-1] not in ends
            if recording.text:
                prompt = plain_value(row["prompt"], f"the prompt {record['id']!r}")
                record |= {"prompt": prompt, "responses": whole_text(_text(completions[i]))}
            if len(self.reward_func_names) > 1:
                record["rewards_by_function"] = {
                    name: value if math.isfinite(value) else None
                    for name, value in zip(self.reward_func_names, table[i].tolist())
                }
            records.append(record)
        size = self.num_generations if training else self.num_generations_eval
        return Generation(
            "train" if training else "valid", records, total, size, [len(r["response_ids"]) for r in records]
        )

    def _cropi_write(self, generation: Generation) -> None:
        logprobs = generation.logprobs()
        rows = [
            record | {"reward": float(reward)} | ({"logprobs": logprobs[i]} if logprobs else {})
            for i, (record, reward) in enumerate(zip(generation.records, generation.rewards.tolist()))
        ]
        # TRL deals rows out to the ranks in order, so a group is cut in two where the share is no multiple of its size.
        if len(rows) % generation.size:
            rows = [row for part in self._cropi_ranks.gather(rows) for row in part]
            if not self._cropi_ranks.first:
                return
        common = {
            "temperature": float(self.temperature),
            "policy": f"step {self.state.global_step}",
            "step": int(self.state.global_step),
            "stage": self._cropi_stage,
        }
        groups = [rows[i : i + generation.size] for i in range(0, len(rows), generation.size)]
        left_out: Counter[str] = Counter()
        records = [group_record(group, common, left_out) for group in groups]
        self._cropi_log.append(generation.kind, [record for record in records if record is not None])
        self._cropi_without_record[generation.kind] += records.count(None)
        for reason, count in left_out.items():
            if reason not in self._cropi_left_out:
                logger.warning(
                    "%d of %d responses at step %d are %s and left out of the records (said once; TRL trains on as it "
                    "does)", count, len(rows), self.state.global_step, reason,
                )  # fmt: skip
        self._cropi_left_out.update(left_out)


def _unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu())]


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)
