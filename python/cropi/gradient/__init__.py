"""From a prompt group to a weighted micro-batch: tokens, estimators, layout, batches, behaviour log-probs."""
