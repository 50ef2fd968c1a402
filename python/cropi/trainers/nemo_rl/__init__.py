"""NeMo-RL's batches from a selection that may be replaced while training runs: :func:`selected_batches`."""

from cropi._moved import moved_names
from cropi.trainers.nemo_rl.batches import selected_batches as selected_batches

__getattr__ = moved_names(__name__, "cropi.trainers.dumps.nemo_rl")
