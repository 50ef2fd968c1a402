"""Selection in verl. ``docs/trainers.md`` shows which of these to use; none needs a change in verl.

============================  ==============  ==================================================================
module                        verl            how it is switched on
============================  ==============  ==================================================================
``dataset.SelectedDataset``   0.7 and later   ``data.custom_cls.path=pkg://cropi.trainers.verl.dataset``
``sampler.CropiSampler``      0.7             ``data.sampler.class_path=pkg://cropi.trainers.verl.sampler``
``trainer.CropiTrainerSync``  0.8 and later   ``VERL_USE_EXTERNAL_MODULES=cropi.trainers.verl.trainer`` and
                                              ``trainer.v1.trainer_mode=cropi_sync``
``dumps``, ``batch``          0.7 and later   readers of what verl writes: ``cropi convert``
============================  ==============  ==================================================================

The first three modules import verl and are imported by it; the last two need no verl, except for pickles that
hold its classes.
"""

from __future__ import annotations
