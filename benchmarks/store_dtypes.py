"""What storing sketches in fewer bits costs: scores and choice by rows of every dtype beside those of float32.

    python -m benchmarks.store_dtypes --train STORE --valid STORE

Both stores must be float32. Training and validation rows are stored in the dtype; the truth is the float32 scores.
Printed for each dtype: bytes a row; the rms difference of a cosine; the share of the best 10 % that stays; Spearman's
correlation of the scores.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from cropi.errors import CropiError
from cropi.ranking.influence import score_rows
from cropi.store.codec import DTYPES, decode, encode
from cropi.store.store import SketchStore


def table(store: SketchStore) -> tuple[list[str], torch.Tensor]:
    """The sets of a store's sketches, and these."""
    if store.dtype != "float32":
        raise CropiError(f"the store {store.path} is {store.dtype}: give one of float32")
    parts = list(store.shards())
    return [row.set_name for rows, _ in parts for row in rows], torch.cat([rows for _, rows in parts])


def scores(train: torch.Tensor, valid: torch.Tensor, sets: list[str]) -> np.ndarray:
    """Cosines with the mean of every set, float64 [n, sets]."""
    names = np.array(sets)
    means = {name: valid[torch.from_numpy(names == name)].double().mean(0) for name in sorted(set(sets))}
    return score_rows(train, means)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    args = parser.parse_args()
    (_, train), (sets, valid) = (table(SketchStore.open(path)) for path in (args.train, args.valid))
    want = scores(train, valid, sets)
    best = max(1, len(train) // 10)
    shape = f"sketches of {train.shape[1]} numbers, {want.shape[1]} sets"
    print(f"{len(train)} training and {len(valid)} validation {shape}\n")
    print("| dtype | bytes a row | rms error of a score | of the best 10 % stay | rank correlation |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for dtype in DTYPES:
        stored = encode(train, dtype)
        got = scores(decode(stored), decode(encode(valid, dtype)), sets)
        size = sum(tensor.nbytes for tensor in stored.values()) / len(train)
        kept, ranks = [], []
        for a, b in zip(want.T, got.T, strict=True):
            kept.append(len(np.intersect1d(np.argsort(-a)[:best], np.argsort(-b)[:best])) / best)
            ranks.append(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])
        error = np.sqrt(np.mean((got - want) ** 2))
        print(f"| {dtype} | {size:.0f} | {error:.1e} | {np.mean(kept):.3f} | {np.mean(ranks):.4f} |")


if __name__ == "__main__":
    main()
