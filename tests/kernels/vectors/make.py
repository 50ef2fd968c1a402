"""Makes sketch_v1.json: the integers of docs/sketch.md, by an implementation of its own.

Plain Python integers, nothing imported from the package: what it writes is what the document says, and the package is
tested against it. Run once per version of the sketch: it does not overwrite vectors that exist.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = 1
M32 = 0xFFFFFFFF
COLUMN_SIGN, COLUMN_FOLD, ROW_SIGN, ROW_FOLD, PAIR, REDUCE_SIGN, REDUCE_FOLD = range(2, 9)
DENSE_ROWS, DENSE_COLUMNS, TENSOR_ROWS, TENSOR_COLUMNS = range(9, 13)
Key = tuple[int, int]


# ---------------------------------------------------------------------------------------------- 1. draws
def philox(key: Key, counter: tuple[int, int, int, int]) -> list[int]:
    (k0, k1), (x0, x1, x2, x3) = key, counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & M32, (p0 >> 32) ^ x3 ^ k1, p0 & M32
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return [x0, x1, x2, x3]


def key_of(seed: int, name: str) -> Key:
    digest = hashlib.sha256(f"cropi-sketch/{VERSION}\n{seed}\n{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def sign(key: Key, i: int, purpose: int) -> int:
    word = philox(key, (i // 128, 0, purpose, 0))[i % 128 // 32]
    return -1 if word >> (i % 32) & 1 else 1


def xor_of(word: int, size: int) -> int:
    return word & (size - 1) & ~7


def offset(key: Key, block: int, purpose: int, size: int) -> int:
    return xor_of(philox(key, (block, 0, purpose, 0))[0], size)


# --------------------------------------------------------------------------------------- 3. to 6. the slab
class Matrix:
    """Coordinates of a matrix parameter under a spec (``dim``, ``width``, ``vocab_width``, ``seed``)."""

    def __init__(self, spec: dict[str, Any], name: str, rows: int, cols: int, role: str) -> None:
        self.key = key_of(spec["seed"], name)
        parts = name.split(".")
        parent = ".".join(parts[:-2]) if len(parts) > 2 else name
        self.column_key = key_of(spec["seed"], f"{parent}/columns/{cols}")
        width, vocab = spec["width"], spec["vocab_width"]
        self.folded_cols = width if role == "linear" and width and cols > width else cols
        self.folded_rows = vocab if role == "tied" and vocab and rows > vocab else rows
        self.rows, self.cols = rows, cols
        self.slab_cols = 8
        while self.slab_cols < min(256, self.folded_cols):
            self.slab_cols *= 2
        self.slab_rows = 32768 // self.slab_cols
        self.n_slabs = max(1, spec["dim"] // 32768)

    def place(self, r: int, c: int) -> tuple[int, int]:
        """(bucket, sign) of coordinate (r, c), before any halving."""
        s = sign(self.key, r, ROW_SIGN) * sign(self.column_key, c, COLUMN_SIGN)
        if self.folded_cols != self.cols:
            w = self.folded_cols
            c = (c % w) ^ offset(self.column_key, c // w, COLUMN_FOLD, w)
        if self.folded_rows != self.rows:
            w = self.folded_rows
            r = (r % w) ^ offset(self.key, r // w, ROW_FOLD, w)
        i, j = r % self.slab_rows, c % self.slab_cols
        u = philox(self.key, (r // self.slab_rows, c // self.slab_cols, PAIR, 0))
        bucket = (u[3] % self.n_slabs) * 32768
        bucket += (i ^ xor_of(u[1], self.slab_rows)) * self.slab_cols + (j ^ xor_of(u[2], self.slab_cols))
        return bucket, -s if u[0] & 1 else s


def vector_place(seed: int, base: int, name: str, p: int) -> tuple[int, int]:
    key, m = key_of(seed, name), min(base, 32768)
    u = philox(key, (p // m, 0, PAIR, 0))
    return u[3] % (base // m) * m + ((p % m) ^ xor_of(u[1], m)), sign(key, p, ROW_SIGN)


def halve(x: dict[int, float], n: int, dim: int, seed: int) -> dict[int, float]:
    while n > dim:
        key, m = key_of(seed, f"reduce/{n}"), n // 2
        o, out = offset(key, 0, REDUCE_FOLD, m), {}
        for p, value in x.items():
            j = p if p < m else (p - m) ^ o
            out[j] = out.get(j, 0) + sign(key, p, REDUCE_SIGN) * value
        x, n = out, m
    return x


# ------------------------------------------------------------------------------------------- what is kept
def spec(**changes: Any) -> dict[str, Any]:
    return {
        "dim": 32768,
        "width": 64,
        "kind": "slab",
        "seed": 0,
        "vocab_width": 16384,
        "keep": 1.0,
        **changes,
    }


def nonzero(x: dict[int, float]) -> list[list[float]]:
    return [[i, v] for i, v in sorted(x.items()) if v]


def integers(rows: int, cols: int, start: int) -> list[list[int]]:
    """Small integers, exact in every dtype and in every order of summation."""
    return [[(start + 7 * r + 3 * c + r * c) % 7 - 3 for c in range(cols)] for r in range(rows)]


def plans() -> Iterator[dict[str, Any]]:
    layer = "model.layers.3.self_attn"
    cases = [
        (spec(), f"{layer}.q_proj.weight", 2048, 2048, "linear"),
        (spec(), f"{layer}.k_proj.weight", 513, 2048, "linear"),  # shares its fold with q_proj
        (spec(width=16, seed=7), "model.layers.0.mlp.down_proj.weight", 2049, 97, "linear"),
        (spec(width=512), "model.layers.0.mlp.down_proj.weight", 300, 1500, "linear"),  # two blocks across
        (spec(width=None), "model.layers.0.mlp.up_proj.weight", 1111, 1500, "linear"),
        (spec(width=None, dim=131072), "model.layers.0.mlp.up_proj.weight", 1111, 1500, "linear"),
        (spec(width=None, dim=1 << 20, seed=2**40), "lm_head.weight", 700, 700, "linear"),
        (spec(), "a.lora_A.default.weight", 8, 640, "linear"),
        (spec(), "a.lora_B.default.weight", 5000, 3, "linear"),
        (spec(), "w", 1, 1, "linear"),
        (spec(), "model.embed_tokens.weight", 20000, 200, "embedding"),
        (spec(), "model.embed_tokens.weight", 20000, 200, "tied"),
        (spec(vocab_width=None), "model.embed_tokens.weight", 20000, 200, "tied"),
        (spec(vocab_width=128), "model.embed_tokens.weight", 1000, 100, "tied"),
    ]
    for case, name, rows, cols, role in cases:
        m = Matrix(case, name, rows, cols, role)
        steps = [(i * 7919 % rows, i * i * 104729 % cols) for i in range(20)]
        chosen = sorted({(0, 0), (rows - 1, cols - 1), (0, cols - 1), (rows - 1, 0), *steps})
        yield {
            "spec": case,
            "name": name,
            "shape": [rows, cols],
            "role": role,
            "folded": [m.folded_rows, m.folded_cols],
            "slab": [m.slab_rows, m.slab_cols, m.n_slabs],
            "coordinates": [[r, c, *m.place(r, c)] for r, c in chosen],
        }


def vectors() -> Iterator[dict[str, Any]]:
    for case, name, size in [
        (spec(), "model.norm.weight", 576),
        (spec(dim=1 << 20, seed=3), "lm_head.bias", 70000),
        (spec(kind="countsketch", dim=64), "model.layers.1.bias", 200),
    ]:
        base = max(case["dim"], 32768) if case["kind"] == "slab" else case["dim"]
        chosen = sorted({0, 1, size - 1, *(i * 7919 % size for i in range(16))})
        places = [[p, *vector_place(case["seed"], base, name, p)] for p in chosen]
        yield {"spec": case, "name": name, "size": size, "coordinates": places}


def sketches() -> Iterator[dict[str, Any]]:
    """Whole sketches of d^T a for small integer d and a: exact, so equal to the bit on every backend."""
    for case, name, rows, cols, role in [
        (spec(), "model.layers.0.mlp.gate_proj.weight", 19, 21, "linear"),
        (spec(width=16), "model.layers.0.mlp.gate_proj.weight", 19, 43, "linear"),
        (spec(width=None, dim=65536), "model.layers.0.mlp.gate_proj.weight", 5, 300, "linear"),
        (spec(width=16, dim=1024), "lora_B.weight", 33, 4, "linear"),
        (spec(vocab_width=16, dim=4096), "model.embed_tokens.weight", 37, 9, "tied"),
    ]:
        m, tokens = Matrix(case, name, rows, cols, role), 3
        d, a = integers(tokens, rows, 1), integers(tokens, cols, 2)
        total: dict[int, float] = {}
        for r in range(rows):
            for c in range(cols):
                bucket, s = m.place(r, c)
                total[bucket] = total.get(bucket, 0) + s * sum(d[t][r] * a[t][c] for t in range(tokens))
        base = 32768 * m.n_slabs
        reduced = halve(total, base, case["dim"], case["seed"])
        yield {
            "spec": case,
            "name": name,
            "role": role,
            "d": d,
            "a": a,
            "base": nonzero(total),
            "reduced": nonzero(reduced) if case["dim"] < base else None,
        }


def flat() -> Iterator[dict[str, Any]]:
    for case, start in [
        (spec(kind="countsketch", dim=128, width=None), 0),
        (spec(kind="countsketch", dim=128, width=None), 2**40 + 3),
        (spec(kind="dropout", dim=64, width=None, keep=0.25, seed=5), 6),
    ]:
        name, x = "model.layers.0.weight", integers(1, 90, 3)[0]
        key, out = key_of(case["seed"], name), {}
        for i, value in enumerate(x):
            p = start + i
            counter = (p // 4 & M32, p // 4 >> 32)
            if case["keep"] < 1 and philox(key, (*counter, 1, 0))[p % 4] >= int(case["keep"] * 2**32):
                continue
            word = philox(key, (*counter, 0, 0))[p % 4]
            signed = -value if word >> 31 else value
            out[word % case["dim"]] = out.get(word % case["dim"], 0) + signed * case["keep"] ** -0.5
        yield {"spec": case, "name": name, "offset": start, "x": x, "sketch": nonzero(out)}


def other_kinds() -> dict[str, Any]:
    """kron: signs of both projections; tensor: word mod 256 and sign of both sides, for a [9, 5] matrix."""
    key = key_of(0, "model.layers.0.weight")

    def words(n: int, purpose: int) -> list[list[int]]:
        drawn = [philox(key, (i // 4, 0, purpose, 0))[i % 4] for i in range(n)]
        return [[word % 256, -1 if word >> 31 else 1] for word in drawn]

    return {
        "name": "model.layers.0.weight",
        "dim": 256,
        "shape": [9, 5],
        "kron_in": [[sign(key, c * 16 + y, DENSE_COLUMNS) for y in range(16)] for c in range(5)],
        "kron_out": [[sign(key, r * 16 + y, DENSE_ROWS) for y in range(16)] for r in range(9)],
        "tensor_rows": words(9, TENSOR_ROWS),
        "tensor_columns": words(5, TENSOR_COLUMNS),
    }


def document() -> dict[str, Any]:
    names = ["", "w", "model.layers.0.self_attn.q_proj.weight", "reduce/32768", "modèle.poids"]
    seeds = [0, 1, 2**63]
    counters = [((0, 0), (0, 0, 0, 0)), ((M32, M32), (M32, M32, M32, M32))]
    counters += [((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))]  # digits of pi
    counters += [((1, 2), (i, 0, purpose, 0)) for i in (0, 1, 255) for purpose in range(13)]
    first = [(0, 40), (120, 20), (32768, 8)]
    return {
        "version": VERSION,
        "philox": [{"key": k, "counter": c, "words": philox(k, c)} for k, c in counters],
        "keys": [{"seed": s, "name": n, "key": key_of(s, n)} for s in seeds for n in names],
        "signs": [
            {
                "name": "w",
                "purpose": p,
                "first": a,
                "signs": [sign(key_of(0, "w"), a + i, p) for i in range(n)],
            }
            for p in (COLUMN_SIGN, ROW_SIGN, REDUCE_SIGN)
            for a, n in first
        ],
        "offsets": [
            {
                "name": "w",
                "purpose": p,
                "size": n,
                "xor": [offset(key_of(0, "w"), b, p, n) for b in range(12)],
            }
            for p, n in ((COLUMN_FOLD, 64), (ROW_FOLD, 16384), (COLUMN_FOLD, 16), (REDUCE_FOLD, 8))
        ],
        "plans": list(plans()),
        "vectors": list(vectors()),
        "sketches": list(sketches()),
        "flat": list(flat()),
        "other_kinds": other_kinds(),
    }


def main(folder: Path) -> None:
    path = folder / f"sketch_v{VERSION}.json"
    if path.exists():
        sys.exit(
            f"{path.name} exists: vectors never change within a version. Raise VERSION here and in spec.py."
        )
    with path.open("x", encoding="utf-8") as file:
        fields = document()
        lines = [f"{json.dumps(k)}: {_lines(v)}" for k, v in fields.items()]
        file.write("{\n" + ",\n".join(lines) + "\n}\n")


def _lines(value: Any) -> str:
    """A line per entry of a list, so that a difference between versions can be read."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(json.dumps(v) for v in value) + "\n]"


if __name__ == "__main__":
    main(Path(__file__).parent)
