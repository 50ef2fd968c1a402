"""The estimator of the loss that a GRPOTrainer trains with, from its configuration."""

from __future__ import annotations

from typing import Any

from cropi.errors import CropiError
from cropi.gradient.estimators import Estimator

# How TRL averages: over a response and then over responses, or by one number for all prompts of a step (its tokens, or
# responses times a length), which changes no cosine.
AVERAGED = {
    "grpo": "response", "bnpo": "constant", "dapo": "constant", "dr_grpo": "constant", "cispo": "constant",
    "luspo": "constant",
}  # fmt: skip
REMEDY = "name one in Curriculum(estimator=...), for example 'cropi'"
LOSSES = ("compute_loss", "_compute_loss")


def check_own_loss(trainer: Any) -> None:
    """Check that a trainer computes the loss that its configuration names.

    Raises:
        CropiError: its class, such as ``trl.experimental.gmpo.GMPOTrainer``, has a loss of its own.
    """
    import trl

    for name in LOSSES:
        classes = [cls for cls in type(trainer).__mro__ if name in vars(cls)]
        own = next(cls for cls in classes if not cls.__module__.startswith("cropi."))
        if not issubclass(trl.GRPOTrainer, own):
            raise CropiError(
                f"{own.__name__} has a {name} of its own, so that args.loss_type does not say which loss is trained; "
                f"{REMEDY}, or estimator_of_config(args)[0] of {__name__} if its gradient is that of GRPOTrainer"
            )


def estimator_of_config(args: Any) -> tuple[Estimator, list[str]]:
    """The estimator whose gradient is that of TRL's loss for one prompt, up to a factor that all prompts share.

    Read are ``loss_type``, ``importance_sampling_level``, ``epsilon``, ``epsilon_high``, ``delta`` and
    ``scale_rewards``.

    Args:
        args: a ``GRPOConfig``.

    Returns:
        The estimator, and what the configuration asks for besides that it leaves out, in words.

    Raises:
        CropiError: a loss that is not a weighted sum of token log-prob gradients that is known here.
    """
    kind, level = str(args.loss_type), str(args.importance_sampling_level)
    if kind not in AVERAGED:
        raise CropiError(
            f"args.loss_type is {kind!r}, for which there is no estimator (there are those of "
            f"{', '.join(AVERAGED)}); {REMEDY}"
        )
    if level not in ("token", "sequence"):
        raise CropiError(
            f"args.importance_sampling_level is {level!r}: it should be token or sequence; {REMEDY}"
        )
    low = float(args.epsilon)
    high = low if args.epsilon_high is None else float(args.epsilon_high)
    delta = getattr(args, "delta", None)
    scale = str(getattr(args, "scale_rewards", "group"))
    bounds: dict[str, Any] = {
        "clip_low": low,
        "clip_high": high,
        "delta": None if delta is None else float(delta),
    }
    if kind == "cispo":
        bounds = {"cap": high}
    estimator = Estimator(
        f"trl {kind}", std=scale in ("group", "True"), length=AVERAGED[kind], level=level, **bounds,
    )  # fmt: skip
    return estimator, _left_out(args, scale)


def _left_out(args: Any, scale: str) -> list[str]:
    """What is part of the loss and not of the estimator."""

    def value(name: str, default: Any = None) -> Any:
        return getattr(args, name, default)

    entropy = value("entropy_coef", 0.0) or value("use_adaptive_entropy", False)
    corrected = value("use_vllm", False) and value("vllm_importance_sampling_correction", False)
    several = value("multi_objective_aggregation", "sum_then_normalize")
    cases = (
        (bool(value("beta", 0.0)), f"beta={value('beta')}: the pull to the reference model"),
        (scale == "batch", "scale_rewards='batch': a factor that all prompts of a batch share"),
        (
            several != "sum_then_normalize",
            f"multi_objective_aggregation={several!r}: rewards are summed first",
        ),
        (value("top_entropy_quantile", 1.0) < 1, "top_entropy_quantile: tokens of low entropy count too"),
        (value("off_policy_mask_threshold") is not None, "off_policy_mask_threshold: all responses count"),
        (
            value("mask_truncated_completions", False),
            "mask_truncated_completions: truncated responses count too",
        ),
        (bool(entropy), "the entropy bonus"),
        (bool(corrected), "vllm_importance_sampling_correction"),
    )
    return [text for applies, text in cases if applies]
