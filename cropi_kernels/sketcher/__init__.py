"""From a model's backward pass to sketches of its gradients, one per segment of the batch. README.md tells the way of
one linear layer, and what each file holds."""

from .attach.coverage import Coverage, UncoveredParameterError
from .checks.selftest import SelfTest, SelfTestError
from .checks.split_loss import CoupledLossError
from .gradient_sketcher import BatchSketch, GradientSketcher
from .live import LiveSketch, LiveSketcher
from .policy.head_pass import PolicyGradient
from .policy.logprobs import token_logprobs
from .policy.probe import PolicyProbeError, Probe

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
