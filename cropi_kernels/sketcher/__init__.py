"""From a model's backward pass to sketches of its gradients, one per segment of the batch. README.md tells the way of
one linear layer, and what each file holds."""

from .coverage import Coverage, UncoveredParameterError
from .gradient_sketcher import BatchSketch, GradientSketcher
from .head import PolicyGradient
from .live import LiveSketch, LiveSketcher
from .logprobs import token_logprobs
from .probe import PolicyProbeError, Probe
from .selftest import SelfTest, SelfTestError
from .split_loss import CoupledLossError

__all__ = [
    "BatchSketch",
    "CoupledLossError",
    "Coverage",
    "GradientSketcher",
    "LiveSketch",
    "LiveSketcher",
    "PolicyGradient",
    "PolicyProbeError",
    "Probe",
    "SelfTest",
    "SelfTestError",
    "UncoveredParameterError",
    "token_logprobs",
]
