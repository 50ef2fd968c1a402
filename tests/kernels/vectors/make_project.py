"""Makes project_v1.json: the integers of docs/project.md, by an implementation of its own.

Plain Python integers, nothing imported from the package: what it writes is what the document says, and the package is
tested against it. Run once per version of the projection: it does not overwrite vectors that exist.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from make import M32, key_of, philox

VERSION = 1
SIGN, TILE, KEEP, RADEMACHER, GAUSSIAN = range(13, 18)


def draw(spec: dict[str, Any], counter: int, purpose: int, third: int) -> list[int]:
    key = key_of(spec["seed"], f"project/{spec['stream']}")
    return philox(key, (counter & M32, counter >> 32, purpose, third))


def bit(spec: dict[str, Any], p: int, purpose: int, third: int) -> int:
    return draw(spec, p // 128, purpose, third)[p % 128 // 32] >> (p % 32) & 1


def kept(spec: dict[str, Any], p: int) -> int:
    """Is a 16-bit fraction, drawn from its last digit to its first, below keep?"""
    digits = round(spec["keep"] * 65536)
    below = int(digits == 65536)
    for level in range(16 * (digits < 65536)):
        fair = bit(spec, p, KEEP, level)
        below = fair | below if digits >> level & 1 else fair & below
    return below


def sparse(spec: dict[str, Any], p: int) -> dict[str, Any]:
    width = spec["dim"] // spec["nnz"]
    group = math.gcd(width, 16)
    buckets, signs = [], []
    for j in range(spec["nnz"]):
        w = draw(spec, p // width, TILE, j)
        shift, low = (w[0] * (width // group) >> 32) * group, w[1] % group
        buckets.append(j * width + ((p % width + shift) % width ^ low))
        signs.append((1 - 2 * bit(spec, p, SIGN, j)) * kept(spec, p))
    return {"spec": spec, "p": p, "buckets": buckets, "signs": signs}


def dense(spec: dict[str, Any], p: int) -> dict[str, Any]:
    columns = [0, 1, 31, 32, 63, 64, 127, 128, 255, 299]
    entries: list[float] = []
    for c in columns:
        if spec["kind"] == "rademacher":
            entries.append(1 - 2 * (draw(spec, p, RADEMACHER, c // 128)[c % 128 // 32] >> (c % 32) & 1))
            continue
        w, m = draw(spec, p, GAUSSIAN, c // 128 * 32 + c % 32), c % 128 // 32
        radius = math.sqrt(-2 * math.log(((w[m // 2 * 2] >> 8) + 1) / 2**24))
        angle = 2 * math.pi * w[m // 2 * 2 + 1] / 2**32
        entries.append(radius * (math.sin(angle) if m % 2 else math.cos(angle)))
    return {"spec": spec, "p": p, "columns": columns, "entries": entries}


def spec(dim: int, kind: str = "countsketch", **fields: Any) -> dict[str, Any]:
    base = {"dim": dim, "kind": kind, "nnz": 1, "keep": 1.0, "seed": 0, "stream": 0, "version": VERSION}
    return base | fields


def main() -> None:
    path = Path(__file__).with_name(f"project_v{VERSION}.json")
    if path.exists() and "--check" not in sys.argv:
        raise SystemExit(f"{path} exists: vectors of a version never change")
    specs = [spec(4096), spec(4096, seed=1), spec(100, stream=3), spec(7)]
    specs += [spec(1024, "sjlt", nnz=4), spec(64, keep=0.3)]
    places = [0, 4095, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 12345, 2**62 - 2]
    lists = {
        "sparse": [sparse(s, p) for s in specs for p in places],
        "dense": [
            dense(spec(300, kind, seed=2), p)
            for kind in ("rademacher", "gaussian")
            for p in (0, 1, 2**32 + 5)
        ],
    }
    body = ",\n".join(
        f' "{name}": [\n' + ",\n".join("  " + json.dumps(item) for item in items) + "\n ]"
        for name, items in lists.items()
    )
    text = f'{{\n "version": {VERSION},\n{body}\n}}\n'
    if "--check" in sys.argv:
        raise SystemExit(0 if path.read_text() == text else f"{path} differs")
    path.write_text(text)


if __name__ == "__main__":
    main()
