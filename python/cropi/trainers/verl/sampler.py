"""The curriculum sampler of verl 0.7 and earlier (later releases have no place for one).

::

    data.sampler.class_path=pkg://cropi.trainers.verl.sampler data.sampler.class_name=CropiSampler
    data.dataloader_num_workers=0
    +data.sampler.selection=selected.jsonl        # what `cropi select` wrote; may be replaced while training runs
    +data.sampler.record=rollouts                 # optional: write every step's rollouts there, with token ids
    +data.sampler.id_key=extra_info.index         # where the prompt id stands (this is the default)
"""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

from cropi.data.prompt_ids import PromptIds
from cropi.errors import CropiError
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.verl_batch import rollouts_of_proto
from cropi.trainers.recording import record_step
from cropi.trainers.verl.order import SelectionOrder
from cropi.trainers.verl.selected import ID_KEY, Selected
from cropi.trainers.verl.versions import need

AbstractCurriculumSampler: Any = need(
    "verl.experimental.dataset.sampler",
    "AbstractCurriculumSampler",
    "CropiSampler",
    "since 0.8 verl has no curriculum sampler: use cropi.trainers.verl.dataset or cropi.trainers.verl.trainer",
)


class CropiSampler(SelectionOrder, AbstractCurriculumSampler):
    """Row numbers of the selected prompts: every epoch all of them, in an order drawn with ``data.seed`` (or best first
    with ``data.shuffle=False``).

    ``update``, which verl calls after every step, looks whether the selection file has been replaced. If so, the
    epoch that is under way goes on with the new prompts. The state is stored with verl's checkpoints.

    Raises:
        CropiError: no selection, a row without a stable id, a selection that is not of this dataset or smaller than a
            training batch.
    """

    def __init__(self, data_source: Sized, data_config: Any) -> None:
        options = data_config.sampler
        if not options.get("selection"):
            raise CropiError(
                "CropiSampler: +data.sampler.selection=FILE is missing, the selection to train on"
            )
        frame = getattr(data_source, "dataframe", data_source)
        self.id_key = options.get("id_key") or ID_KEY
        ids = PromptIds(frame, self.id_key, "data.train_files", "+data.sampler.id_key")
        selected = Selected(options["selection"], ids, data_config.get("train_batch_size") or 1)
        shuffle, seed = bool(data_config.get("shuffle", True)), int(data_config.get("seed") or 0)
        SelectionOrder.__init__(self, selected, shuffle=shuffle, seed=seed)
        self.record = Path(options["record"]) if options.get("record") else None
        self.steps = 0

    def update(self, batch: Any) -> None:
        """After a step: record its rollouts, and take up a new selection if there is one."""
        self.steps = int(batch.meta_info.get("global_steps", self.steps + 1))
        if self.record is not None:
            record_step(
                self.record / f"{self.steps}.jsonl",
                lambda left: rollouts_of_proto(batch, self.steps, Reading(id_key=self.id_key), left),
            )
        self.refresh()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {**SelectionOrder.state_dict(self), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        SelectionOrder.load_state_dict(self, state)
        # verl saves its checkpoint inside a step, before the sampler is told of it.
        self.steps = state["steps"] + 1
