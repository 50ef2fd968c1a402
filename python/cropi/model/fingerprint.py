"""Fingerprints of models and tokenizers: equal exactly when their content is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from cropi.errors import optional
from cropi.files import is_folder, open_to_read, reading, size_of
from cropi.model.settings import adapters_of, model_settings, saved_buffers

XXH3 = "xxh3:"
# What is read of a checkpoint's file to tell it from another one.
PIECE, PIECES = 4096, 64


def model_fingerprint(model: Any) -> dict[str, Any]:
    """What tells a model from others: ``dtype``, ``size`` (its number of parameters), ``config`` and ``weights``.

    ``config`` are the settings that change a gradient (:func:`cropi.model.settings.model_settings`); a module without
    any has none. ``weights`` is a hash of the names, shapes and bytes of all parameters, and of which adapters are in
    use, of those that the model holds; ``buffers``, where a checkpoint has some, one of theirs. Every byte counts: one
    step of training with a small learning rate may change few weights. A hash is ``"xxh3:"`` and 32 hex digits of XXH3
    (128 bits), which reads weights ten times as fast as SHA-256.

    Args:
        model: a module.

    Raises:
        ModuleNotFoundError: the package xxhash is not installed.
    """
    parameters = sorted(model.named_parameters())
    made: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "size": sum(parameter.numel() for _, parameter in parameters),
    }
    if config := model_settings(model):
        made["config"] = config
    made["weights"] = XXH3 + _digest(parameters, adapters_in_use(model))
    if buffers := list(saved_buffers(model)):
        made["buffers"] = XXH3 + _digest(buffers)
    return made


def _digest(tensors: Iterable[tuple[str, Any]], used: Iterable[tuple[str, str]] = ()) -> str:
    """The hex digits of a hash of tensors, and of which adapters are in use."""
    digest = optional("xxhash").xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        for part in _plain_parts(tensor.detach()):
            flat = part.cpu().contiguous().view(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    for name, own in used:
        digest.update(f"{name} {own}\n".encode())
    return str(digest.hexdigest())


def adapters_in_use(model: Any) -> tuple[tuple[str, str], ...]:
    """Of every layer with adapters of PEFT, its name and the adapters that it adds, with their scales."""
    made = []
    for name, module in model.named_modules():
        if (active := adapters_of(module)) is not None:
            scales = getattr(module, "scaling", None)
            made.append(
                (name, str({one: scales.get(one) if isinstance(scales, dict) else None for one in active}))
            )
    return tuple(made)


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """A hash of a checkpoint's files, or of its only one: their names, sizes, and :data:`PIECE` bytes at
    :data:`PIECES` places of each.

    A step of training changes nearly every weight, so that this tells two versions apart without reading all of them.
    """
    with reading(checkpoint, missing=True):
        return _checkpoint_digest(checkpoint)


def _checkpoint_digest(checkpoint: Path) -> str:
    digest = hashlib.sha256()
    files = [checkpoint]
    if is_folder(checkpoint):
        files = sorted(
            file for file in checkpoint.iterdir() if file.suffix in (".json", ".safetensors", ".bin")
        )
    for path in files:
        size = size_of(path)
        digest.update(f"{path.name} {size}\n".encode())
        with open_to_read(path) as file:
            for i in range(PIECES):
                file.seek(i * max(size - PIECE, 0) // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:32]


def _plain_parts(tensor: Any) -> Iterator[Any]:
    """What a tensor is made of: itself, or the tensors inside of a quantised one (torchao), which has no bytes.

    One that is spread over ranks is gathered: all of them have to come here.
    """
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):
            yield from _plain_parts(part)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (32 hex digits) over the vocabulary, the special tokens and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # These two change with the last call of the tokenizer, not with what a token is.
        content = json.dumps(
            {key: value for key, value in state.items() if key not in ("padding", "truncation")}
        )
    else:
        content = json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps([str(tokenizer.eos_token), str(tokenizer.bos_token), tokenizer.chat_template])
    return hashlib.sha256(f"{content}\n{special}".encode()).hexdigest()[:32]


def tokens_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (16 hex digits) over the tokens and their ids alone: a template may change while a model is trained."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
