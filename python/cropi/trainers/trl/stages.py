"""The staged curriculum inside a GRPOTrainer: a stage is an epoch of the trainer, and begins with a selection.

TRL's data loader reads ahead, so a list of prompts that changes in the middle of an epoch would take effect a few
batches late. Here every stage is an epoch of its own, ``stage_steps`` long: a new epoch makes a new iterator, nothing
is read ahead across the boundary, and a resumed run counts its way to the right batch of the right stage.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cropi.data.prompt_ids import PromptIds
from cropi.data.readers import read
from cropi.data.scan import NothingScored, NothingToSelect, Scan
from cropi.data.writers import replace_records
from cropi.errors import CropiError, once
from cropi.files import is_there
from cropi.model.policy import Policy
from cropi.pipeline.lost import LEFT_OUT, NothingToFollow, TooFewLeft, usable_sets, without_minus
from cropi.sketching.job import make_tokenize
from cropi.trainers.newest import Newest
from cropi.trainers.trl.as_scored import unlike_dataset
from cropi.trainers.trl.checks import (
    balances_experts,
    check_arguments,
    check_policy,
    check_space,
    drawn,
    prompts_a_batch,
    recorded_first,
    uses_of_a_batch,
    with_template_values,
)
from cropi.trainers.trl.live import KEPT, LiveRun, features_of
from cropi.trainers.trl.losses import REMEDY, check_own_loss, estimator_of_config
from cropi.trainers.trl.options import Curriculum
from cropi.trainers.trl.recorder import Recorder
from cropi.trainers.trl.rollout_log import log_files, rewind
from cropi.trainers.trl.sampler import StagePlan, StageSampler, check_enough, pass_seed
from cropi.trainers.trl.scoring import (
    Chosen,
    choose_prompts,
    folder_of,
    forget_plan,
    forget_sketches,
    own_randomness,
    setup_of,
)
from cropi.trainers.trl.stage_state import add_note, forget_notes, saved_stages, state_to_go_on, write_state

KEPT_PROMPTS = "the prompts of the stage before are kept"
logger = logging.getLogger(__name__)


class StageCallback(TrainerCallback):
    """Begins a stage whenever the trainer begins an epoch."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stages.check_fresh()
        self.stages.tell_what_is_seen()
        self.stages.go_on()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The trainer's own count of epochs is not passed on; this one is exact, because an epoch has stage_steps steps.
        self.stages.begin_stage(int(state.global_step) // self.stages.options.stage_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stages.live is not None:
            self.stages.live.end_step(int(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stages.merge()


class Stages(Recorder):
    """The stages of one GRPOTrainer: what is trained on now, how it is chosen, and what a checkpoint keeps of it.

    Args:
        trainer: has been built.
        options: of the curriculum.
        ids: the prompts of ``train_dataset``.
        opened: the trajectories of the options, by "train" and "valid"; None: what this run records.
        scans: of those that are there.

    Raises:
        CropiError: the trainer's arguments, the policy or the disk do not fit the stages.
    """

    def __init__(
        self,
        trainer: Any,
        options: Curriculum,
        ids: PromptIds,
        opened: Mapping[str, Any],
        scans: Mapping[str, Scan],
    ) -> None:
        self.by_configuration = options.estimator == "auto"
        if self.by_configuration:
            check_own_loss(trainer)
            estimator, left_out = estimator_of_config(trainer.args)
            options = replace(options, estimator=estimator)
            if balances_experts(trainer):
                left_out.append("router_aux_loss_coef: the load-balancing loss of experts")
            for text in left_out:
                logger.warning("selections leave out a part of the loss: %s", text)
        super().__init__(trainer, options.recording)
        options = with_template_values(trainer, options, scans)
        self.options, self.ids, self.opened = options, ids, opened
        self.folder = Path(options.folder or Path(trainer.args.output_dir) / "cropi")
        self.seed = int(trainer.args.seed if options.seed is None else options.seed)
        self.plan = StagePlan(0, list(range(len(ids))))
        self.live: LiveRun | None = None
        self._chosen: list[str] | None = None  # of stage `_known`, best first; None: the whole dataset
        self._known = -1
        self._clock = 0.0, 0  # when the last selection was done, and at which step
        self._said: set[str] = set()  # warnings of earlier stages, about the same records
        self._seconds = math.nan  # of a stage's steps, before there are any since then
        self._resumed = False
        self._earlier = [path for kind in ("train", "valid") for path in log_files(self.log.folder, kind)]
        check_arguments(trainer, options, len(ids), scans.get("train"))
        check_policy(self.model, options)
        if opened.get("train") is not None:
            tokens = make_tokenize(
                Policy(self.model, trainer._tokenizer), setup_of(options, 0, self.seed).job
            )
            if words := unlike_dataset(
                read(opened["train"], skip_bad=options.skip_bad), trainer, ids, tokens.prompt
            ):
                logger.warning("%s", words)
        if options.live is None:
            check_space(trainer, options, scans, self.folder, len(ids))
        else:
            features = (
                features_of(trainer.train_dataset, trainer.processing_class) if options.live.alike else None
            )
            self.live = LiveRun(self.model, options, ids.names, self.seed, trainer._tokenizer, features)

    @property
    def model(self) -> Any:
        """The policy, in no wrapper."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.trainer.state.global_step)

    @property
    def prompts(self) -> int:
        """Different prompts in a generation batch."""
        return prompts_a_batch(self.trainer)

    def columns(self) -> list[str]:
        """The recorder's columns; live selection needs the ids also where nothing is recorded."""
        column = self.options.id_key
        return super().columns() + ([column, column.split(".")[0]] if self.live is not None else [])

    def advantages_changed(self, name: str) -> None:
        """See :class:`Recorder`.

        Raises:
            CropiError: the estimator is made of the trainer's configuration, which does not say so.
        """
        if self.by_configuration:
            raise CropiError(
                f"{name} changes the advantages that TRL made of the rewards, so that args do not say which loss is "
                f"trained; {REMEDY}"
            )
        super().advantages_changed(name)

    def sampler(self) -> StageSampler:
        """The order of the prompts, stage by stage."""
        trainer = self.trainer
        every = uses_of_a_batch(trainer)
        return StageSampler(
            self.plan,
            chunks=self.options.stage_steps * trainer.args.gradient_accumulation_steps // every,
            prompts=self.prompts, generations=trainer.num_generations, repeats=every,
            shuffle=bool(trainer.shuffle_dataset), seed=self.seed,
        )  # fmt: skip

    def listening(self) -> AbstractContextManager[Any]:
        """Around a whole training: a live run's taps are on the model inside."""
        return nullcontext() if self.live is None else self.live.sketcher

    def check_fresh(self) -> None:
        """Raises CropiError: there was another run, of this trainer or in its folder, and this one was not resumed."""
        if self._known >= 0 and not self.step:
            raise CropiError(
                "train() was called on this trainer before, and its stages, rollouts and selector are those of that "
                "run: go on with trainer.train(resume_from_checkpoint=...), or build another trainer with another "
                "output_dir"
            )
        if self._earlier and not self._resumed:
            raise CropiError(
                f"{self.log.folder} holds rollouts of an earlier run, for example "
                f"{self._earlier[0].name}: go on with trainer.train(resume_from_checkpoint=True), remove the "
                "folder, or take another output_dir"
            )

    def go_on(self) -> None:
        """Of a run that was resumed: generation batches begin where they would have.

        TRL counts its steps from 0 again. From a checkpoint within a generation batch all later ones would begin too
        late, and the last one of a stage would be trained on in the next.
        """
        if not self._resumed:
            return
        self._clock = time.monotonic(), self.step
        trainer, args = self.trainer, self.trainer.args
        if args.sync_ref_model and args.beta:
            logger.warning(
                "args.sync_ref_model: TRL keeps no reference model in a checkpoint, so that this run's begins again as "
                "it was before the first step, and training differs from that of a run that was not stopped"
            )
        trainer._step = done = self.step * args.gradient_accumulation_steps
        every = uses_of_a_batch(trainer)
        if done % every and self.step < trainer.state.max_steps:
            logger.warning(
                "step %d is within a generation batch: TRL samples its responses anew for the %d of its %d "
                "micro-batches that are left; from a checkpoint where one ends, a run goes on as if it had not stopped",
                self.step, every - done % every, every,
            )  # fmt: skip

    def tell_what_is_seen(self) -> None:
        """Warn of prompts that the first stage will not record, where later ones choose among those that it does. In a
        run that was resumed nothing can be done about it."""
        if self._resumed or self.live is not None or self.options.train is not None:
            return
        seen = recorded_first(self.trainer, self.options, len(self.ids))
        if seen < len(self.ids) and self.ranks.first:
            logger.warning(
                "train is None, so stages choose among the prompts that the first one records: %d of the %d of "
                "train_dataset, and never the others; make stage_steps larger, or give trajectories of all of them "
                "as train (cropi.trainers.trl.collect makes them)", seen, len(self.ids),
            )  # fmt: skip

    # ------------------------------------------------------------------------------------------ stages
    def begin_stage(self, stage: int) -> None:
        """Choose the prompts of a stage, unless a checkpoint has brought them; the next batch is the stage's."""
        if stage != self._known:
            chosen = self._choose(stage)
            self._chosen = None if chosen is None else chosen.ids
            self._known = stage
            self._note(stage, chosen)
            self._forget(stage)
        self._clock = time.monotonic(), self.step
        self.stage = self.plan.stage = stage
        ids = self._chosen
        self.plan.rows = list(range(len(self.ids))) if ids is None else self.ids.places(ids)
        check_enough(self.plan.rows, self.prompts, stage)
        metrics = self.trainer._metrics["train"]
        metrics["cropi/stage"].append(float(stage))
        metrics["cropi/prompts"].append(float(len(self.plan.rows)))

    def _choose(self, stage: int) -> Chosen | None:
        options, live, others = self.options, self.live, self.seconds()
        if live is not None and stage % live.live.refresh and self._chosen is not None:
            return self._draw(live)
        if live is None and options.train is None and stage == 0:
            return None  # nothing has been recorded yet
        if options.valid is None and not any(self.ranks.gather(log_files(self.log.folder, "valid"))):
            # Of its own randomness, so that a run that is resumed right here draws the same rollouts.
            seed = pass_seed(self.seed, stage, -1 - self.ranks.rank)
            with own_randomness(self.trainer.accelerator.device, seed):
                self.trainer.evaluate()
        self._at_training_weights()
        self.merge()
        folder = self.folder / folder_of(stage)
        with once(self._said):
            return self._score(stage, folder, others) if live is None else self._refresh(live, stage, folder)

    def _at_training_weights(self) -> None:
        """Behind an evaluation a schedule-free optimizer has left averaged weights in the model, and puts back those
        that it takes gradients at before the next step: they are the policy that is sketched, in every stage."""
        optimizer = self.trainer.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()

    def _refresh(self, live: LiveRun, stage: int, folder: Path) -> Chosen:
        """The next prompts of a live run, by the validation gradient under the present policy."""
        begun = time.monotonic()
        self._check_recorded(stage, ("valid",))
        valid, options = self._valid(stage, folder)
        if valid is not None:
            live.refresh(
                self.model, self.trainer._tokenizer, valid, stage, self.seed, self.ranks,
                sets=options.valid_sets or (), later=self._chosen is not None,
            )  # fmt: skip
        chosen = self._draw(live)
        chosen.figures["seconds"] = time.monotonic() - begun
        return chosen

    def _score(self, stage: int, folder: Path, others: float) -> Chosen | None:
        """The prompts with the best scores under the present policy; ``others``: seconds of a stage's other work."""
        options = self.options
        try:
            self._check_recorded(stage)
            valid, used = self._valid(stage, folder)
            if valid is None:
                return self._kept(folder)
            return choose_prompts(
                self.model, self.trainer._tokenizer, used, stage=stage,
                # In stage 0 too small a fraction raises an error; later, an error would lose work.
                least=self.prompts if stage else 0, later=self._chosen is not None, others=others,
                folder=folder, train=self._sources("train", folder),
                valid=valid, known=self.ids.__contains__, ranks=self.ranks,
                seed=self.seed, progress=not self.trainer.args.disable_tqdm,
            )  # fmt: skip
        except NothingToFollow as error:
            if options.on_nothing == "error" and isinstance(error, TooFewLeft):
                raise
            logger.warning("stage %d: %s; %s", stage, error, KEPT_PROMPTS)
            return self._kept(folder)
        except NothingToSelect as error:
            scored = not isinstance(error, NothingScored)
            if options.on_nothing == "error" or (options.on_nothing == "auto" and scored):
                raise
            logger.warning("%s; %s", error, KEPT_PROMPTS)
            return self._kept(folder)

    def _kept(self, folder: Path) -> Chosen | None:
        """The prompts of the stage before, for one that was not scored; None: that was the whole dataset."""
        if self.ranks.first:
            forget_plan(folder)
        return None if self._chosen is None else Chosen(self._chosen, {"kept": True})

    def seconds(self) -> float:
        """Seconds of a stage's steps, by the steps since the last selection, or since this run went on; before there
        are any as the checkpoint says, else NaN."""
        begun, step = self._clock
        steps = self.step - step
        return (time.monotonic() - begun) / steps * self.options.stage_steps if steps else self._seconds

    def _forget(self, stage: int) -> None:
        """Sketches of earlier stages are needed by this one's successor, and where a checkpoint leads back to them."""
        options = self.options
        if self.ranks.first and not options.keep_sketches and options.asked:
            forget_sketches(self.folder, saved_stages(self.trainer.args.output_dir), stage)

    def _draw(self, live: LiveRun) -> Chosen:
        """The next prompts by what the steps so far have shown.

        Rank 0's draw: with another number of threads the last digits of what is known differ, and so may the order.
        """
        return Chosen(*self.ranks.share(live.choose(drawn(self.options, len(self.ids)), self.step)))

    def _check_recorded(self, stage: int, kinds: tuple[str, ...] = ("train", "valid")) -> None:
        """What a stage needs of this run's rollouts may be missing: no reward function may have scored one."""
        for kind in kinds:
            needed = self.options.files(kind) is None
            if not needed or is_there(self.log.folder / f"{kind}.jsonl"):
                continue
            lost = sum(self.ranks.gather(self.without_record[kind]))
            if kind == "train":
                raise NothingScored(
                    lost, Counter({"fewer than two responses that a reward function scored": lost}),
                    before=f"stage {stage}: ", otherwise="; check the reward functions",
                )  # fmt: skip
            raise CropiError(
                f"stage {stage}: nothing was recorded of eval_dataset: none of its {lost} prompts has two responses "
                "that a reward function scored with a finite number; check the reward functions"
            )

    def _valid(self, stage: int, folder: Path) -> tuple[Any, Curriculum]:
        """The validation trajectories, and the options without the sets that these do not cover.

        Evaluations may show that a set is solved or hopeless by now, and a training does not end there: after the first
        choice, sets of which no prompt has a gradient by its rewards are left out, with a warning. None: none is left
        to select for.
        """
        source, options = self._sources("valid", folder), self.options
        if options.valid is not None or self._chosen is None:
            return source, options
        job = setup_of(options, stage, self.seed).job
        groups, lost = self.ranks.agree(lambda: usable_sets(job.read(source, "valid"), options.minus))
        kept = KEPT if self.live is not None else KEPT_PROMPTS
        for words in lost.values():
            logger.warning("stage %d: %s; %s", stage, words, kept if groups is None else LEFT_OUT)
        if options.minus in lost:
            options = without_minus(options)
        return groups, replace(options, valid_sets=[x for x in options.valid_sets or () if x not in lost])

    def _sources(self, kind: str, folder: Path) -> Any:
        files = self.opened[kind]
        recorded, both = self.log.folder / f"{kind}.jsonl", folder / f"both-{kind}.jsonl"
        if files is None:
            return [recorded]
        if kind != "train" or not self.options.use_recorded or not is_there(recorded):
            return files
        ranks, stored = self.ranks, read(files, skip_bad=self.options.skip_bad)
        ranks.agree(lambda: replace_records(stored, recorded, both) if ranks.first else None)
        return [both]

    def _note(self, stage: int, chosen: Chosen | None) -> None:
        if not self.ranks.first:
            return
        line = {"stage": stage, "step": self.step, "dataset": len(self.ids)}
        line |= chosen.figures if chosen else {"selected": len(self.ids)}
        add_note(self.folder, line)
        logger.info("stage %d: %s", stage, line)

    # ----------------------------------------------------------------------------------------- resuming
    def settings(self) -> dict[str, Any]:
        """What the order of prompts depends on: a run that is resumed must have the same."""
        trainer, args = self.trainer, self.trainer.args
        return self.options.settings() | {
            "seed": self.seed, "generation_batch_size": int(args.generation_batch_size),
            "num_generations": int(trainer.num_generations), "num_iterations": int(trainer.num_iterations),
            "steps_per_generation": int(args.steps_per_generation),
            "gradient_accumulation_steps": int(args.gradient_accumulation_steps),
            "shuffle_dataset": bool(trainer.shuffle_dataset), "prompts": len(self.ids),
        }  # fmt: skip

    def save(self, checkpoint: Path, *, write: bool) -> None:
        """Add to a checkpoint what it is to keep of the stages. Every rank calls this; one of them writes."""
        sizes = {name: size for part in self.ranks.gather(self.log.sync()) for name, size in part.items()}
        if not write:
            return
        state = {
            "version": 1, "stage": self._known, "selected": self._chosen, "logs": sizes, "settings": self.settings(),
            "seconds": None if math.isnan(seconds := self.seconds()) else seconds,
        }  # fmt: skip
        if self.live is not None:
            self.live.save(checkpoint)
        write_state(checkpoint, state)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: its stage, its prompts, and the rollouts and notes of its steps.

        Raises:
            CropiError: it was saved without a curriculum or with other settings, or prompts or rollouts are gone.
        """
        state = state_to_go_on(checkpoint, self.settings())
        ids = state["selected"]
        lost = [name for name in ids or () if name not in self.ids]
        if lost:
            raise CropiError(
                f"{len(lost)} selected prompts are not in train_dataset any more, for example {lost[0]!r}"
            )
        if self.live is not None:
            self.live.load(checkpoint)
        self._known, self._chosen = int(state["stage"]), ids
        self._seconds = math.nan if state.get("seconds") is None else float(state["seconds"])
        self.log.close()
        self.newest = {kind: Newest() for kind in self.newest}
        self.ranks.agree(lambda: self._rewind(state) if self.ranks.first else None)
        self._resumed = True

    def _rewind(self, state: dict[str, Any]) -> None:
        """Remove rollouts and stages that came after the checkpoint."""
        rewind(self.log.folder, state["logs"])
        forget_notes(self.folder, state["stage"])
