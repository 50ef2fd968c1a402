"""One Markdown table from the rows that the parts left, with everything needed to repeat it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import common

OUT = Path(os.environ["GPU_SUITE_OUT"])


def shell(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=common.ROOT, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__})"


def versions() -> dict[str, str]:
    import torch
    import triton

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    changed = shell("git", "status", "--porcelain", "--untracked-files=no")
    commit = os.environ.get("GPU_SUITE_COMMIT") or shell("git", "rev-parse", "--short", "HEAD")
    return {
        "device": "none"
        if gpu is None
        else f"{gpu.name}, {gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.0f} GiB",
        "driver": shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit + (" with local changes" if changed and not changed.startswith("unknown") else ""),
        "date": datetime.date.today().isoformat(),
    }


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |" for row in rows]


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each kind of row: a part's rows measure different things."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    return [line for same in kinds.values() for line in (*table(same), "")]


def rows_of(part: str) -> list[dict[str, Any]]:
    """Of all processes of the part; of rows of one name the last, which a later call made."""
    paths = [OUT / f"{part}.jsonl", *sorted(OUT.glob(f"{part}.*.jsonl"))]
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    return list({row["name"]: row for row in map(json.loads, lines)}.values())


def verdicts() -> list[str]:
    """The figures that the kernels are held to, each with what was measured."""
    sketch, logprob, model = ({r["name"]: r for r in rows_of(p)} for p in ("sketch", "logprob", "model"))
    best = lambda rows, key, pick: pick((r[key] for r in rows if key in r), default=None)  # noqa: E731
    frozen, trained = model.get("frozen weights", {}), model.get("weight gradients", {})
    sketched, fused = model.get("sketched, width 64", {}), model.get("sketched and fused, width 64", {})
    of_7b = {r["name"]: r for r in rows_of("model_7b")}
    larger = of_7b.get("sketched, width 64", {})
    loop = [model.get(n, {}).get("ms_per_prompt") for n in
            ("loop: backward and flat float32 gradient", "loop: dense projection of a tenth")]  # fmt: skip
    ratio = lambda a, b: a / b if a and b else None  # noqa: E731
    ours = ratio(sketched.get("ms"), 16)
    of = lambda width, key="ms": [r for r in sketch.values() if r.get("width") == width and key in r]  # noqa: E731
    with_head = [r for r in logprob.values() if r.get("sketch")]
    flat = {r["name"]: r for r in rows_of("project")}
    halves = [r for n, r in flat.items() if n.startswith("countsketch") and " bf16 " in n and "keep" not in n]
    beside = flat.get(
        "countsketch 4096 beside peers cuda", flat.get("countsketch 4096 beside peers triton", {})
    ).get("ms")
    slower = lambda name: ratio(flat.get(name, {}).get("ms"), beside)  # noqa: E731
    compiled = [r for r in halves if r.get("backend") == "cuda"]
    lines = [
        ("slab without a fold, of torch.mm's rate (worst)", best(of(None), "of_mm_rate", min), ">= 0.70"),
        ("folded to 128, times one read (worst)", best(of(128), "times_read", max), "<= 1.5"),
        ("folded to 256, times one read (worst)", best(of(256), "times_read", max), "<= 2"),
        ("in a pass, folded to 128 (worst)", best(of(128, "pass_ms"), "times_read", max), "<= 1.5"),
        ("in a pass, folded to 256 (worst)", best(of(256, "pass_ms"), "times_read", max), "<= 2"),
        ("whole model, over frozen weights", sketched.get("over_frozen"), "<= 1.10"),
        ("whole model with fused taps, over frozen weights", fused.get("over_frozen"), "< 1"),
        ("whole model, over weight gradients", ratio(sketched.get("ms"), trained.get("ms")), "< 1"),
        ("over frozen weights, Qwen2.5-7B's shape", larger.get("over_frozen"), "<= 1.05"),
        (
            "peak memory, over frozen weights",
            ratio(sketched.get("extra_gb"), frozen.get("extra_gb")),
            "<= 1.02",
        ),
        (
            "log-prob forward, of a large product's rate (worst)",
            best(logprob.values(), "forward_of_large", min),
            ">= 0.85",
        ),
        ("log-prob and gradient with sketch (worst)", best(with_head, "both_of_large", min), ">= 0.85"),
        ("log-prob peak extra memory, GB (worst)", best(logprob.values(), "both_extra_gb", max), "< 1.5"),
        ("against a per-prompt loop, times faster", ratio(sum(x or 0 for x in loop), ours), ">= 10"),
        ("project bfloat16, CUDA C++, of copy bandwidth (worst)", best(compiled, "of_copy", min), ">= 0.80"),
        ("project against fast_jl, times faster", slower("peer fast_jl rademacher"), ">= 20"),
        ("project against sjlt, times faster", slower("peer sjlt c=1"), ">= 2"),
        ("project against index_add_, times faster", slower("peer torch index_add_"), "> 1"),
    ]
    rows = [
        {"what": a, "measured": "not measured" if b is None else float(b), "reach": c} for a, b, c in lines
    ]
    return table(rows)


def correct(rows: list[dict[str, Any]], bad: list[dict[str, Any]]) -> list[str]:
    """Of rows that are right there is one thing to know: how near the nearest came to its bound."""
    near = sorted((r for r in rows if "of_bound" in r), key=lambda r: -float(r["of_bound"]))[:5]
    words = {"bf16", "fp16", "fp32", "cuda", "triton"}
    cases = sorted({" ".join(w for w in str(r["name"]).split() if w not in words) for r in rows})
    nearest = [{k: r.get(k) for k in ("name", "error", "of_bound")} for r in near]
    lines = [*table(bad), ""] if bad else []
    lines += ["The nearest to their bounds:", "", *table(nearest), ""]
    return [*lines, "Cases, most of them in three dtypes: " + "; ".join(cases) + ".", ""]


def main() -> None:
    parts = sorted({path.name.split(".")[0] for path in OUT.glob("*.jsonl")})
    text = ["# GPU suite", "", *(f"- {k}: {v}" for k, v in versions().items()), ""]
    status = OUT / "status.txt"
    text += ["Parts: " + ", ".join(status.read_text().split("\n")[:-1]) if status.exists() else "", ""]
    text += ["## Held against the targets", "", *verdicts(), ""]
    for part in parts:
        rows = rows_of(part)
        bad = [r for r in rows if common.bad(r)]
        text += [f"## {part}", "", f"{len(rows)} rows, {len(bad)} of them failed.", ""]
        text += correct(rows, bad) if "correctness" in part else tables(rows)
    for log in sorted(OUT.glob("sanitizer_*.log")):
        tail = [line for line in log.read_text(errors="replace").splitlines() if " SUMMARY: " in line]
        text += [f"- {log.stem}: {tail[-1] if tail else 'no summary'}", ""]
    target = common.ROOT / "benchmarks" / "results" / "gpu.md" if len(sys.argv) < 2 else Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(text), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
