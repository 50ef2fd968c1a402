"""The GPU suite, rehearsed: a machine with a GPU is too dear to find a misspelt name on."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rehearsal import set_stage

from cropi_kernels import SketchSpec, _gpu

SUITE = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"
TINY = {"qwen2.5-1.5b": {"layers": 1, "head": (130, 32), "linears": [("q_proj", 32, 32), ("k_proj", 16, 96)]}}

TINY_MODEL = {
    "vocab_size": 130, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip

TINY_EXPERTS = {"moe_intermediate_size": 16, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with set_stage(monkeypatch):
        yield


@pytest.fixture
def stage_without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with set_stage(monkeypatch, kernels=False):
        yield


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Imports a part of the suite, its results going to a folder of their own."""
    monkeypatch.setenv("GPU_SUITE_OUT", str(tmp_path))
    monkeypatch.syspath_prepend(str(SUITE))

    def load(name: str) -> ModuleType:
        for path in SUITE.glob("*.py"):
            monkeypatch.delitem(sys.modules, path.stem, raising=False)
        module, common = importlib.import_module(name), importlib.import_module("common")
        monkeypatch.setattr(common, "MODELS", TINY)
        monkeypatch.setattr(common, "COPIED", 64)
        monkeypatch.setattr(common, "GEMM", 8)
        monkeypatch.setattr(common, "MOST_SETS", 2)
        timed, kernels = common.milliseconds, common.kernel_milliseconds
        monkeypatch.setattr(common, "milliseconds", lambda run, **kwargs: timed(run, repeats=1, warm=0))
        monkeypatch.setattr(common, "kernel_milliseconds", lambda runs, **kwargs: kernels(runs, calls=1))
        return module

    return load


def rows(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in map(json.loads, (folder / f"{part}.jsonl").read_text().splitlines())}


def cut_down(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **values: Any) -> None:
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)


def finish(module: ModuleType) -> None:
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0, "the part would have failed"


def test_correctness_as_the_sanitizer_runs_it(
    suite: Any, stage: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = suite("correctness")
    monkeypatch.setattr(sys, "argv", ["correctness.py", "--small", "memcheck"])
    narrow = dict.fromkeys(("folded", "several groups", "odd"), module.CASES["narrow"])
    grouped = dict.fromkeys(module.GROUPED, (1, 8, 9, 16, 5, 8))
    cut_down(monkeypatch, module, DTYPES={"fp32": torch.float32}, CASES=narrow, GROUPED=grouped)
    cut_down(monkeypatch, module, TOKENS=100, SCORED=12)
    finish(module)
    got = rows(tmp_path, "sanitizer_memcheck")
    assert len(got) >= 8 and all(row["ok"] for row in got.values())


BY_TURNS: dict[str, tuple[list[int], int, int | None, list[int], str]] = {
    "no fold, several groups": ([400], 528, None, [3, 0, 20, 90], "out"),
    "width 256, three matrices": ([304, 32, 48], 96, 256, [70, 1], "sums"),
    "width 128, two parts, a long segment": ([304], 96, 128, [530, 33], "out"),
    "width 64, two matrices": ([304, 528], 96, 64, [5, 0, 70, 130], "out"),
}


@pytest.mark.parametrize("case", BY_TURNS)
def test_slabs_by_turns(case: str, suite: Any, stage: None) -> None:
    """The case of the suite, in the emulator: `slab_turns_kernel` gives the bits of `slab_kernel`."""
    rows, cols, width, lengths, into = BY_TURNS[case]
    assert suite("correctness").slabs_by_turns(rows, cols, width, lengths, torch.bfloat16, into)["ok"]


def test_tiles_of_d_that_stay(suite: Any, stage: None) -> None:
    """Twelve pairs of one group have seven different tiles of D, three steps each: more than there is room for."""
    values = {"HELD_FROM": 1, "group_pairs": lambda cols, pairs: 12}
    row = suite("correctness").slabs_by_turns([144], 1312, None, [130, 3], torch.bfloat16, "out", **values)
    assert row["ok"]


def test_tiles_of_a_that_stay(suite: Any, stage: None) -> None:
    """Nine pairs of one group have three column blocks, twice: there are more tokens than stay."""
    values = {"A_STAYS": True, "group_pairs": lambda cols, pairs: 9}
    row = suite("correctness").slabs_by_turns([272], 528, None, [3, 300], torch.bfloat16, "out", **values)
    assert row["ok"]


def test_launches(suite: Any, stage: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite("launches")
    cut_down(monkeypatch, module, TOKENS=12, FEATURES=48, ROWS=40, VOCAB=70, FLAT=999)
    # A replay does not compute here; what was captured has been overwritten to show exactly that.
    monkeypatch.setattr(torch.Tensor, "fill_", lambda self, value: self)
    for op in module.calls("cuda:0"):
        row = module.check(op)
        assert row["ok"] and row["second_device"], (op, row)


def test_sketch(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = suite("sketch")
    cut_down(monkeypatch, module, TOKENS=32, SEGMENTS=(2,), LENGTHS=(16,))
    linears = [("q_proj", 32, 272), ("k_proj", 16, 272), ("o_proj", 96, 288), ("gate_proj", 64, 272)]
    cut_down(monkeypatch, module.common, MODELS={"qwen2.5-1.5b": TINY["qwen2.5-1.5b"] | {"linears": linears}})
    launches, reduced = Counter[tuple[int, str]](), list[int]()

    def launch(stack: Any, ds: Any, *rest: Any) -> None:
        launches[len(ds), rest[-1]] += 1

    monkeypatch.setattr(module.slab, "add_slabs", launch)
    monkeypatch.setattr(module, "reduce_partials", lambda partial, *rest: reduced.append(partial.shape[1]))
    finish(module)
    # q and k in one launch; as a pass launches them, only slabs of 256 columns have slots of their own.
    assert set(launches) == {(n, into) for n in (1, 2) for into in ("sums", "slots")}
    assert len(reduced) == sum(n for (_, into), n in launches.items() if into == "slots")
    assert sum(launches.values()) == 3 * len(reduced), "as often with each width"
    got = rows(tmp_path, "sketch")
    assert {"copy bandwidth", "qwen2.5-1.5b w=64 S=2", "qwen2.5-1.5b w=None S=2", "segments of 16"} <= set(
        got
    )
    assert got["qwen2.5-1.5b in a pass w=128 S=2"]["times_read"] > 0
    assert {"of_mm_rate", "mm_ms"} <= set(got["qwen2.5-1.5b w=None S=2"]) and got["qwen2.5-1.5b w=64 S=2"][
        "times_read"
    ] > 0


def test_logprob(suite: Any, stage: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite("logprob")
    monkeypatch.setattr(module, "TOKENS", 8)
    finish(module)
    got = rows(tmp_path, "logprob")
    beside = {name: got.pop(f"qwen2.5-1.5b beside {name}") for name in module.PEERS}
    assert beside["torch"]["times_faster"] > 0 and beside["torch"]["gradient_error"] < 0.02
    assert set(got) == {"qwen2.5-1.5b", "qwen2.5-1.5b with the head's sketch"}
    for row in got.values():
        for what, tflops in (("forward", row["forward_tflops"]), ("both", row["both_tflops"])):
            # Medians of ratios, and ratios of medians: of times on the CPU.
            assert row[f"{what}_of_large"] == pytest.approx(tflops / row["large_product_tflops"], rel=1)
        assert row["both_extra_gb"] > 0


def test_model(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    module = suite("model")
    cut_down(monkeypatch, module, LENGTH=8, ROWS=2, WIDTHS=(64,), BLOCK=8, BLOCKS=2, DIM=64, SHAPE=TINY_MODEL)
    cut_down(monkeypatch, module, SHAPE_7B=TINY_MODEL, ROWS_7B=1)
    finish(module)
    monkeypatch.setattr(sys, "argv", ["model.py", "7b"])
    finish(module)
    monkeypatch.setattr(module, "SHAPE_MOE", module.SHAPE_MOE | TINY_MODEL | TINY_EXPERTS)
    monkeypatch.setattr(sys, "argv", ["model.py", "moe"])
    finish(module)
    for part in ("model_7b", "model_moe"):
        other = rows(tmp_path, part)
        assert set(other) == {"frozen weights", "sketched, width 64", "sketched and fused, width 64"}
        assert all(row["finite"] for name, row in other.items() if name != "frozen weights")
    got = rows(tmp_path, "model")
    assert got["sketched, width 64"]["finite"] and got["sketched and fused, width 64"]["finite"]
    assert got["loop: backward and flat float32 gradient"]["ms_per_prompt"] > 0
    assert got["loop: dense projection of a tenth"]["of"] > 2


def test_first(suite: Any, stage: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels: its cases are the first that any GPU computes."""
    module = suite("first")
    cut_down(monkeypatch, module, REPEATS=2, REPEATED_TOKENS=24, VOCAB=70, HIDDEN=48)
    cut_down(monkeypatch, module, SLABS=(("gate_proj", 16, 48, 40),))
    cut_down(monkeypatch, module, REAL={"gate_proj": (48, 40, 16, 32768, [9, 0, 5])})
    cut_down(monkeypatch, module.correctness, TOKENS=100, SCORED=12)
    small_taps(module.taps, monkeypatch)
    small_fused(module.fused, monkeypatch)
    finish(module)
    got = rows(tmp_path, "first")
    assert got["rates"]["copy_gb_per_s"] > 0 and got["bits of gate_proj w=16"]["different"] == 0
    assert {n for n, row in got.items() if row.get("ok")} == set(got) - {"rates"} and len(got) == 9
    assert got["a layer by the engine"]["of_bound"] < 1
    assert all(got[name]["times_eager"] > 0 for name in ("fused norm", "fused gated product"))


def small_fused(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_down(monkeypatch, fused, TOKENS=12, HIDDEN=24, INNER=72, SEGMENTS=2, DTYPE=torch.float16)


def small_taps(taps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_down(monkeypatch, taps, HIDDEN=136, NARROW=8, INNER=144, BATCH=1, LENGTH=12, REPEATS=2)
    monkeypatch.setattr(taps, "SPEC", SketchSpec(width=128))
    monkeypatch.setattr(taps, "DTYPE", torch.float16)


def test_warm(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it calls exists; what it would compile, nobody does here."""
    pytest.importorskip("transformers")
    module = suite("warm")
    cut_down(monkeypatch, module.whole, SHAPE=TINY_MODEL, WIDTHS=(64,))
    monkeypatch.setattr(module.sketch, "TOKENS", module.sketch.TOKENS)
    monkeypatch.setattr(module, "TOKENS", 8)
    monkeypatch.setattr(module.taps, "check", lambda: {"ok": True})
    small_fused(module.fused, monkeypatch)
    monkeypatch.setattr(module.first.correctness, "TOKENS", 60)
    finish(module)
    assert len(rows(tmp_path, "warm")) == 11 and module.sketch.TOKENS == 8


def test_first_sees_bits_that_change(suite: Any, stage: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite("first")
    cut_down(monkeypatch, module, REPEATS=3, REPEATED_TOKENS=24)
    calls = iter([1.0, 1.0, 1.5, 1.0])
    monkeypatch.setattr(module, "sketch_linear", lambda d, a, offsets, plan, out: out.fill_(next(calls)))
    row = module.repeats(16, 48, 40, "gate_proj")
    assert row["different"] == 1 and not row["ok"]


def test_passes(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    module = suite("passes")
    monkeypatch.setattr(module.whole, "SHAPE", TINY_MODEL)
    monkeypatch.setattr(module, "wall", lambda run, wall=module.wall: wall(run, repeats=1))
    monkeypatch.setattr(module, "PASSES", ((1, 8),))
    profile, host = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=host))
    finish(module)
    row = rows(tmp_path, "passes")["pass of 8 tokens"]
    assert row["tokens"] == 8 and row["ratio"] == row["sketched_ms"] / row["frozen_ms"]
    assert row["frozen_launches"] == 0, "no CUDA kernel runs on the stage"


@pytest.mark.long
def test_jobs(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stage both stores are the CPU's, so that they are equal."""
    pytest.importorskip("transformers")
    module = suite("jobs")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 4}
    cut_down(monkeypatch, module.whole, SHAPE=TINY_MODEL, LENGTH=16)
    kinds = {"llama": module.SIZE | small, "qwen3_moe": module.KINDS["qwen3_moe"] | small}
    cut_down(monkeypatch, module, KINDS=kinds, PROMPTS=3, LONGEST=6, LONG=8, FEW=2)
    cut_down(monkeypatch, module, DEVICE="cpu", LAYERS=1, AGAIN=2)
    finish(module)
    got = rows(tmp_path, "jobs")
    assert len(got) == 11
    assert got["cropi run"]["chosen"] > 0
    assert got["llama: a store by the device and by the CPU"]["error"] == 0
    assert (
        got["the first call with the self-test"]["first_s"]
        > got["the first call with the self-test"]["second_s"]
    )


@pytest.mark.long
def test_new(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage plays streams by what is current; its passes are looked at as those of a device."""
    pytest.importorskip("transformers")
    module, current = suite("new"), ["the first"]
    monkeypatch.setattr(_gpu, "stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the first")
    monkeypatch.setattr(module.launches, "on_a_stream", lambda call: call())
    monkeypatch.setattr(module.passes, "AHEAD", ("cpu",))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 4}
    kinds = {kind: module.jobs.KINDS[kind] | small for kind in ("llama", "qwen2", "qwen3_moe")}
    cut_down(monkeypatch, module.jobs, KINDS=kinds, PROMPTS=6, LONGEST=6)
    cut_down(monkeypatch, module, TOKENS=60, NORMED=(1, 18), WIDE=301, LENGTHS=(41,), BATCH=48)
    cut_down(monkeypatch, module, JOBS=module.JOBS[1:2], TILES=(64,), EXPERTS=("odd rows",))
    cut_down(monkeypatch, module, SLAB=([144], 1312, None, [130, 3]), takes_turns=lambda device: True)
    cut_down(monkeypatch, module, FOLDED=([48, 16], 272, 256, [70, 3]), OF_FOLDED={"": {"A_STAYS": True}})
    cut_down(monkeypatch, module, FORMS=dict(list(module.FORMS.items())[-1:]))
    cut_down(monkeypatch, module.correctness, TOKENS=60, SCORED=12)
    finish(module)
    got = rows(tmp_path, "new")
    assert len(got) == 11 and all(row["ok"] for row in got.values())
    assert got["streams"]["message"].startswith("model.layers.1.mlp.up_proj runs on another CUDA stream")
    assert got["a bias of millions"]["features"] == 301 and got["norms of 18"]["sums"] > 0


@pytest.mark.long
def test_the_times_of_what_is_new(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    module = suite("new")
    monkeypatch.setattr(module.passes, "AHEAD", ("cpu",))
    monkeypatch.setattr(module.whole, "SHAPE", TINY_MODEL)
    cut_down(monkeypatch, module.jobs, LONG=8, MANY=4, TOKENS=24, TURNS=1)
    cut_down(monkeypatch, module, NORMS=((32, 72),), ROW=32, SHARING=3)
    monkeypatch.setattr(sys, "argv", ["new.py", "times"])
    finish(module)
    got = rows(tmp_path, "new_times")
    assert got["passes launched ahead"]["times_faster"] > 0
    assert got["rows that share a prompt, by their mask"]["apart"] < 0.02
    assert set(got) == {"norm 32 x 72", "rows that share a prompt, by their mask", "passes launched ahead"}


def test_busy_share_counts_overlaps_once(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite("passes")

    def event(name: str, start: float, end: float, device: Any) -> Any:
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device
        )

    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        event("fold_kernel", 0, 40, cuda),
        event("gemm", 30, 50, cuda),
        event("slab_kernel", 90, 100, cuda),
    ]
    recorded = SimpleNamespace(events=lambda: [*events, event("aten::mm", 0, 500, host)])
    profile = lambda **kwargs: contextlib.nullcontext(recorded)  # noqa: E731
    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert module.profiled(lambda: None) == {
        "launches": 3, "span_ms": 0.1, "busy_share": 0.6, "longest_idle": "0.04 ms gemm -> slab_kernel",
        "fold_kernel_ms": 0.04, "slab_kernel_ms": 0.01,
    }  # fmt: skip


def test_variants(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = suite("variants")
    cut_down(monkeypatch, module, TOKENS=32, SCORED=8, VOCAB=130, HIDDEN=32, WIDE=72)
    cut_down(monkeypatch, module, SQUARE=(32, 32), SEVEN=(40, 300))
    cut_down(monkeypatch, module.sketch, TOKENS=32)
    monkeypatch.setattr(module.slab, "add_slabs", lambda *args: None)
    before = module.slab.group_pairs, module.slab.slab_config, module.norm.CHUNK_TOKENS
    finish(module)
    got = rows(tmp_path, "variants")
    assert len(got) == 99 and all(row["us"] > 0 and "prediction_us" in row for row in got.values())
    assert (
        got["dz times head: float32 result"]["worst_error"]
        < got["dz times head: bfloat16 result"]["worst_error"]
    )
    assert (module.slab.group_pairs, module.slab.slab_config, module.norm.CHUNK_TOKENS) == before
    # Operands were made before the first row: without memory for them there was none.
    monkeypatch.setattr(module, "random", lambda *args: pytest.fail("rows that are there need no operands"))
    finish(module)


def test_races_are_told_from_what_the_compiler_hands_over(
    suite: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = suite("races")
    of = {kernel: module.body(path, kernel) for kernel, path in module.KERNELS.items()}
    assert all(len(lines) > 60 for lines in of.values())

    def status(*accesses: tuple[str, int], summary: bool = True) -> int:
        text = []
        for i, (kernel, line) in enumerate(accesses):
            kind = "and Write" if i % 2 else "Error: Race reported between Read"
            text.append(f"========= {kind} access at {kernel}+0x130 in triton_turns.py:{line}")
        text += ["========= RACECHECK SUMMARY: 1 hazards displayed"] * summary
        monkeypatch.setattr(sys, "stdin", [line + "\n" for line in text])
        return module.main()

    first, last = of["turns_kernel"][0], of["turns_kernel"][-1]
    assert status() == 0 and status(("turns_kernel", first), ("turns_kernel", last)) == 0
    assert status(("turns_kernel", first), ("turns_kernel", first - 1)) == 9  # a group's own work
    assert status(("turns_kernel", last + 1), ("turns_kernel", last)) == 9
    assert status(("fold_kernel", first), ("fold_kernel", first)) == 9
    mine = of["slab_turns_kernel"][0]
    capsys.readouterr()
    assert (
        status(("slab_turns_kernel", mine), ("slab_turns_kernel", mine), ("tiles_kernel", 3), ("t", 3)) == 9
    )
    assert "2 reports of races, 1 of them not where" in capsys.readouterr().out
    assert status(summary=False) == 9  # racecheck did not come to its end


def test_counted(suite: Any, stage_without_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite("counted")
    monkeypatch.setattr(module, "TOKENS", 8)
    module.main()


def test_operands_rotate_until_the_cache_has_lost_them(suite: Any, stage: None) -> None:
    suite("common")
    common = sys.modules["common"]
    sizes = [common.n_sets(size) for size in (10_000, 768, 500, 1)]
    assert sizes == [1, 1, 2, common.MOST_SETS]


def test_what_is_compared_runs_in_turns(suite: Any, stage: None) -> None:
    suite("common")
    common, calls = sys.modules["common"], []
    times = common.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4 and {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert common.share([2.0, 4.0, 9.0], [1.0, 1.0, 1.0], factor=4.0) == 1.0


def test_kernels_are_timed_in_one_graph(suite: Any, stage: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many calls of each operand set in the graph as outside of it, and one of each before."""
    module = importlib.reload(suite("common"))  # its own function of that name, not the shortened one
    calls: list[int] = []
    monkeypatch.setattr(module, "milliseconds", lambda run, **kwargs: (run(), 12.0)[1])
    got = module.kernel_milliseconds([lambda: calls.append(0), lambda: calls.append(1)], calls=5)
    # Once to warm up, 3 rounds eager, 3 captured.
    assert got == {"ms": 2.0, "eager_ms": 2.0} and calls == [0, 1] * 7


def test_report_of_whatever_was_measured(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the verdicts' keys are those that the parts write; and nothing at all is reported as nothing."""
    module = suite("report")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "empty.md")])
    module.main()
    assert "not measured" in (tmp_path / "empty.md").read_text()
    lines: dict[str, list[dict[str, Any]]] = {
        "sketch": [
            {"name": "a", "width": None, "of_mm_rate": 0.8, "ms": 3.0},
            *({"name": f"b {w}", "width": w, "times_read": 1.9, "ms": 2.0} for w in (128, 256)),
            *({"name": f"c {w}", "width": w, "times_read": 1.2, "pass_ms": 1.0} for w in (128, 256)),
        ],
        "logprob": [
            {
                "name": "h",
                "sketch": True,
                "forward_of_large": 0.9,
                "both_of_large": 0.88,
                "both_extra_gb": 1.1,
            }
        ],
        "model": [
            {"name": "frozen weights", "ms": 10.0, "extra_gb": 5.0},
            {"name": "weight gradients", "ms": 14.0, "extra_gb": 9.0},
            {"name": "sketched, width 64", "ms": 10.8, "over_frozen": 1.08, "extra_gb": 5.05},
            {"name": "sketched and fused, width 64", "ms": 8.8, "over_frozen": 0.88, "extra_gb": 4.05},
            {"name": "loop: backward and flat float32 gradient", "ms_per_prompt": 20.0},
            {"name": "loop: dense projection of a tenth", "ms_per_prompt": 600.0},
        ],
        "model_7b": [
            {"name": "frozen weights", "ms": 10.0},
            {"name": "sketched, width 64", "over_frozen": 1.04},
        ],
        "project": [
            {"name": "countsketch 4096 bf16 cuda", "backend": "cuda", "of_copy": 0.85},
            {"name": "countsketch 4096 beside peers cuda", "ms": 1.0},
            {"name": "peer fast_jl rademacher", "ms": 30.0},
            {"name": "peer sjlt c=1", "ms": 3.0},
            {"name": "peer torch index_add_", "ms": 12.0},
        ],
        "correctness": [{"name": "x", "ok": True, "error": 1e-7}, {"name": "y", "error": "ValueError: no|t"}],
    }
    for part, rows_ in lines.items():
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    (tmp_path / "status.txt").write_text("build: done in 20 s\nsketch: done in 90 s\n")
    (tmp_path / "sanitizer_memcheck.log").write_text("========= ERROR SUMMARY: 0 errors\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "full.md")])
    module.main()
    text = (tmp_path / "full.md").read_text()
    assert (
        "not measured" not in text
        and "ERROR SUMMARY: 0 errors" in text
        and "2 rows, 1 of them failed" in text
    )
    assert "folded to 128, times one read (worst) | 1.9 |" in text and "128 (worst) | 1.2 |" in text
    assert "| 918.5 |" in text, "620 ms a prompt against 10.8 / 16"
