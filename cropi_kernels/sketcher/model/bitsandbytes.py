"""Weights of bitsandbytes: 4-bit ones keep a form that gradients pass through; 8-bit ones that mix tokens are refused.

On a CPU with AVX-512 BF16, a `Linear4bit` in eval mode packs its weight anew at the first forward whose input has no
gradient, for a kernel that has no backward: from then on nothing behind the layer has a gradient, and nothing says so.
That is switched off for every layer of a model, and undone where it has happened (the scales of its blocks stay rounded
to bfloat16 then, as the forward before used them).
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

SWITCH = "support_avx512bf16_for_cpu"
# LLM.int8 computes the columns in which any token of a batch is large in float16, and all others in int8.
MIXES = (
    "{name!r} is an 8-bit layer with LLM.int8's threshold {threshold:g}, which lets a token's result depend on the "
    "largest inputs of the whole batch: load the model with BitsAndBytesConfig(load_in_8bit=True, "
    "llm_int8_threshold=0.0), or in another format"
)


def check_8bit_layers(model: nn.Module) -> None:
    """Check that no 8-bit layer takes columns apart by what other tokens hold.

    A few tokens do not show it where none of them is beyond the threshold.

    Raises:
        ValueError: names the first such layer.
    """
    for name, module in model.named_modules():
        threshold = getattr(getattr(module, "state", None), "threshold", 0)
        if type(module).__name__ == "Linear8bitLt" and threshold > 0:
            raise ValueError(MIXES.format(name=name, threshold=threshold))


def keep_gradients(model: nn.Module) -> None:
    """Switch the packing off, and undo it.

    Raises:
        ValueError: a weight is packed and cannot be unpacked.
    """
    for name, module in model.named_modules():
        if SWITCH in vars(module):
            setattr(module, SWITCH, False)
        weight: Any = getattr(module, "weight", None)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            try:
                # The package's own way back, which it takes before it saves or moves a weight.
                functional: Any = importlib.import_module("bitsandbytes.functional")
                undo = functional._convert_weight_packed_for_cpu_inverse
                weight.data, weight.quant_state = undo(weight.data, weight.quant_state)
            except Exception as error:
                raise ValueError(
                    f"{name}: its 4-bit weight was packed for inference by a forward without gradients, and has no "
                    f"backward any more ({error}); load the model again"
                ) from error
