"""The integers of the sketch, against vectors made from docs/sketch.md by code of its own (vectors/make.py)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cropi_kernels import (
    SketchSpec,
    _native,
    fold_inputs,
    fold_outputs,
    plan_matrix,
    plan_vector,
    project,
    projection_of,
    reduce_sketch,
    sketch_embedding,
    sketch_linear,
)
from cropi_kernels import philox as px
from cropi_kernels.ops.sketch_linear import coordinates, sketch_matrix
from cropi_kernels.sketcher.sums.matrix import KronMatrix, TensorMatrix
from cropi_kernels.spec import VERSION, VERSIONS

FOLDER = Path(__file__).parent / "vectors"
VECTORS = json.loads((FOLDER / f"sketch_v{VERSION}.json").read_text())
COUNTSKETCH = json.loads((FOLDER / "countsketch_v2.json").read_text())
# Of version 1 of `countsketch` and `dropout` the file still tells; this build has another.
PLACES = [case for case in VECTORS["vectors"] if case["spec"]["kind"] not in VERSIONS] + COUNTSKETCH[
    "vectors"
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Random123's known answers for philox4x32-10 (its file kat_vectors): counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def dense(entries: list[list[float]], size: int) -> torch.Tensor:
    out = torch.zeros(size)
    for i, value in entries:
        out[int(i)] = value
    return out


def spec_of(case: dict[str, Any]) -> SketchSpec:
    return SketchSpec.from_dict(case["spec"])


# ------------------------------------------------------------------------------------------------- draws
@pytest.mark.parametrize("counter, key, words", KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_known_answers(counter: str, key: str, words: str) -> None:
    c, k, w = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert px.philox((k[0], k[1]), *c).tolist() == w
    assert list(_native.native().philox(*k, *c)) == w
    assert {"key": k, "counter": c, "words": w} in VECTORS["philox"]


def test_philox_in_numpy_and_cpp() -> None:
    for case in VECTORS["philox"]:
        k0, k1 = case["key"]
        assert px.philox((k0, k1), *case["counter"]).tolist() == case["words"]
        assert list(_native.native().philox(k0, k1, *case["counter"])) == case["words"]


def test_philox_of_many_counters_at_once() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (4, 200), dtype=np.uint64)
    together = px.philox((123, 456), *counters)
    one_by_one = [_native.native().philox(123, 456, *(int(c) for c in column)) for column in counters.T]
    assert together.tolist() == [list(words) for words in one_by_one]


def test_keys_signs_and_offsets() -> None:
    for case in VECTORS["keys"]:
        assert list(px.key_of(VERSION, case["seed"], case["name"])) == case["key"], case["name"]
    for case in VECTORS["signs"]:
        key = px.key_of(VERSION, 0, case["name"])
        got = px.signs(key, len(case["signs"]), case["purpose"], case["first"])
        assert got.tolist() == case["signs"]
    for case in VECTORS["offsets"]:
        key = px.key_of(VERSION, 0, case["name"])
        got = px.offsets(key, len(case["xor"]), case["size"], case["purpose"])
        assert got.tolist() == case["xor"]
        assert all(x % 8 == 0 and x < case["size"] for x in case["xor"])


# ------------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("case", VECTORS["plans"], ids=lambda c: f"{c['name']}-{c['role']}-{c['shape']}")
def test_plan_of_a_matrix(case: dict[str, Any]) -> None:
    plan = plan_matrix(spec_of(case), case["name"], *case["shape"], case["role"])
    assert [plan.folded_rows, plan.folded_cols] == case["folded"]
    assert [plan.slab_rows, plan.slab_cols, plan.n_slabs] == case["slab"]
    bucket, sign = coordinates(plan)
    for r, c, *want in case["coordinates"]:
        assert [int(bucket[r, c]), int(sign[r, c])] == want, (r, c)


@pytest.mark.parametrize("case", PLACES, ids=lambda c: f"{c['name']}-{c['spec']['kind']}")
def test_plan_of_a_vector(case: dict[str, Any]) -> None:
    plan = plan_vector(spec_of(case), case["name"], case["size"])
    for p, bucket, sign in case["coordinates"]:
        assert (plan.position[p], plan.sign[p]) == (bucket, sign)
    block = plan.position[: min(plan.dim, 32768)]
    assert len(set(block.tolist())) == len(block), "two coordinates of one block meet"


# -------------------------------------------------------------------------------------- sketches, to the bit
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VECTORS["sketches"], ids=lambda c: f"{c['name']}-{c['spec']['width']}")
def test_sketch_of_integers_is_exact(case: dict[str, Any], dtype: torch.dtype, level: int) -> None:
    spec, d, a = spec_of(case), torch.tensor(case["d"], dtype=dtype), torch.tensor(case["a"], dtype=dtype)
    plan = plan_matrix(spec, case["name"], d.shape[1], a.shape[1], case["role"])
    want = dense(case["base"], spec.base_dim)
    offsets = torch.tensor([0, 0, len(d), len(d)])
    for folded in (False, True):
        x, y = (
            (fold_outputs(d, plan, backend="cpu"), fold_inputs(a, plan, backend="cpu")) if folded else (d, a)
        )
        out = torch.zeros(3, spec.base_dim)
        sketch_linear(x, y, offsets, plan, out, backend="cpu")
        assert torch.equal(out[1], want) and not out[[0, 2]].any()
    gradient = (d.T.float() @ a.float()).to(dtype)
    rows, out = torch.arange(plan.rows), torch.zeros(1, spec.base_dim)
    sketch_embedding(gradient, rows, torch.tensor([0, plan.rows]), plan, out, backend="cpu")
    assert torch.equal(out[0], want)
    if case["reduced"] is not None:
        reduced = reduce_sketch(out[0], spec.dim, seed=spec.seed, version=spec.version)
        assert torch.equal(reduced, dense(case["reduced"], spec.dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", VECTORS["sketches"], ids=lambda c: f"{c['name']}-{c['spec']['width']}")
def test_references_of_integers_are_exact(case: dict[str, Any], dtype: torch.dtype) -> None:
    spec, d, a = spec_of(case), torch.tensor(case["d"], dtype=dtype), torch.tensor(case["a"], dtype=dtype)
    plan = plan_matrix(spec, case["name"], d.shape[1], a.shape[1], case["role"])
    want, out = dense(case["base"], spec.base_dim).to(dtype), torch.zeros(1, spec.base_dim, dtype=dtype)
    sketch_linear(d, a, torch.tensor([0, len(d)]), plan, out, backend="reference")
    assert torch.equal(out[0], want)
    assert torch.equal(sketch_matrix(d.T @ a, plan), want)


@pytest.mark.parametrize("case", COUNTSKETCH["flat"], ids=lambda c: f"{c['spec']['kind']}-{c['offset']}")
def test_countsketch_of_integers_is_exact(case: dict[str, Any], level: int) -> None:
    spec, x = spec_of(case), torch.tensor([case["x"]], dtype=torch.float32)
    assert spec.version == COUNTSKETCH["version"]
    want = dense(case["sketch"], spec.dim)
    for backend in ("cpu", "reference"):
        got = project(x, projection_of(spec, case["name"]), case["offset"], backend=backend)
        assert torch.equal(got[0], want), backend


def test_kron_and_tensor() -> None:
    case = VECTORS["other_kinds"]
    rows, cols = case["shape"]
    kron = KronMatrix(SketchSpec(kind="kron", dim=case["dim"]), case["name"], rows, cols, "linear")
    assert torch.equal(kron.p_in * 4, torch.tensor(case["kron_in"]).float())
    assert torch.equal(kron.p_out * 4, torch.tensor(case["kron_out"]).float())
    tensor = TensorMatrix(SketchSpec(kind="tensor", dim=case["dim"]), case["name"], rows, cols, "linear")
    for bucket, sign, want in (
        (tensor.row_bucket, tensor.row_sign, case["tensor_rows"]),
        (tensor.col_bucket, tensor.col_sign, case["tensor_columns"]),
    ):
        assert [[int(b), int(s)] for b, s in zip(bucket, sign)] == want


# ------------------------------------------------------------------------------------------ the file itself
def test_vectors_are_not_overwritten(tmp_path: Path) -> None:
    """They are what another version of the package is held to: making them again must not be possible by accident."""
    script = tmp_path / "make.py"
    script.write_bytes((FOLDER / "make.py").read_bytes())

    def make() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(script)], capture_output=True, text=True)

    assert make().returncode == 0
    made = tmp_path / f"sketch_v{VERSION}.json"
    assert made.read_text() == (FOLDER / made.name).read_text(), (
        "make.py no longer gives the committed vectors"
    )
    again = make()
    assert again.returncode != 0 and "Raise VERSION" in again.stderr
    text = script.read_text("utf-8").replace(f"VERSION = {VERSION}\n", f"VERSION = {VERSION + 1}\n")
    script.write_text(text, "utf-8")
    assert make().returncode == 0 and (tmp_path / f"sketch_v{VERSION + 1}.json").exists()


def test_the_vectors_of_countsketch_are_what_the_document_says() -> None:
    maker = FOLDER / "make_countsketch.py"
    done = subprocess.run([sys.executable, str(maker), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stored_countsketch_of_version_1_is_refused() -> None:
    """Its integers were others. All other kinds are what they were."""
    for kind in ("countsketch", "dropout"):
        with pytest.raises(
            ValueError, match=f"version=1: this build defines version 2 of kind='{kind}'; sketch"
        ):
            SketchSpec.from_dict({"kind": kind, "version": 1})
    assert {SketchSpec(kind=kind).version for kind in ("slab", "kron", "tensor")} == {1}  # type: ignore[arg-type]


def test_the_document_is_of_this_version() -> None:
    text = (FOLDER.parents[2] / "docs" / "sketch.md").read_text("utf-8")
    assert re.search(rf"^# The sketch, version {VERSION}$", text, re.MULTILINE)
    purposes = re.findall(r"\| ([A-Z_]+) \| (\d+) \|", text)
    assert len(purposes) == 11
    for name, number in purposes:
        assert getattr(px, name) == int(number)
