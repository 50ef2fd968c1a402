"""A dataset for verl that holds the selected prompts only.

::

    data.custom_cls.path=pkg://cropi.trainers.verl.dataset data.custom_cls.name=SelectedDataset
    +data.cropi.selection=selected.jsonl          # what `cropi select` wrote
    +data.cropi.id_key=extra_info.index           # where the prompt id stands (this is the default)

verl builds its validation dataset with the same class; only ``data.train_files`` are cut down.
"""

from __future__ import annotations

from typing import Any

from cropi.data.prompt_ids import PromptIds
from cropi.errors import CropiError
from cropi.trainers.verl.selected import ID_KEY, Selected
from cropi.trainers.verl.versions import need

RLHFDataset: Any = need(
    "verl.utils.dataset.rl_dataset",
    "RLHFDataset",
    "SelectedDataset",
    "use a per-stage data.train_files instead",
)


class SelectedDataset(RLHFDataset):
    """verl's dataset, cut down to the selected prompts before anything else is done with them.

    Raises:
        CropiError: no ``data.cropi.selection``, a row without a stable id, a selection that is not of this dataset or
            smaller than a training batch.
    """

    def maybe_filter_out_long_prompts(self, dataframe: Any = None) -> Any:
        """Take the selected rows, best first, then leave out what is too long, as verl does."""
        if list(self.original_data_files) == _as_list(self.config.get("train_files")):
            options = self.config.get("cropi") or {}
            if not options.get("selection"):
                raise CropiError(
                    "SelectedDataset: +data.cropi.selection=FILE is missing, the selection to train on"
                )
            name = ", ".join(map(str, self.original_data_files))
            ids = PromptIds(dataframe, options.get("id_key") or ID_KEY, name, "+data.cropi.id_key")
            selected = Selected(options["selection"], ids, self.config.get("train_batch_size") or 1)
            dataframe = dataframe.select(selected.places)
        return super().maybe_filter_out_long_prompts(dataframe)


def _as_list(files: Any) -> list[str]:
    return [files] if isinstance(files, str) else list(files or [])
