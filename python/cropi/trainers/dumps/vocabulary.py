"""From the bytes of a token to its id: what turns log-probs of tokens that are written as text into exact tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any


class Vocabulary:
    """The tokens of a tokenizer by their bytes.

    Args:
        tokenizer: makes the tokenizer when it is first needed; None: without a tokenizer no token is known.
    """

    def __init__(self, tokenizer: Callable[[], Any] | None) -> None:
        self._tokenizer = tokenizer
        self._by_bytes: dict[bytes, int | None] | None = None

    def ids(self, words: Sequence[tuple[Any, Any]]) -> list[int] | None:
        """The ids of some tokens, each as its text and its bytes (or None).

        None where one of them is not the only token with its bytes.
        """
        if self._by_bytes is None:
            tokenizer = None if self._tokenizer is None else self._tokenizer()
            self._by_bytes = {} if tokenizer is None else bytes_of_tokens(tokenizer)
        ids = []
        for text, data in words:
            if isinstance(data, (list, tuple)):
                key = bytes(data)
            elif isinstance(text, str) and "\ufffd" not in text:
                key = text.encode("utf-8", "surrogatepass")
            else:
                return None
            token = self._by_bytes.get(key)
            if token is None:
                return None
            ids.append(token)
        return ids


def bytes_of_tokens(tokenizer: Any) -> dict[bytes, int | None]:
    """The id of every token by its bytes; None where two tokens have the same."""
    special = {str(token): index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    spell = _spelling(tokenizer)
    ids: dict[bytes, int | None] = {}
    for word, index in tokenizer.get_vocab().items():
        key = word.encode() if word in special else spell(word)
        if key is not None:
            ids[key] = None if key in ids else index
    return ids


def _spelling(tokenizer: Any) -> Callable[[str], bytes | None]:
    """How the words of the vocabulary spell bytes: GPT-2's letters for bytes, or SentencePiece's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""
    if "ByteLevel" in decoder:
        letters = _letters()

        def by_letters(word: str) -> bytes | None:
            return bytes(letters[c] for c in word) if all(c in letters for c in word) else None

        return by_letters
    if "ByteFallback" in decoder or "\\u2581" in decoder or "Metaspace" in decoder:

        def by_pieces(word: str) -> bytes | None:
            if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
                return bytes([int(word[3:5], 16)])
            return word.replace("\u2581", " ").encode()

        return by_pieces
    return lambda word: None  # unknown: better no id than a wrong one


def _letters() -> dict[str, int]:
    """GPT-2's letter of every byte: printable Latin-1 stands for itself, the rest for letters from 256 on, in order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(rest)}
