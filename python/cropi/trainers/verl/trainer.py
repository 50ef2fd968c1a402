"""A verl trainer (0.8 and later) that changes its prompts at every stage and keeps optimizer and engine running.

::

    VERL_USE_EXTERNAL_MODULES=cropi.trainers.verl.trainer
    trainer.v1.trainer_mode=cropi_sync
    +trainer.cropi.selection=selected.jsonl    # the prompts to train on; replaced by the command
    +trainer.cropi.stage_steps=200             # steps between two selections; trainer.save_freq has to divide it
    +trainer.cropi.command='...'               # run there: {checkpoint} {stage} {step} {selection} {rollouts}
    +trainer.cropi.record=rollouts             # optional: write every step's rollouts there, with token ids
    +trainer.cropi.id_key=extra_info.index     # where the prompt id stands (this is the default)

The command merges the checkpoint, scores the prompts and writes the selection anew; ``examples/verl/select.sh`` is
one. It runs while the rollout engine sleeps. Without a command the selection file is only looked at after every
step, and whatever replaces it decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cropi.commands import fill, run_command
from cropi.data.prompt_ids import PromptIds
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.verl_batch import LOGPROBS, rollouts_of_table
from cropi.trainers.recording import record_step
from cropi.trainers.verl.options import check_options
from cropi.trainers.verl.order import SelectionOrder
from cropi.trainers.verl.selected import ID_KEY, Selected
from cropi.trainers.verl.versions import need

INSTEAD = "up to 0.7 use cropi.trainers.verl.sampler"
BASE = "verl.trainer.ppo.v1.trainer_base"
register_trainer: Any = need(BASE, "register_trainer", "CropiTrainerSync", INSTEAD)
PPOTrainerSync: Any = need("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync", "CropiTrainerSync", INSTEAD)
FIELDS = ("prompts", "responses", "response_mask", "rm_scores", "reward_model")


@register_trainer("cropi_sync")
class CropiTrainerSync(PPOTrainerSync):
    """verl's synchronous trainer on the selected prompts."""

    def __init__(self, config: Any) -> None:
        # verl asks for the mode's name, not for the class: any other than "sync" would get the asynchronous buffer.
        from omegaconf import open_dict

        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _init_dataloader(self) -> None:
        """verl's own dataloaders, the training one over the selected rows.

        Raises:
            CropiError: a missing option, a row without a stable id, or stages that no checkpoint falls on.
        """
        options = self.config.trainer.get("cropi") or {}
        self.cropi_options = check_options(options, self.config.trainer)
        super()._init_dataloader()
        frame = getattr(self.train_dataset, "dataframe", self.train_dataset)
        key = options.get("id_key") or ID_KEY
        ids = PromptIds(frame, key, "data.train_files", "+trainer.cropi.id_key")
        data = self.config.data
        selected = Selected(options["selection"], ids, data.train_batch_size)
        self.cropi_order = SelectionOrder(
            selected, shuffle=bool(data.get("shuffle", True)), seed=int(data.get("seed") or 0)
        )
        # The number of steps stays the one that verl computed from the whole dataset.
        old: Any = vars(self)["train_dataloader"]
        self.train_dataloader = type(old)(
            dataset=self.train_dataset, batch_size=old.batch_size, num_workers=old.num_workers, drop_last=True,
            collate_fn=old.collate_fn, sampler=self.cropi_order,
        )  # fmt: skip

    def on_train_begin(self) -> None:
        """Select again if the checkpoint that training goes on from ended a stage."""
        super().on_train_begin()
        self._new_stage(self.global_steps - 1)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> Any:
        """One training step, its rollouts recorded."""
        batch = super().step(metrics, timing_raw)
        if self.cropi_options.get("record"):
            self._record(batch)
        return batch

    def on_step_end(self) -> None:
        """At the end of a stage select before the engine wakes up; then verl's own work."""
        self._new_stage(self.global_steps)
        super().on_step_end()

    def _new_stage(self, finished: int) -> None:
        every, command = self.cropi_options.get("stage_steps"), self.cropi_options.get("command")
        if command and finished and finished % every == 0 and finished < self.total_training_steps:
            values = self._values(finished, every)
            filled = fill(command, values, option="trainer.cropi.command")
            log = Path(f"{self._folder()}/cropi_select.log")
            run_command("trainer.cropi.command", filled, log, values=values)
        if self.cropi_order.refresh():
            self.train_dataloader_it = None  # worker processes have read ahead of the old selection

    def _values(self, finished: int, every: int) -> dict[str, object]:
        checkpoint = Path(self._folder()).absolute() / f"global_step_{finished}" / "actor"
        return {
            "checkpoint": checkpoint, "stage": finished // every, "step": finished,
            "selection": self.cropi_order.selected.path.absolute(), "rollouts": self.cropi_options.get("record") or "",
        }  # fmt: skip

    def _folder(self) -> str:
        return str(self.config.trainer.default_local_dir)

    def _record(self, batch: Any) -> None:
        import transfer_queue

        id_key = self.cropi_options.get("id_key") or ID_KEY
        fields = [*FIELDS, id_key.split(".")[0]]
        rollout = self.config.actor_rollout_ref.rollout
        fields.append(LOGPROBS[0] if rollout.get("calculate_log_probs") else LOGPROBS[1])
        table = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        reading = Reading(id_key=id_key, temperature=rollout.temperature)
        record_step(
            Path(self.cropi_options["record"]) / f"{self.global_steps}.jsonl",
            lambda left: rollouts_of_table(table, batch.keys, batch.tags, self.global_steps, reading, left),
        )
