"""NeMo-RL's batches from a selection that may be replaced while training runs: :func:`selected_batches`."""

from cropi.trainers.nemo_rl.batches import selected_batches as selected_batches
