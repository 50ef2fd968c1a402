"""Standard errors of scores beside their spread over other validation prompts (docs/trust.md).

    python -m benchmarks.standard_errors [--worlds 3] [--samples 300]

A world is a pool of 400 prompts and a population of validation prompts, of which many samples are drawn: normal
gradients around one mean, or around those of some topics. A line has the root mean square of the standard errors over
the spread of the scores, prompt by prompt: median, and the values that 5 % and 95 % of the prompts are below.
"""

from __future__ import annotations

import numpy as np

from benchmarks.lib.script import options
from cropi.ranking.pairwise import Pairwise
from cropi.ranking.resampled import MeanSet, NearestSet
from cropi.store.rows import RowInfo

DIM, POOL = 60, 400


def gradients(rng: np.random.Generator, topics: np.ndarray, count: int, noise: float) -> np.ndarray:
    """Gradients around those of topics, float64 ``[count, DIM]``."""
    return topics[rng.integers(0, len(topics), count)] + noise * rng.normal(size=(count, DIM)) / np.sqrt(DIM)


def ratios(rng: np.random.Generator, topics: int, prompts: int, samples: int) -> dict[str, np.ndarray]:
    """The ratio of every prompt of a world, by aggregate, float64 ``[POOL]``."""
    centres = rng.normal(size=(topics, DIM)) / np.sqrt(DIM)
    noise = 1.0 if topics == 1 else 0.7
    train = gradients(rng, 0.15 * centres if topics == 1 else centres, POOL, noise)
    rows, columns = ([RowInfo(f"{i:03d}") for i in range(n)] for n in (POOL, prompts))
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"mean": [], "nearest": []}
    for _ in range(samples):
        valid = gradients(rng, centres, prompts, noise)
        pairs = Pairwise(rows, columns, train @ valid.T, np.linalg.norm(train, axis=1), valid @ valid.T)
        name = pairs.sets[0]
        everyone = np.arange(POOL)
        for kind, one in (
            ("mean", MeanSet(pairs, name, everyone, "cosine", "plain")),
            ("nearest", NearestSet(pairs, name, everyone, "cosine")),
        ):
            found[kind].append((one.stderr(), one.score(one.base)))
    made = {}
    for kind, pair in found.items():
        errors, scores = np.array(pair).transpose(1, 0, 2)
        made[kind] = np.sqrt(np.square(errors).mean(axis=0)) / scores.std(axis=0, ddof=1)
    return made


def main() -> None:
    """Print a line a world."""
    parser = options(__doc__)
    parser.add_argument("--worlds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=300)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print("topics  validation prompts  mean: median, 5 %, 95 %  nearest: median, 5 %, 95 %")
    for topics in (1, 4, 16, 32):
        for prompts in (6, 16, 48):
            worlds = [ratios(rng, topics, prompts, args.samples) for _ in range(args.worlds)]
            cells = []
            for kind in ("mean", "nearest"):
                values = np.concatenate([world[kind] for world in worlds])
                cells.append("{:.2f} {:.2f} {:.2f}".format(*np.quantile(values, (0.5, 0.05, 0.95))))
            print(f"{topics:6d}  {prompts:18d}  {cells[0]:>23}  {cells[1]:>26}", flush=True)


if __name__ == "__main__":
    main()
