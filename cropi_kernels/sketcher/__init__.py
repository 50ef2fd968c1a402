"""From a model's backward pass to sketches of its gradients, one per segment of the batch."""

from .coverage import Coverage, UncoveredParameterError
from .gradient_sketcher import BatchSketch, GradientSketcher
from .head import PolicyGradient
from .logprobs import token_logprobs
from .probe import PolicyProbeError, Probe
from .selftest import SelfTest, SelfTestError

__all__ = [
    "BatchSketch",
    "Coverage",
    "GradientSketcher",
    "PolicyGradient",
    "PolicyProbeError",
    "Probe",
    "SelfTest",
    "SelfTestError",
    "UncoveredParameterError",
    "token_logprobs",
]
