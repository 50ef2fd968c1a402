"""slime's data source, cut down to a selection that may be replaced while training runs.

::

    --data-source-path cropi.trainers.slime.source.CropiDataSource
    --metadata-key metadata                       # with the prompt's id, as `cropi select --format slime` writes it
    CROPI_SELECTION=selected.jsonl                # see cropi.trainers.slime.options
"""

from __future__ import annotations

import hashlib
from typing import Any

from cropi.data.prompt_ids import PromptIds
from cropi.errors import CropiError
from cropi.trainers.hooks import base_class
from cropi.trainers.selected import Selected
from cropi.trainers.slime.options import option

METHODS = {
    "get_samples": ("num_samples",),
    "add_samples": ("samples",),
    "save": ("rollout_id",),
    "load": ("rollout_id",),
}
WORDS = ("slime leaves out prompts longer than --rollout-max-prompt-len", "--rollout-batch-size")
WHAT = "CropiDataSource"
KEY = "cropi_selection"

Base: Any = base_class(
    WHAT, "slime.rollout.data_source", "RolloutDataSourceWithBuffer", METHODS,
    "it was written for slime 0.2 and 0.3 (the package of that name on PyPI is another one); train on the files of "
    "`cropi select --format slime` instead",
)  # fmt: skip


class CropiDataSource(Base):
    """Groups of samples of the selected prompts, in slime's own order (``--rollout-shuffle``, or best first).

    Before every batch it looks whether the selection's file has been replaced (one ``stat``). If so, the epoch that is
    under way starts again with the new prompts; groups that wait in slime's buffer are finished first. Which selection
    was in use is stored with slime's checkpoints.

    Raises:
        CropiError: no selection, no global dataset, a sample without an id, a selection that is not of this dataset or
            smaller than a batch.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        if getattr(self, "dataset", None) is None:
            raise CropiError(f"{WHAT} needs --rollout-global-dataset and --prompt-data, of which it selects")
        for name in ("origin_samples", "samples", "shuffle"):
            if not hasattr(self.dataset, name):
                raise CropiError(
                    f"{WHAT}: slime's dataset has no {name!r} any more; use `cropi select --format slime`"
                )
        self._all = list(self.dataset.origin_samples)
        key = option(args, "id_key", WHAT)
        rows = [sample.metadata or {} for sample in self._all]
        ids = PromptIds(rows, key, "the metadata of --prompt-data", "cropi_id_key")
        least = max(
            int(getattr(args, name, None) or 1) for name in ("rollout_batch_size", "over_sampling_batch_size")
        )
        self._selected = Selected(option(args, "selection", WHAT), ids, least, trainer=WORDS)
        self._apply()

    def get_samples(self, num_samples: int) -> Any:
        """So many groups, of the selection that is in place now."""
        if self._selected.refresh():
            self._apply()
        return super().get_samples(num_samples)

    def load(self, rollout_id: Any = None) -> None:
        """Go on where a checkpoint was made; where the selection has changed since, at the beginning of the new one."""
        now = self.metadata[KEY]
        super().load(rollout_id)
        if self.metadata.get(KEY) != now:
            self._apply()

    def _apply(self) -> None:
        chosen = [self._all[place] for place in self._selected.places]
        # slime shuffles `origin_samples` into `samples`, once for every number of an epoch.
        self.dataset.origin_samples, self.dataset.samples = chosen, list(chosen)
        self.dataset.epoch_id = -1
        self.sample_offset = 0
        if self.args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)
        text = "\n".join(self._selected.ids)
        self.metadata[KEY] = hashlib.sha256(text.encode()).hexdigest()[:16]
