"""Packed weights (4 or 8 bits), and adapters on them: what is done about them while a model is loaded."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from cropi.errors import CropiError, optional
from cropi.files import failure_of, is_file, is_there, reason
from cropi.model.sources import ADAPTER, check_readable, named_base

QUANTIZE = ("4bit", "8bit")
UNPACKED = ("fp8", "mxfp4", "compressed-tensors")  # of which transformers can load the whole weights


def quantization(
    kind: str | None, dtype: torch.dtype, device: torch.device, options: dict[str, Any], *, has_adapter: bool
) -> dict[str, Any]:
    """Options of ``from_pretrained`` that pack the linear layers' weights; none for None.

    Args:
        kind: "4bit" (NF4) or "8bit" (int8, a scale for each output of a weight and each token of its input).
        dtype: what products are computed in, and the dtype of all other weights.
        device: where they go.
        options: the other options of ``from_pretrained``.
        has_adapter: packed weights have no gradient, so that an adapter has to be there.

    Raises:
        CropiError: an unknown kind, no adapter, or a ``.gguf`` file.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    if kind is None:
        return {}
    if kind not in QUANTIZE:
        raise CropiError(f"quantize must be one of {', '.join(QUANTIZE)}, got {kind!r}")
    if not has_adapter:
        raise CropiError(
            f"quantize {kind!r}: packed weights have no gradient, so nothing of the linear layers would be in a "
            "sketch; give the adapter that is trained as --adapter (adapter=...), or leave quantize out"
        )
    if "gguf_file" in options:
        raise CropiError(
            f"quantize {kind!r} is not for .gguf files, whose weights are unpacked to the dtype; leave it out"
        )
    optional("bitsandbytes")
    _quiet()
    # Beyond a threshold, LLM.int8 computes a column in float16 where any token of a batch is large there: a token's
    # log-prob would depend on later tokens and on other rows.
    config = optional("transformers").BitsAndBytesConfig(
        load_in_4bit=kind == "4bit", load_in_8bit=kind == "8bit", llm_int8_threshold=0.0,
        bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}


def _quiet() -> None:
    """bitsandbytes warns at every 8-bit product that inputs are rounded to float16 first."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def unpacking(config: Any, device: torch.device, kind: str | None) -> tuple[Any, dict[str, Any]]:
    """A configuration by which packed weights of a checkpoint are loaded whole, where transformers can do that: the
    kernels that compute with them have no backward. Of others, options that load them onto a device.

    Raises:
        CropiError: they are packed in another way than ``kind`` says (see `quantization`).
    """
    if not isinstance(getattr(config, "quantization_config", None), dict):
        return config, {}
    config = copy.deepcopy(config)
    packing = config.quantization_config
    if kind is not None and not packing.get(f"load_in_{kind}"):
        raise CropiError(
            f"quantize {kind!r}: the checkpoint's weights are packed already, in another way "
            f"({packing.get('quant_method', 'bitsandbytes')}); leave it out"
        )
    if packing.get("quant_method") in UNPACKED:
        packing["dequantize"] = True
        return config, {}
    if packing.get("load_in_8bit"):
        _quiet()
        packing["llm_int8_threshold"] = 0.0  # as in `quantization`
    return config, {"device_map": {"": device}}


def check_packing(model: Any, name: str) -> None:
    """Check that a model whose weights are packed has an adapter: one of PEFT, or another one over frozen embeddings.

    Raises:
        CropiError: it has none.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or hasattr(model, "peft_config"):
        return
    # Trainable as it is loaded: where it is frozen, the caller chose what is trained.
    embedding = model.get_input_embeddings().weight
    if type(embedding) is torch.nn.Parameter and not embedding.requires_grad:
        return
    method = getattr(quantizer.quantization_config, "quant_method", "")
    raise CropiError(
        f"model {name!r}: its weights are packed ({getattr(method, 'value', method)}), and packed weights have no "
        "gradient, so nothing of the linear layers would be in a sketch; give the adapter that is trained as --adapter "
        "(adapter=...), or a checkpoint with whole weights"
    )


def with_adapter(model: Any, name: str, adapter: str | os.PathLike[str]) -> Any:
    """A model with a PEFT adapter, whose parameters are the trainable ones.

    Raises:
        CropiError: no adapter there, one of another model, or one whose weights are incomplete.
        ModuleNotFoundError: PEFT is not installed.
    """
    peft, where = optional("peft"), os.fspath(adapter)
    folder = Path(where).expanduser()
    if is_there(folder) and not is_file(folder / ADAPTER):
        raise CropiError(
            f"adapter {where!r}: the folder holds no adapter_config.json, so it is not an adapter of PEFT; "
            "give the folder that save_pretrained wrote"
        )
    if is_there(folder):
        check_readable(f"adapter {where!r}", folder)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            made = peft.PeftModel.from_pretrained(
                model, str(folder) if is_there(folder) else where, is_trainable=True
            )
    except Exception as error:  # PEFT, safetensors, torch and the hub's client have errors of their own
        if failure := failure_of(error):
            raise CropiError(
                f"adapter {where!r} cannot be read: {reason(failure, 'let it be read')}"
            ) from error
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise CropiError(
            f"adapter {where!r} cannot be put on model {name!r}{_base(folder)} ({why[:400]}); give the adapter's own "
            "base model as --model"
        ) from error
    for one in told:
        text = " ".join(str(one.message).split())
        if "missing adapter keys" in text or "unexpected keys" in text.lower():
            raise CropiError(
                f"adapter {where!r}: its weights do not fit model {name!r}{_base(folder)} ({text[:300]}); give "
                "its own base model as --model, or save the adapter again"
            )
        # PEFT asks transformers for what that will remove: nothing that a user can change.
        if not issubclass(one.category, (FutureWarning, DeprecationWarning)):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return made


def _base(folder: Path) -> str:
    """Which model an adapter says that it is of."""
    base = named_base(folder)
    return f", but is of {base!r}" if base else ""
