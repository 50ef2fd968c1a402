"""A causal LM whose decoder and head run apart: log-probs and gradients without the logits of all tokens."""
