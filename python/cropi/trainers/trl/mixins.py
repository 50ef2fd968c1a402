"""What a GRPOTrainer does, overridden: each method tells one object, ``self._cropi``, and does what it did before.

Everything that the adapter keeps is in that object, so that no attribute of a later TRL or transformers can have the
same name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cropi.errors import CropiError
from cropi.trainers.trl.checkpoints import newest_whole
from cropi.trainers.trl.options import Curriculum, Recording
from cropi.trainers.trl.recorder import MADE, Recorder
from cropi.trainers.trl.records import check_datasets
from cropi.trainers.trl.sampler import StageSampler
from cropi.trainers.trl.scoring import check_files
from cropi.trainers.trl.stage_state import STATE
from cropi.trainers.trl.stages import StageCallback, Stages

if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object


class TrlsOwn(Base):
    """Next above GRPOTrainer, and below a subclass of it: what TRL's own methods return and are given."""

    _cropi: Recorder

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if "advantages" in output:
            output[MADE] = output["advantages"].clone()
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._cropi.compare_advantages(inputs)
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss


class RecorderHooks(Base):
    """Where rollouts are seen."""

    _cropi: Recorder

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        wanted = dict.fromkeys(self._cropi.columns())
        self._signature_columns += [name for name in wanted if name not in self._signature_columns]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        self._cropi.eval_name = metric_key_prefix.removeprefix("eval").removeprefix("_") or "valid"
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._cropi.scored(inputs, completions, completion_ids_list, rewards)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self._cropi.generated(output)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        with self._cropi.loss(inputs):
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._cropi.computed(result[0])
        return result


class RecordingMixin(RecorderHooks):
    """Writes the rollouts of a GRPOTrainer to a :class:`RolloutLog`; changes nothing that is trained."""

    def __init__(self, *args: Any, recording: Recording | None = None, **kwargs: Any) -> None:
        chosen = Recording() if recording is None else recording
        if not isinstance(chosen, Recording):
            raise CropiError(f"recording must be a Recording, got {type(chosen).__name__}")
        check_datasets(args, kwargs, chosen.id_key, chosen)
        super().__init__(*args, **kwargs)
        self._cropi = Recorder(self, chosen)


class CurriculumMixin(RecorderHooks):
    """Trains each stage on the prompts that the current policy's gradients speak for. See :class:`Curriculum`."""

    _cropi: Stages

    def __init__(self, *args: Any, curriculum: Curriculum, **kwargs: Any) -> None:
        if not isinstance(curriculum, Curriculum):
            raise CropiError(f"curriculum must be a Curriculum, got {type(curriculum).__name__}")
        ids = check_datasets(args, kwargs, curriculum.id_key, curriculum.recording)
        if ids is None:
            raise CropiError("train_dataset is missing: the curriculum selects its prompts")
        opened = {name: curriculum.opened(name) for name in ("train", "valid")}
        scans = check_files(curriculum, opened, ids.__contains__)
        super().__init__(*args, **kwargs)
        self._cropi = Stages(self, curriculum, ids, opened, scans)
        self.add_callback(StageCallback(self._cropi))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own, but ``resume_from_checkpoint=True`` takes the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            newest = newest_whole(self.args.output_dir, STATE)
            if newest is None:
                raise CropiError(
                    f"resume_from_checkpoint: {self.args.output_dir} holds no whole checkpoint of a curriculum; start "
                    "with trainer.train() in a new output_dir"
                )
            resume_from_checkpoint = str(newest)
        with self._cropi.listening():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> StageSampler:
        return self._cropi.sampler()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._cropi.live is not None and self.model.training:
            self._cropi.live.place(self._cropi.rows_of(output), self._cropi.options.id_key, output)
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # From a checkpoint of the last step, inside an epoch, the trainer would go on with one step more.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._cropi.live is None:
            return super().training_step(*args, **kwargs)
        with self._cropi.live.training_step():
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._cropi.live is not None and torch.is_grad_enabled():
            inputs = self._cropi.live.begin(inputs, self.accelerator.scaler)
        return super()._compute_loss(model, inputs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self._cropi.save(folder, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._cropi.load(Path(checkpoint))
