"""Whether the policy that made the trajectories is the one that is asked, from its tokens' ratios, in words."""

from __future__ import annotations

RATIO = 0.8, 1.25  # of tokens that this policy sampled the ratio is 1
LEAST_ESS = 0.5
TAKEN = "ratio 1 is taken: no log-probs of the policy that made the responses are used"


def is_close(ratio: float, ess: float | None) -> bool:
    """Whether the weights of the tokens are near to 1 and of about equal size."""
    return RATIO[0] <= ratio <= RATIO[1] and (ess is None or ess >= LEAST_ESS)


def policy_text(ratio: float, ess: float | None, of: str = "a prompt's tokens (medians)") -> str:
    """The figures, and what they mean."""
    more = "" if ess is None else f", effective sample size {ess:.2f} of {of}"
    if is_close(ratio, ess):
        plain = "the trajectories are this policy's or close to it"
    elif RATIO[0] <= ratio <= RATIO[1]:
        plain = "the trajectories are another policy's: few of their tokens carry most of the weight"
    else:
        plain = "the trajectories are another policy's: their weights are far from 1"
    return f"ratio {ratio:.3f}{more}: {plain}"
