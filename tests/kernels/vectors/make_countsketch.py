"""Makes countsketch_v2.json: the integers of the kinds ``countsketch`` and ``dropout`` (docs/sketch.md, section 8).

Plain Python integers, nothing imported from the package, as make.py and make_project.py, whose projection this is. Run
once per version of the two kinds: it does not overwrite vectors that exist.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make
import make_project

VERSION = 2


def projection(spec: dict[str, Any], name: str) -> dict[str, Any]:
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return make_project.spec(spec["dim"], keep=spec["keep"], seed=spec["seed"], stream=stream)


def flat() -> Iterator[dict[str, Any]]:
    for case, name, start in [
        (make.spec(kind="countsketch", dim=128, width=None), "model.layers.0.weight", 0),
        (make.spec(kind="countsketch", dim=128, width=None), "modèle.poids", 2**40 + 3),
        (make.spec(kind="dropout", dim=64, width=None, keep=0.25, seed=5), "model.layers.0.weight", 6),
    ]:
        x, out, spec = make.integers(1, 90, 3)[0], dict[int, float](), projection(case, name)
        for i, value in enumerate(x):
            place = make_project.sparse(spec, start + i)
            bucket = place["buckets"][0]
            out[bucket] = out.get(bucket, 0) + place["signs"][0] * value * case["keep"] ** -0.5
        yield {"spec": case, "name": name, "offset": start, "x": x, "sketch": make.nonzero(out)}


def vectors() -> Iterator[dict[str, Any]]:
    make.VERSION = VERSION  # of the keys
    for case, name, size in [
        (make.spec(kind="countsketch", dim=64), "model.layers.1.bias", 200),
        (make.spec(kind="dropout", dim=65536, keep=0.5, seed=3), "lm_head.bias", 70000),
    ]:
        chosen = sorted({0, 1, size - 1, *(i * 7919 % size for i in range(16))})
        places = [[p, *make.vector_place(case["seed"], case["dim"], name, p)] for p in chosen]
        yield {"spec": case, "name": name, "size": size, "coordinates": places}


def main() -> None:
    path = Path(__file__).with_name(f"countsketch_v{VERSION}.json")
    if path.exists() and "--check" not in sys.argv:
        raise SystemExit(f"{path} exists: vectors of a version never change")
    lists = {"flat": list(flat()), "vectors": list(vectors())}
    lines = [f"{json.dumps(name)}: {make._lines(items)}" for name, items in lists.items()]
    text = "{\n" + ",\n".join([f'"version": {VERSION}', *lines]) + "\n}\n"
    if "--check" in sys.argv:
        raise SystemExit(0 if path.read_text() == text else f"{path} differs")
    path.write_text(text)


if __name__ == "__main__":
    main()
