"""Token log-probs of a linear head, and their gradient to the hidden states, without [tokens, vocabulary] logits."""

from .api import linear_logprob, logprob_and_grad

__all__ = ["linear_logprob", "logprob_and_grad"]
