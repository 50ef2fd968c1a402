"""The tokens of a batch: the checks of its tensors, and which segment each token belongs to."""
