"""Selection by the sketches of a GRPOTrainer's own training steps."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cropi import pipeline
from cropi.atomic import replacing
from cropi.data.prompt_ids import column_values
from cropi.errors import CropiError, as_keywords, shown
from cropi.files import failure_of, is_file, reason
from cropi.model.policy import Policy
from cropi.pipeline.lost import LEFT_OUT, no_gradient
from cropi.ranking.alike import prompt_features
from cropi.ranking.origin import Known
from cropi.ranking.selector import Selector
from cropi.sealed import check_sums, summed
from cropi.trainers.trl.fused import fused_heads
from cropi.trainers.trl.options import KEYWORDS, Curriculum
from cropi.trainers.trl.ranks import Ranks
from cropi.trainers.trl.recorder import MADE
from cropi.trainers.trl.records import id_of
from cropi.trainers.trl.scoring import evaluating, setup_of
from cropi_kernels import LiveSketcher

logger = logging.getLogger(__name__)

PLACES = "cropi_places"  # of a generation batch: the place of each row's prompt in the dataset
STATE = "cropi_selector.pt"
# What becomes of a validation set without a gradient, where a training has begun and no other set has one.
KEPT = "the validation means before are kept"


def features_of(dataset: Any, processing_class: Any) -> Any:
    """The features of a dataset's prompts, by the tokens of what they say: a chat template adds the same to all.

    None where all say the same, as beside images of which each has one question.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    # Of the other columns nothing is read: they may hold images.
    _, [prompts] = column_values(dataset, "prompt")
    if prompts is None:  # a transform of the dataset makes them of whole rows
        prompts = [dataset[i].get("prompt") for i in range(len(dataset))]
    texts = [_said(prompt) for prompt in prompts]
    features = prompt_features([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    if features.any():
        return features
    logger.info(
        "live: all prompts of the dataset say the same, so that each is known by its own visits alone"
    )
    return None


def _said(prompt: Any) -> str:
    """A prompt's own text: of messages the contents, of a content in parts those that are text."""
    if isinstance(prompt, Mapping):
        return _said(prompt.get("content", prompt.get("text")))
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return str(prompt or "")
    return "\n".join(_said(part) for part in prompt)


class LiveRun:
    """The sketcher and the selector of one trainer.

    Args:
        model: whole, and not in a wrapper.
        options: of the curriculum.
        ids: the prompts of the dataset.
        seed: of the draws.
        tokenizer: of the model.
        features: of the prompts, for the selector.
    """

    def __init__(
        self,
        model: Any,
        options: Curriculum,
        ids: Sequence[str],
        seed: int,
        tokenizer: Any = None,
        features: Any = None,
    ) -> None:
        assert options.live is not None
        self.options, self.live = options, options.live
        self.sketcher = LiveSketcher(
            model, options.spec, tuple(options.exclude), verify=options.verify, coupled=self.live.coupled
        )
        self.selector = Selector(
            ids, options.spec, dim=self.live.dim, bits=self.live.bits, half_life=self.live.half_life,
            explore=self.live.explore, seed=seed, features=features,
            within=self.live.within,
        )  # fmt: skip
        # No rows, but their model: a checkpoint of another one is refused.
        nothing = torch.zeros(0, options.spec.dim, dtype=torch.float32, device="cpu")
        self.selector.update([], Known(nothing, Policy(model, tokenizer).origin(self.sketcher)), 0)
        self.seconds = 0.0  # of sketching, since the last stage
        self._open: contextlib.ExitStack | None = None  # of the training step that runs
        self._begun = False  # whether it has come to its loss
        self._places: list[torch.Tensor] = []
        self._sketches: list[torch.Tensor] = []
        self.dropped = 0

    @contextlib.contextmanager
    def training_step(self) -> Iterator[None]:
        """Around forward and backward of one micro-batch.

        Raises:
            CropiError: its loss was not seen: the selector would learn nothing, and every choice would be by chance.
        """
        self._begun = False
        with contextlib.ExitStack() as self._open:
            try:
                yield
            finally:
                self._open = None
        if not self._begun:
            raise CropiError(
                "live: the loss of a training step was computed without TRL's _compute_loss, or on a batch that is not "
                "the one that TRL made, so that no prompt's gradient was seen: leave out what computes it "
                "(args.use_liger_kernel before TRL 1.14, a compute_loss of the trainer's own), or leave live out"
            )

    def place(self, rows: Sequence[Mapping[str, Any]], column: str, output: dict[str, Any]) -> None:
        """Note in a generation batch which prompt each row belongs to; ``column`` holds the prompts' ids."""
        places = self.selector.places([id_of(row, column) for row in rows])
        output[PLACES] = torch.from_numpy(places).to(output["completion_ids"].device)

    def begin(self, inputs: dict[str, Any], scale: Any) -> dict[str, Any]:
        """The rows are known: listen to their forward and backward, if that counts. What the loss is to be given."""
        if self._open is None or PLACES not in inputs:
            return inputs
        self._begun = True
        places = inputs[PLACES].cpu()
        known, segments = places.unique(return_inverse=True)
        rows, columns = inputs["prompt_ids"].shape
        shape = rows, columns + inputs["completion_ids"].shape[1]
        dropped, inputs = self._weighed(inputs, places)
        if not self.selector.listens():
            return inputs
        self._open.enter_context(self._listening(segments, shape, known, dropped, scale))
        self._open.enter_context(fused_heads(self.sketcher))
        return inputs

    @contextlib.contextmanager
    def _listening(
        self,
        segments: torch.Tensor,
        shape: tuple[int, int],
        known: torch.Tensor,
        dropped: torch.Tensor,
        scale: Any,
    ) -> Iterator[None]:
        with self.sketcher.batch(segments, shape=shape, scale=1.0 if scale is None else scale) as got:
            yield
        self.seconds += got.seconds["sketch"]
        kept = ~torch.isin(known, dropped)
        self._places.append(known[kept])
        self._sketches.append(got.sketches[kept.to(got.sketches.device)].cpu())

    def _weighed(self, inputs: dict[str, Any], places: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Prompts whose gradients are dropped, and inputs in which the advantages of opposed prompts are smaller."""
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        if self.live.opposed == 1.0:
            return none, inputs
        rows = torch.from_numpy(
            self.selector.opposed([self.selector.ids[place] for place in places.tolist()])
        )
        if not bool(rows.any()):
            return none, inputs
        self.dropped += int(rows.sum())
        factor = torch.where(rows, self.live.opposed, 1.0).to(inputs["advantages"])
        shaped = factor.view(-1, *(1 for _ in inputs["advantages"].shape[1:]))
        weighed = inputs | {name: inputs[name] * shaped for name in ("advantages", MADE) if name in inputs}
        return (places[rows].unique() if self.live.opposed == 0.0 else none), weighed

    def end_step(self, step: int) -> None:
        """The optimizer has stepped: every rank's sketches go to every rank's selector."""
        places = torch.cat(self._places) if self._places else torch.zeros(0, dtype=torch.int64, device="cpu")
        rows = (
            torch.cat(self._sketches)
            if self._sketches
            else torch.zeros(0, self.options.spec.dim, dtype=torch.float32, device="cpu")
        )
        self._places, self._sketches = [], []
        ids = [self.selector.ids[place] for place in places.tolist()]
        self.selector.update(ids, rows, step, gather=True)

    @as_keywords(KEYWORDS)
    def refresh(
        self,
        model: Any,
        tokenizer: Any,
        valid: Any,
        stage: int,
        seed: int,
        ranks: Ranks,
        *,
        sets: Sequence[str] = (),
        later: bool = False,
    ) -> None:
        """Sketch the validation prompts under the current policy; the ranks share them.

        Args:
            model, tokenizer: of the policy.
            valid: trajectories.
            stage, seed: of the job.
            ranks: the processes.
            sets: validation sets that have to be there.
            later: a set whose gradients are all zero or not finite is left out, with a warning, until the next time;
                where no set is left, the means before are kept.

        Raises:
            CropiError: no trajectory covers a set; unless ``later``, one whose gradients are all zero or not finite.
        """
        job = setup_of(self.options, stage, seed).job
        with evaluating(model):
            mine = pipeline.sketch_validation(
                Policy(model, tokenizer), valid, job, ranks, sets=sets, before=f"stage {stage}: ", option="valid_sets",
            )  # fmt: skip
        parts = ranks.gather(mine)
        names = [name for part in parts for name in part[0]]
        lost: dict[str, Counter[str]] = defaultdict(Counter)
        for name, why in [pair for part in parts for pair in part[2]]:
            lost[name][why] += 1
        for gone in sorted(lost.keys() - set(names)):
            problem = f"stage {stage}: {no_gradient(gone, lost[gone])}"
            if not later:
                raise CropiError(
                    f"{problem}, though rewards differ: see whether any of its tokens are trained on (loss_mask), "
                    "whether the estimator clips all of them, or leave the set out"
                )
            logger.warning("%s; %s", problem, LEFT_OUT if names else KEPT)
        if names:
            self.selector.refresh(torch.cat([part[1] for part in parts]), names)

    def choose(self, n: int, step: int) -> tuple[list[str], dict[str, Any]]:
        """The prompts of the next stage, and figures for the log."""
        ids = self.selector.next(n, step)
        shown = self.selector.scores(ids)
        known = shown[~np.isnan(shown)]
        figures = {
            "pool": len(self.selector), "selected": n, "seen": int(self.selector.seen.sum()),
            "new": int(np.isnan(shown).sum()), "score": float(known.mean()) if len(known) else None,
            "failed": len(self.selector.failed), "dropped": self.dropped, "seconds_sketching": self.seconds,
        }  # fmt: skip
        self.seconds, self.dropped = 0.0, 0
        return ids, figures

    def save(self, folder: Path) -> None:
        # By a file of Python's: torch.save's own says nothing of a full disk.
        with summed(folder / STATE), replacing(folder / STATE) as temporary, open(temporary, "wb") as file:
            torch.save(self.selector.state_dict(), file)

    def load(self, folder: Path) -> None:
        """Raises CropiError: the checkpoint has no state of a selector, or one that does not fit."""
        if not is_file(folder / STATE):
            raise CropiError(
                f"{folder} holds no {STATE}: it was saved without live; load its weights as the model of a new run, or "
                "go on without live"
            )
        check_sums(folder / STATE)
        try:
            state = torch.load(folder / STATE, weights_only=True)
        except Exception as error:  # of many kinds
            if failure := failure_of(error):
                raise CropiError(f"cannot read {folder / STATE}: {reason(failure)}") from error
            raise CropiError(
                f"{folder / STATE} is not the state of a Selector ({shown(str(error), 200)}); go on from another "
                "checkpoint"
            ) from error
        settings = state.get("settings") if isinstance(state, Mapping) else None
        mine = self.selector.state_dict()["settings"].get("features")
        if isinstance(settings, Mapping) and str(settings.get("features")) != str(mine):
            raise CropiError(
                f"{folder / STATE} knows of prompts with other tokens: the texts of train_dataset or the tokenizer "
                "have changed; go on with those that it was saved with, or load the checkpoint's weights as the model "
                "of a new run"
            )
        self.selector.load_state_dict(state)
        self._places, self._sketches = [], []  # of a step that was not ended
