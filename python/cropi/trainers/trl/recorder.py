"""Recording rollouts inside a GRPOTrainer, with token ids and the log-probs that the trainer computes anyway."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cropi.errors import CropiError
from cropi.trainers.newest import Newest, merge_rollouts
from cropi.trainers.trl.options import Recording
from cropi.trainers.trl.ranks import Ranks
from cropi.trainers.trl.records import columns_of, group_record, id_of
from cropi.trainers.trl.rollout_log import RolloutLog, log_files
from cropi.trainers.trl.scoring import own_randomness
from cropi.trainers.trl.versions import check_batch, check_trainer
from cropi.trainers.values import plain_value, whole_text

ROWS = "cropi_rows"
MADE = "cropi_advantages"  # of a generation batch: the advantages that TRL made of the rewards
IMAGES = ("image", "images")  # the columns that TRL reads
TOKENS_ONLY = "a trajectory record holds tokens only"
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
    # Of rows that TRL masks whole, and computes none of.
    masked: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    waiting: int = 0

    def logprobs(self) -> list[list[float | None]] | None:
        """Per row, the log-probs of its tokens; None where there is no finite one (JSON has no other)."""
        if not self.seen:
            return None
        values: list[list[float | None]] = [[] for _ in self.records]
        for rows, table in (*self.seen, *self.masked):
            # A rounding of 1e-6 is below float32's own at the size of a log-prob, and a third of the file.
            for row, line in zip(rows.tolist(), table.float().cpu().double().round(decimals=6).tolist()):
                values[row] = [value if math.isfinite(value) else None for value in line[: self.lengths[row]]]
        return values


class Recorder:
    """The rollouts of one GRPOTrainer, from generation to :class:`RolloutLog`.

    Log-probs are taken from the forward pass of the loss where the policy has not moved since it generated (then TRL
    computes no others), otherwise they are TRL's "old" log-probs; those of responses that TRL masks whole are computed
    here, and a ``rollout_func`` may give its own. All but these are at the sampling temperature.

    Args:
        trainer: has been built.
        recording: None: rollouts are not recorded; there are a log's folder and ranks all the same.

    Raises:
        CropiError: the trainer lacks something that is read from it, or its rollouts cannot be recorded.
    """

    def __init__(self, trainer: Any, recording: Recording | None) -> None:
        check_trainer(trainer)
        self.trainer, self.recording = trainer, recording
        self.ranks = Ranks()
        folder = (recording and recording.folder) or Path(trainer.args.output_dir) / "cropi" / "rollouts"
        self.log = RolloutLog(folder, self.ranks.rank)
        self.newest = {"train": Newest(), "valid": Newest()}  # of what is logged, for rank 0
        self.stage = 0
        self.eval_name = "valid"
        self.has_sets = True
        self.without_record: Counter[str] = Counter()  # prompts by kind
        self._left_out: Counter[str] = Counter()
        self._scored: tuple[Any, Any, list[list[int]], torch.Tensor] | None = None
        self._pending: Generation | None = None
        self._rows_now: torch.Tensor | None = None
        self._changed = False  # whether a subclass has changed advantages
        if recording is None:
            return
        datasets = [trainer.train_dataset]
        given = trainer.eval_dataset
        datasets += given.values() if isinstance(given, Mapping) else [given]
        if any(name in IMAGES for data in datasets for name in getattr(data, "column_names", None) or ()):
            raise _unrecorded(f"images ({' or '.join(IMAGES)} in a dataset): {TOKENS_ONLY}")

    def columns(self) -> list[str]:
        """The dataset's columns that the trainer must not drop."""
        if self.recording is None:
            return []
        column = self.recording.id_key
        return [column, column.split(".")[0], self.recording.set_column, *self.recording.columns]

    # ------------------------------------------------------------------------------- what the trainer does
    def scored(
        self, inputs: Any, completions: Any, responses: list[list[int]], rewards: torch.Tensor
    ) -> None:
        """The reward functions have been called; the rewards are those of all ranks."""
        self._scored = (inputs, completions, responses, rewards)

    def rows_of(self, output: Mapping[str, Any]) -> Any:
        """The dataset's rows of a generation batch, one a response.

        Raises:
            CropiError: it is not what was scored last. A subclass of the trainer has put in other responses (of a
                replay buffer, or of several draws), and nothing says whose prompts and rewards they are.
        """
        inputs, _, responses, _ = self._scored or (None, None, [], None)
        given = output["completion_ids"].tolist()
        if len(given) != len(responses) or any(a[: len(b)] != b for a, b in zip(given, map(list, responses))):
            raise CropiError(
                f"{own_class(self.trainer)} trains on other responses than those that it generated and scored last, of "
                "which nothing says whose prompts and rewards they are: take a trainer that trains on what it "
                "generates, or leave recording (recording=None in Curriculum) and live out"
            )
        return inputs

    def generated(self, output: dict[str, Any]) -> None:
        """A generation batch is complete. It is written now, or once the loss has computed its log-probs.

        Raises:
            CropiError: the batch lacks something that is recorded, or the log-probs of the last one were not seen.
        """
        if self.recording is None:
            return
        check_batch(self.trainer, output)
        if "num_images" in output or "pixel_values" in output:
            raise _unrecorded(f"images (in messages): {TOKENS_ONLY}")
        if self._pending is not None and self._pending.waiting:
            self._pending = None
            raise CropiError(
                "the loss of the last generation batch was computed without _get_per_token_logps_and_entropies, so its "
                "log-probs were not seen; set logprobs=False in Recording (every ratio is then 1)"
            )
        generation = self.begin(output)
        sampled = self.trainer.rollout_func is not None and "sampling_per_token_logps" in output
        known = output.get("sampling_per_token_logps" if sampled else "old_per_token_logps")
        if self.recording.logprobs and not sampled:
            generation.masked = self._of_masked(output)
        if self.recording.logprobs and known is None:
            generation.waiting = len(generation.records)
            self._pending = generation
            output[ROWS] = torch.arange(len(generation.records), device=output["completion_ids"].device)
            return
        if self.recording.logprobs and known is not None:
            generation.seen.append((torch.arange(len(generation.records), device="cpu"), known.detach()))
        self.write(generation)

    def compare_advantages(self, inputs: Mapping[str, Any]) -> None:
        """Notice a subclass of the trainer that changes the advantages between TRL's rewards and TRL's loss."""
        made = inputs.get(MADE)
        if made is None or self._changed:
            return
        # NaN, of a reward that is NaN, is no change.
        if torch.allclose(made, inputs["advantages"], rtol=0, atol=0, equal_nan=True):
            return
        self._changed = True
        self.advantages_changed(own_class(self.trainer))

    def advantages_changed(self, name: str) -> None:
        """A class of this name trains with other advantages than TRL made of the rewards."""
        logger.warning(
            "%s changes the advantages that TRL made of the rewards: a record holds rewards, of which `cropi` makes "
            "advantages by --estimator, so that sketches of these records are not of the loss that is trained", name,
        )  # fmt: skip

    def _of_masked(self, output: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The log-probs of responses that are masked whole (``mask_truncated_completions``): TRL computes none.

        They count in their group's mean and deviation, and so do their records.
        """
        trainer = self.trainer
        rows = (output["completion_mask"].sum(1) == 0).nonzero()[:, 0]
        # Of a model in shards every rank takes part in every forward pass.
        if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and any(self.ranks.gather(len(rows))):
            rows = torch.arange(len(output["completion_ids"]), device=rows.device)
        if not len(rows):
            return []
        prompt, response = output["prompt_ids"][rows], output["completion_ids"][rows]
        attended = torch.cat([output["prompt_mask"][rows], torch.ones_like(response)], dim=1)
        with torch.no_grad(), own_randomness(response.device):
            got = trainer._get_per_token_logps_and_entropies(
                trainer.model, torch.cat([prompt, response], dim=1), attended, response.shape[1],
                batch_size=trainer.args.per_device_train_batch_size,
            )  # fmt: skip
        return [(rows, got[0])]

    @contextmanager
    def loss(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Around the loss of a micro-batch: its log-probs are those of the rows that wait for them."""
        self._rows_now = inputs.get(ROWS)
        try:
            yield
        finally:
            self._rows_now = None
        generation = self._pending
        if generation is not None and not generation.waiting:
            self._pending = None
            self.write(generation)

    def computed(self, logprobs: torch.Tensor) -> None:
        """The log-probs of a forward pass, float [rows, tokens]; the first pass of a loss is the policy's."""
        rows, generation = self._rows_now, self._pending
        if rows is not None and generation is not None and generation.waiting:
            generation.seen.append((rows, logprobs.detach()))
            generation.waiting -= len(rows)
        self._rows_now = None

    # ---------------------------------------------------------------------------------------- records
    def begin(self, output: Mapping[str, Any]) -> Generation:
        """The records of a generation batch, a row each; rewards and log-probs are put in by :meth:`write`."""
        trainer, recording = self.trainer, self.recording
        inputs = self.rows_of(output)
        assert recording is not None and self._scored is not None
        _, completions, responses, rewards = self._scored
        training = bool(trainer.model.training)
        first = trainer.accelerator.process_index * len(inputs)
        table = rewards[first : first + len(inputs)].detach().float().cpu()
        weights = trainer.reward_weights.float().cpu()
        total = (table * weights).nansum(dim=1)
        total[torch.isnan(table).all(dim=1)] = math.nan
        prompts = _unpadded(output["prompt_ids"], output["prompt_mask"])
        masks = output["tool_mask"].tolist() if "tool_mask" in output else None
        # Before 1.14 TRL knew the tokenizer's end token only.
        ends = getattr(trainer, "eos_token_ids", None) or [trainer._tokenizer.eos_token_id]
        records = []
        for i, row in enumerate(inputs):
            record: dict[str, Any] = {"id": id_of(row, recording.id_key), "prompt_ids": prompts[i]}
            if not training and self.has_sets:
                record["set"] = str(row.get(recording.set_column) or self.eval_name)
            record |= columns_of(row, recording.columns, f"the prompt {record['id']!r}")
            record["response_ids"] = [int(token) for token in responses[i]]
            if masks is not None:  # 0 on what tools, or rollout_func's environment, have written
                record["loss_mask"] = masks[i][: len(responses[i])]
            record["truncated"] = not responses[i] or responses[i][-1] not in ends
            if recording.text:
                # A dataset whose environments own the prompts may have none.
                if row.get("prompt") is not None:
                    record["prompt"] = plain_value(row["prompt"], f"the prompt {record['id']!r}")
                record["responses"] = whole_text(_text(completions[i]))
            if len(trainer.reward_func_names) > 1:
                record["rewards_by_function"] = {
                    name: value if math.isfinite(value) else None
                    for name, value in zip(trainer.reward_func_names, table[i].tolist())
                }
            records.append(record)
        size = trainer.num_generations if training else trainer.num_generations_eval
        return Generation(
            "train" if training else "valid", records, total, size, [len(r["response_ids"]) for r in records]
        )

    def write(self, generation: Generation) -> None:
        """Append a generation batch to the log, one record a prompt."""
        logprobs = generation.logprobs()
        rows = [
            record | {"reward": float(reward)} | ({"logprobs": logprobs[i]} if logprobs else {})
            for i, (record, reward) in enumerate(zip(generation.records, generation.rewards.tolist()))
        ]
        # TRL deals rows out to the ranks in order: a group is cut in two where the share is not a multiple of its size.
        if len(rows) % generation.size:
            rows = [row for part in self.ranks.gather(rows) for row in part]
            if not self.ranks.first:
                return
        step = int(self.trainer.state.global_step)
        common = {
            "temperature": float(self.trainer.temperature),
            "policy": f"step {step}",
            "step": step,
            "stage": self.stage,
        }
        groups = [rows[i : i + generation.size] for i in range(0, len(rows), generation.size)]
        left_out: Counter[str] = Counter()
        records = [group_record(group, common, left_out) for group in groups]
        self.log.append(generation.kind, [record for record in records if record is not None])
        self.without_record[generation.kind] += records.count(None)
        for reason, count in left_out.items():
            if reason not in self._left_out:
                logger.warning(
                    "%d of %d responses at step %d are %s and left out of the records (said once; TRL trains on as it "
                    "does)", count, len(rows), step, reason,
                )  # fmt: skip
        self._left_out.update(left_out)

    def merge(self) -> None:
        """Rank 0 writes one record a prompt, for this stage's selection and for ``cropi sketch``."""
        self.ranks.barrier()  # every rank has written
        folder = self.log.folder

        def work() -> None:
            for kind, newest in self.newest.items():
                if logs := log_files(folder, kind):
                    merge_rollouts(logs, folder / f"{kind}.jsonl", newest)

        self.ranks.agree(lambda: work() if self.ranks.first else None)


def own_class(trainer: Any) -> str:
    """The name of the first class of a trainer that is neither this package's nor TRL's GRPOTrainer."""
    import trl

    classes = (cls for cls in type(trainer).__mro__ if not cls.__module__.startswith("cropi."))
    return next(
        cls for cls in classes if cls is trl.GRPOTrainer or not issubclass(trl.GRPOTrainer, cls)
    ).__name__


def _unrecorded(what: str) -> CropiError:
    return CropiError(f"rollouts cannot be recorded with {what}; pass recording=None in Curriculum")


def _unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu())]


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)
