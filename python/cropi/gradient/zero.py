"""Which gradients count as zero: those that only rounding makes different from zero.

A prompt's gradient is a sum over its responses, ``g = sum_k g_k``. Where the terms cancel, arithmetic with unit
roundoff u gives rounding errors instead of 0. A cosine does not depend on the length of a vector, so that these errors
would be scored like any gradient. So ``|g|`` is compared with ``sqrt(sum_k |g_k|^2)``, the size of the terms.

**The bound.** On its way through a model a token's gradient is rounded about 16 times a layer forward and 16 times
backward (products, norms, activations, residual sums; the sums within a product are blocked and add less). Roundings
are independent, each at most u relative, so that after n of them the error is about ``sqrt(n) u`` of the size of what
passed (Higham and Mary, SIAM J. Sci. Comput. 41, 2019): each g_k is known to ``sqrt(32 layers) u |g_k|``, and their sum
to ``sqrt(32 layers) u sqrt(sum_k |g_k|^2)``, because those of one response are independent of another's. Below that it
is "zero gradient": the factor is 1.8e-6 for 30 layers in float32. (Gradients of K responses that have nothing in common
add up to the root of the sum of squares: a bound by ``sum_k |g_k|`` would take them for rounding from K = 70 on in
bfloat16.)

The sizes ``|g_k|`` need every response on its own, which costs one more pass over the prompt. It is made for prompts
alone whose gradient is small beside the weights that went into it: see :class:`Suspicion`.
"""

from __future__ import annotations

import math
from typing import Any

from cropi.errors import CropiError
from cropi.gradient.equal import all_cancel
from cropi.gradient.estimators import Estimator
from cropi.gradient.noise import FEWEST, TOO_FEW
from cropi.gradient.tokenize import TokenGroup
from cropi_kernels.sketcher.model.precision import product_eps

ZERO_GRADIENT = "zero gradient"  # the reason in a prompt's row
ROUNDINGS = 32  # of a token, per layer, forward and backward
SMALL = 2.0**-8


def rounding(model: Any) -> float:
    """``sqrt(32 layers) u``, with u of the model's least precise dtype, or of tf32 where its products are."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = int(getattr(text, "num_hidden_layers", None) or 32)
    eps = max((product_eps(p) for p in model.parameters() if p.is_floating_point()), default=2**-23)
    return math.sqrt(ROUNDINGS * layers) * eps / 2


def no_sketch_reason(
    group: TokenGroup, estimator: Estimator, source: str, *, zero_check: bool, noise: bool
) -> str | None:
    """Why a prompt gets no sketch, as far as it is known before any compute; or None.

    Args:
        group, estimator, source: as for :func:`cancels`.
        zero_check: whether gradients that cancel count as zero.
        noise: whether the noise of the gradient is sketched, which takes several responses.

    Raises:
        CropiError: the log-probs of the behaviour policy are needed, and the group has none.
    """
    if reason := group.group.no_gradient:
        return reason
    if source == "file" and estimator.ratio and group.logprobs is None:
        raise CropiError(
            f"prompt {group.id!r} has no log-probs of the policy that made its responses, and behaviour is 'file'; "
            "give them, or behaviour='current' (ratio 1)"
        )
    if noise and len(group.responses) < FEWEST:
        return TOO_FEW
    return ZERO_GRADIENT if zero_check and cancels(group, estimator, source) else None


def cancels(group: TokenGroup, estimator: Estimator, source: str) -> bool:
    """Whether a prompt's gradient is zero because equal responses' weights add up to nothing: known before any compute.

    Args:
        group: the tokenised prompt.
        estimator: the weight of every token.
        source: of the behaviour log-probs, "file", "current" or "model".
    """
    if len(group.equal) == len(group.responses):
        return False
    if estimator.ratio and source != "current":
        if estimator.clip_low is not None:  # of equal responses those with one sign may be clipped alone
            return False
        logprobs = group.logprobs if source == "file" else None
        if logprobs is not None and any(
            logprobs[k] != logprobs[equal[0]] for equal in group.equal for k in equal
        ):
            return False
    weights = estimator.advantages(group.group.rewards) / estimator.divisors(group.lengths)
    return all_cancel(list(weights), group.equal)


def is_zero(norm: float, sizes: float, bound: float) -> bool:
    """Whether a gradient of size ``norm`` is rounding; ``sizes``: the root of the sum of squares of its terms' sizes.

    >>> is_zero(3e-7, 1.0, 1.8e-6), is_zero(3e-5, 1.0, 1.8e-6)
    (True, False)
    """
    return norm <= bound * sizes


class Suspicion:
    """Which prompts are worth the pass that measures their responses one by one.

    Rounding is at most ``bound sqrt(sum_k |g_k|^2)``, and that root at most the sum of the tokens' weights times the
    largest gradient of a token's log-prob. For that stands the largest ``|g| / sum_t |w_t|`` of the prompts so far, but
    at least 1; the margin (1 / 256, where the bound is not larger) is for prompts that differ.
    """

    def __init__(self, bound: float) -> None:
        self.share, self.largest = max(SMALL, bound), 1.0

    def is_suspicious(self, norm: float, weight: float) -> bool:
        """``norm``: of the prompt's sketch; ``weight``: the sum of its tokens' absolute weights."""
        if weight <= 0 or not math.isfinite(norm) or not math.isfinite(weight):
            return False
        self.largest = max(self.largest, norm / weight)
        return norm <= self.share * self.largest * weight
