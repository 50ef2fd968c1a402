"""What pass rates say of scores before a prompt is sketched: ``python -m benchmarks.pass_rates``.

For the demo's score table (``--tables demo-out/scores.parquet``) and, with ``--mini``, for the whole pools of the
miniature experiment (docs/rlvr_mini.md), under its base policy and under the last policy of CROPI's arm:

- rank correlations of the pass rate p, and of the standard deviation of rewards sqrt(p (1 - p)), with the score and its
  size (mean over the validation sets);
- the share of the best tenth (rrf) that is among the first fifth of the prompts in the order of either;
- the share of the best tenth, among prompts without a sketch, that a stage finds with a fifth of the tokens: three
  tenths of the prompts, drawn at random, have a score, and the rule of a budget (:mod:`cropi.ranking.cut`) chooses what
  is sketched, once with the pass rates, and once as if they were all equal.

Errors are standard errors over seeds; of one table, the standard deviation over halves of its prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.lib.environment import describe
from benchmarks.lib.script import options, publish
from benchmarks.rlvr_mini.config import SCALES, Scale
from benchmarks.rlvr_mini.data import base_model, seed_data
from benchmarks.rlvr_mini.scoring import sketched_scores
from cropi.errors import CropiError
from cropi.gradient.estimators import make_estimator
from cropi.options import Selecting
from cropi.ranking.cut import Drift, anew
from cropi.ranking.rule import Rule
from cropi.ranking.scores import Scores
from cropi.ranking.table import read_scores, write_scores
from cropi.store.rows import RowInfo

FIRST, SKETCHED, PASSED, BEST = 0.2, 0.3, 0.2, 0.1
TRAINED = "cropi_pool3"
POLICIES = {"base policy": None, "CROPI's last policy": TRAINED}
MEASURES = (
    "p with score", "p with size", "deviation with score", "deviation with size", "best in the first fifth by p",
    "by the deviation", "found with rates", "found without", "gain",
)  # fmt: skip
HALVES = 40


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--tables", nargs="*", type=Path, default=[], help="score tables, each a row")
    parser.add_argument(
        "--mini", type=Path, help="the miniature experiment's folder, after its arm cropi_pool3"
    )
    parser.add_argument(
        "--scale", choices=sorted(SCALES), default="cpu", help="of the experiment; default: cpu"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 .. the scale's number of seeds - 1")
    parser.add_argument(
        "--draws", type=int, default=8, help="of the prompts with a score, per table; default: 8"
    )
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args(arguments)
    if not args.tables and not args.mini:
        parser.error("there is nothing to measure: give --tables FILE, --mini FOLDER or both")
    torch.set_num_threads(1)
    pools = {str(path): [usable(read_scores(path))] for path in args.tables}
    if args.mini:
        scale = SCALES[args.scale]
        seeds = range(scale.seeds) if args.seeds is None else args.seeds
        for path in [args.mini / scale.name / f"seed{seed}" / TRAINED / "policy.pt" for seed in seeds]:
            if not path.exists():
                raise CropiError(
                    f"{path} is missing; run python -m benchmarks.rlvr_mini --arms {TRAINED} first"
                )
        for name, arm in POLICIES.items():
            scores = (mini_scores(scale, seed, args.mini / scale.name, arm) for seed in seeds)
            pools[f"miniature experiment, {name}"] = [usable(each) for each in scores]
    lines = [
        f"{describe()}.", "", f"| prompts | tables | {' | '.join(MEASURES)} |", f"|{'---|' * (len(MEASURES) + 2)}",
    ]  # fmt: skip
    for name, tables in pools.items():
        each = np.array([measured(rows, table, args.draws) for rows, table in tables])
        errors = (
            each.std(axis=0, ddof=1) / len(each) ** 0.5
            if len(each) > 1
            else of_halves(*tables[0], args.draws)
        )
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in zip(each.mean(axis=0), errors, strict=True)]
        lines.append(f"| {name} | {len(tables)} | {' | '.join(cells)} |")
    publish(args.out, lines)


def mini_scores(scale: Scale, seed: int, work: Path, arm: str | None) -> Scores:
    """Scores of one seed's pool x 3 under the base policy, or an arm's last; kept in the seed's folder."""
    folder = work / f"seed{seed}"
    path = folder / f"scores-{arm or 'base'}.parquet"
    if not path.exists():
        model = base_model(scale, work)
        data = seed_data(scale, seed, model, folder, 3)
        if arm:
            model.load_state_dict(torch.load(folder / arm / "policy.pt", map_location=scale.device))
        with tempfile.TemporaryDirectory() as kept:
            estimator, spec = make_estimator("cropi"), scale.spec(seed)
            scores = sketched_scores(
                model, data.pool, data.valid, spec, estimator, Path(kept), 0, tokens=scale.tokens
            )
            write_scores(path, scores)
    return read_scores(path)


def usable(scores: Scores) -> tuple[list[RowInfo], np.ndarray]:
    """The prompts with a score, and their scores ``[n, sets]``."""
    known = np.isfinite(scores.table).all(axis=1)
    return [scores.rows[i] for i in np.flatnonzero(known)], scores.table[known]


def of_halves(rows: Sequence[RowInfo], table: np.ndarray, draws: int) -> np.ndarray:
    """The errors of the measures of one table: their standard deviation over random halves of its prompts."""
    made = []
    for seed in range(HALVES):
        half = np.sort(np.random.default_rng(seed).permutation(len(rows))[: len(rows) // 2])
        made.append(measured([rows[i] for i in half], table[half], draws))
    return np.std(made, axis=0, ddof=1)


def measured(rows: Sequence[RowInfo], table: np.ndarray, draws: int) -> list[float]:
    """All of :data:`MEASURES` of one table."""
    p = np.array([row.pass_rate for row in rows])
    deviation, rng = np.sqrt(p * (1 - p)), np.random.default_rng(0)
    chosen = Rule(rows, np.arange(len(rows)), Selecting(fraction=BEST)).choose(table)
    best = np.isin(np.arange(len(rows)), chosen)

    def mean_rank(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([spearmanr(x, column).statistic for column in y.T]))

    def first(x: np.ndarray) -> float:
        orders = (np.lexsort((rng.random(len(x)), -x))[: round(FIRST * len(x))] for _ in range(100))
        return float(np.mean([best[order].sum() / best.sum() for order in orders]))

    shares = [[found(rows, table, told, seed) for told in (True, False)] for seed in range(draws)]
    informed, blind = np.mean(shares, axis=0)
    ranks = [mean_rank(x, y) for x in (p, deviation) for y in (table, np.abs(table))]
    return [*ranks, first(p), first(deviation), informed, blind, informed - blind]


def found(rows: Sequence[RowInfo], table: np.ndarray, told: bool, seed: int) -> float:
    """The share of the best prompts without a sketch that a stage within a budget sketches."""
    rng, n = np.random.default_rng(seed), len(rows)
    rows = rows if told else [replace(row, pass_rate=0.5) for row in rows]
    rule = Rule(rows, np.arange(n), Selecting(fraction=BEST))
    known = rng.permutation(n)[: round(SKETCHED * n)]
    earlier, costs = np.full(table.shape, np.nan), np.array([float(row.tokens) for row in rows])
    earlier[known] = table[known]
    places = anew(
        earlier, np.zeros(n), costs, rule.ids, rule, tokens=PASSED * costs.sum(), drift=Drift(), seed=seed
    )
    best = np.setdiff1d(rule.choose(table), known)
    return len(np.intersect1d(places, best)) / max(len(best), 1)


if __name__ == "__main__":
    main()
