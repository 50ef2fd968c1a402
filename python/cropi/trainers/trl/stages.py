"""The staged curriculum inside a GRPOTrainer: a stage is an epoch of the trainer, and begins with a selection.

TRL's data loader reads ahead, so a list of prompts that changes in the middle of an epoch would take effect a few
batches late. Here every stage is an epoch of its own, ``stage_steps`` long: a new epoch makes a new iterator, nothing
is read ahead across the boundary, and a resumed run counts its way to the right batch of the right stage.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cropi.data.prompt_ids import PromptIds
from cropi.data.scan import NothingScored, NothingToSelect
from cropi.data.writers import replace_records
from cropi.errors import CropiError
from cropi.files import write_atomic
from cropi.store.manifest import first_difference
from cropi.trainers.trl.capture import RecordingMixin
from cropi.trainers.trl.checkpoints import newest_whole
from cropi.trainers.trl.checks import check_arguments, check_policy, check_space
from cropi.trainers.trl.live import LiveMixin, LiveRun
from cropi.trainers.trl.losses import estimator_of_config
from cropi.trainers.trl.options import Curriculum
from cropi.trainers.trl.records import check_datasets
from cropi.trainers.trl.rollout_log import cut_unfinished_line, log_files, merge_rollouts, rewind
from cropi.trainers.trl.sampler import StagePlan, StageSampler, check_enough, pass_seed
from cropi.trainers.trl.scoring import (
    Chosen,
    check_files,
    choose_prompts,
    folder_of,
    forget_sketches,
    own_randomness,
)

STATE = "cropi_state.json"
logger = logging.getLogger(__name__)


class StageCallback(TrainerCallback):
    """Begins a stage whenever the trainer begins an epoch."""

    def __init__(self, trainer: CurriculumMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._cropi_check_fresh()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The trainer's own count of epochs is not passed on; this one is exact, because an epoch has stage_steps steps.
        self.trainer._cropi_begin_stage(int(state.global_step) // self.trainer._cropi_curriculum.stage_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._cropi_live is not None:
            self.trainer._cropi_live.end_step(int(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._cropi_merge()


class CurriculumMixin(LiveMixin):
    """Trains each stage on the prompts that the current policy's gradients speak for. See :class:`Curriculum`."""

    _cropi_curriculum: Curriculum
    _cropi_resumed: bool = False
    _cropi_clock: tuple[float, int] = (0.0, 0)  # when the last selection was done, and at which step

    def __init__(self, *args: Any, curriculum: Curriculum, **kwargs: Any) -> None:
        if not isinstance(curriculum, Curriculum):
            raise CropiError(f"curriculum must be a Curriculum, got {type(curriculum).__name__}")
        recording = curriculum.recording
        found = check_datasets(args, kwargs, recording.id_column if recording else "id", recording)
        if found is None:
            raise CropiError("train_dataset is missing: the curriculum selects its prompts")
        self._cropi_opened = {name: curriculum.opened(name) for name in ("train", "valid")}
        scans = check_files(curriculum, self._cropi_opened, found.__contains__)
        self._cropi_ids: PromptIds = found
        self._cropi_curriculum = curriculum
        self._cropi_plan = StagePlan(0, list(range(len(found))))
        self._cropi_chosen: list[str] | None = None
        self._cropi_stage_known = -1
        super(RecordingMixin, self).__init__(*args, **kwargs)
        self._cropi_folder = Path(curriculum.folder or Path(self.args.output_dir) / "cropi")
        if curriculum.estimator == "auto":
            estimator, left_out = estimator_of_config(self.args)
            self._cropi_curriculum = curriculum = replace(curriculum, estimator=estimator)
            for text in left_out:
                logger.warning("selections leave out a part of the loss: %s", text)
        self._cropi_seed = int(self.args.seed if curriculum.seed is None else curriculum.seed)
        self._cropi_start(recording)
        self._cropi_earlier = [
            path for kind in ("train", "valid") for path in log_files(self._cropi_log.folder, kind)
        ]
        check_arguments(self, curriculum, len(found))
        check_policy(self.accelerator.unwrap_model(self.model), curriculum)
        if curriculum.live is None:
            check_space(self, curriculum, scans, self._cropi_folder, len(found))
        else:
            model = self.accelerator.unwrap_model(self.model)
            self._cropi_live = LiveRun(model, curriculum, found.names, self._cropi_seed)
        self.add_callback(StageCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own, but ``resume_from_checkpoint=True`` takes the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            found = newest_whole(self.args.output_dir, STATE)
            if found is None:
                raise CropiError(
                    f"resume_from_checkpoint: {self.args.output_dir} holds no whole checkpoint of a curriculum; start "
                    "with trainer.train() in a new output_dir"
                )
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ------------------------------------------------------------------------------------------ checks
    def _cropi_check_fresh(self) -> None:
        if self._cropi_earlier and not self._cropi_resumed:
            raise CropiError(
                f"{self._cropi_log.folder} holds rollouts of an earlier run, for example "
                f"{self._cropi_earlier[0].name}: go on with trainer.train(resume_from_checkpoint=True), remove the "
                "folder, or take another output_dir"
            )

    # ----------------------------------------------------------------------------------------- sampler
    @property
    def _cropi_prompts(self) -> int:
        """Different prompts in a generation batch."""
        return int(self.args.generation_batch_size // self.num_generations)

    def _get_train_sampler(self, dataset: Any = None) -> StageSampler:
        every = self.args.steps_per_generation * self.num_iterations
        return StageSampler(
            self._cropi_plan,
            chunks=self._cropi_curriculum.stage_steps * self.args.gradient_accumulation_steps // every,
            prompts=self._cropi_prompts, generations=self.num_generations, repeats=every,
            shuffle=bool(self.shuffle_dataset), seed=self._cropi_seed,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ stages
    def _cropi_begin_stage(self, stage: int) -> None:
        if stage != self._cropi_stage_known:  # else it comes from the checkpoint
            chosen = self._cropi_choose(stage)
            self._cropi_chosen = None if chosen is None else chosen.ids
            self._cropi_stage_known = stage
            self._cropi_note(stage, chosen)
            self._cropi_forget(stage)
        self._cropi_clock = time.monotonic(), int(self.state.global_step)
        self._cropi_stage = self._cropi_plan.stage = stage
        ids = self._cropi_chosen
        self._cropi_plan.rows = (
            list(range(len(self._cropi_ids))) if ids is None else self._cropi_ids.places(ids)
        )
        check_enough(self._cropi_plan.rows, self._cropi_prompts, stage)
        self._metrics["train"]["cropi/stage"].append(float(stage))
        self._metrics["train"]["cropi/prompts"].append(float(len(self._cropi_plan.rows)))

    def _cropi_choose(self, stage: int) -> Chosen | None:
        options, live, others = self._cropi_curriculum, self._cropi_live, self._cropi_seconds()
        if live is not None and stage % live.live.refresh and self._cropi_chosen is not None:
            return self._cropi_draw(live)
        if live is None and options.train is None and stage == 0:
            return None  # nothing has been recorded yet
        if options.valid is None and not any(
            self._cropi_ranks.gather(log_files(self._cropi_log.folder, "valid"))
        ):
            # Of its own randomness, so that a run that is resumed right here draws the same rollouts.
            seed = pass_seed(self._cropi_seed, stage, -1 - self._cropi_ranks.rank)
            with own_randomness(self.accelerator.device, seed):
                self.evaluate()
        self._cropi_merge()
        folder = self._cropi_folder / folder_of(stage)
        if live is not None:
            begun = time.monotonic()
            model, valid = self.accelerator.unwrap_model(self.model), self._cropi_sources("valid", folder)
            self._cropi_check_recorded(stage, ("valid",))
            live.refresh(model, self._tokenizer, valid, stage, self._cropi_seed, self._cropi_ranks)
            chosen = self._cropi_draw(live)
            chosen.figures["seconds"] = time.monotonic() - begun
            return chosen
        try:
            self._cropi_check_recorded(stage)
            return choose_prompts(
                self.accelerator.unwrap_model(self.model), self._tokenizer, options, stage=stage,
                # In stage 0 too small a fraction is an error; later, work would be lost by one.
                least=self._cropi_prompts if stage else 0, others=others,
                folder=folder, train=self._cropi_sources("train", folder),
                valid=self._cropi_sources("valid", folder), known=self._cropi_ids.__contains__, ranks=self._cropi_ranks,
                seed=self._cropi_seed, progress=not self.args.disable_tqdm,
            )  # fmt: skip
        except NothingToSelect as error:
            scored = not isinstance(error, NothingScored)
            if options.on_nothing == "error" or (options.on_nothing == "auto" and scored):
                raise
            logger.warning("%s; the prompts of the stage before are kept", error)
            return None if self._cropi_chosen is None else Chosen(self._cropi_chosen, {"kept": True})

    def _cropi_seconds(self) -> float:
        """What the steps of a stage take, by those since the last selection, or since this run went on; NaN before."""
        begun, step = self._cropi_clock
        steps = int(self.state.global_step) - step
        return (time.monotonic() - begun) / steps * self._cropi_curriculum.stage_steps if steps else math.nan

    def _cropi_forget(self, stage: int) -> None:
        """Sketches of earlier stages are needed by this one's successor, and where a checkpoint leads back to them."""
        options = self._cropi_curriculum
        if self._cropi_ranks.first and not options.keep_sketches and (options.budget or options.passes):
            states = [
                json.loads(path.read_text())
                for path in Path(self.args.output_dir).glob(f"checkpoint-*/{STATE}")
            ]
            forget_sketches(self._cropi_folder, {int(state["stage"]) for state in states}, stage)

    def _cropi_draw(self, live: LiveRun) -> Chosen:
        """The next prompts by what the steps so far have shown."""
        options, pool = self._cropi_curriculum, len(self._cropi_ids)
        wanted = options.count or math.floor(pool * options.fraction + 1e-9)
        return Chosen(*live.choose(min(max(wanted, self._cropi_prompts), pool), int(self.state.global_step)))

    def _cropi_merge(self) -> None:
        """Rank 0 writes one record a prompt, for this stage's selection and for ``cropi sketch``."""
        self._cropi_ranks.barrier()  # every rank has written
        folder = self._cropi_log.folder

        def write() -> None:
            for kind in ("train", "valid"):
                if logs := log_files(folder, kind):
                    merge_rollouts(logs, folder / f"{kind}.jsonl")

        self._cropi_ranks.agree(lambda: write() if self._cropi_ranks.first else None)

    def _cropi_check_recorded(self, stage: int, kinds: tuple[str, ...] = ("train", "valid")) -> None:
        """What a stage needs of this run's rollouts may be missing: no reward function may have scored one."""
        for kind in kinds:
            needed = self._cropi_curriculum.files(kind) is None
            if not needed or (self._cropi_log.folder / f"{kind}.jsonl").exists():
                continue
            lost = sum(self._cropi_ranks.gather(self._cropi_without_record[kind]))
            if kind == "train":
                raise NothingScored(
                    lost, Counter({"fewer than two responses that a reward function scored": lost}),
                    before=f"stage {stage}: ", otherwise="; check the reward functions",
                )  # fmt: skip
            raise CropiError(
                f"stage {stage}: nothing was recorded of eval_dataset: none of its {lost} prompts has two responses "
                "that a reward function scored with a finite number; check the reward functions"
            )

    def _cropi_sources(self, kind: str, folder: Path) -> Any:
        files = self._cropi_opened[kind]
        recorded, both = self._cropi_log.folder / f"{kind}.jsonl", folder / f"both-{kind}.jsonl"
        if files is None:
            return [recorded]
        if kind != "train" or not self._cropi_curriculum.use_recorded or not recorded.exists():
            return files
        ranks = self._cropi_ranks
        ranks.agree(lambda: replace_records(files, recorded, both) if ranks.first else None)
        return [both]

    def _cropi_note(self, stage: int, chosen: Chosen | None) -> None:
        if not self._cropi_ranks.first:
            return
        line = {"stage": stage, "step": int(self.state.global_step), "dataset": len(self._cropi_ids)}
        line |= chosen.figures if chosen else {"selected": len(self._cropi_ids)}
        self._cropi_folder.mkdir(parents=True, exist_ok=True)
        with open(self._cropi_folder / "stages.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("stage %d: %s", stage, line)

    # ----------------------------------------------------------------------------------------- resuming
    def _cropi_settings(self) -> dict[str, Any]:
        return self._cropi_curriculum.settings() | {
            "seed": self._cropi_seed, "generation_batch_size": int(self.args.generation_batch_size),
            "num_generations": int(self.num_generations), "num_iterations": int(self.num_iterations),
            "steps_per_generation": int(self.args.steps_per_generation),
            "gradient_accumulation_steps": int(self.args.gradient_accumulation_steps),
            "shuffle_dataset": bool(self.shuffle_dataset), "prompts": len(self._cropi_ids),
        }  # fmt: skip

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        sizes = {
            name: size
            for part in self._cropi_ranks.gather(self._cropi_log.sync())
            for name, size in part.items()
        }
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            state = {
                "version": 1, "stage": self._cropi_stage_known, "selected": self._cropi_chosen, "logs": sizes,
                "settings": self._cropi_settings(),
            }  # fmt: skip
            if self._cropi_live is not None:
                self._cropi_live.save(folder)
            write_atomic(folder / STATE, json.dumps(state, ensure_ascii=False) + "\n")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._cropi_load(Path(checkpoint))

    def _cropi_load(self, checkpoint: Path) -> None:
        if not (checkpoint / STATE).is_file():
            raise CropiError(
                f"{checkpoint} holds no {STATE}: it was saved without a curriculum; load its weights as the model and "
                "start a new run"
            )
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        differs = first_difference(state["settings"], json.loads(json.dumps(self._cropi_settings())))
        if differs:
            raise CropiError(
                f"{checkpoint} was saved with {differs[0]} = {differs[1]}, but this run has {differs[2]}: prompts "
                "would come in another order; use the same settings, or load the checkpoint's weights as the model "
                "of a new run"
            )
        ids = state["selected"]
        lost = [name for name in ids or () if name not in self._cropi_ids]
        if lost:
            raise CropiError(
                f"{len(lost)} selected prompts are not in train_dataset any more, for example {lost[0]!r}"
            )
        if self._cropi_live is not None:
            self._cropi_live.load(checkpoint)
        self._cropi_stage_known, self._cropi_chosen = int(state["stage"]), ids
        self._cropi_log.close()
        self._cropi_ranks.agree(lambda: self._cropi_rewind(state) if self._cropi_ranks.first else None)
        self._cropi_resumed = True

    def _cropi_rewind(self, state: dict[str, Any]) -> None:
        """What the checkpoint does not know of did not happen: neither rollouts nor stages."""
        rewind(self._cropi_log.folder, state["logs"])
        notes = self._cropi_folder / "stages.jsonl"
        if notes.exists():
            cut_unfinished_line(notes)
            lines = notes.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomic(
                notes, "".join(line for line in lines if json.loads(line)["stage"] <= state["stage"])
            )
