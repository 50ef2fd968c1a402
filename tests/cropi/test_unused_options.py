"""Options that would have no effect are errors by name, before work begins: from Python, a config and a command."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.made_data import make_model, write_lines
from support.made_dumps import made, write

import cropi
from cropi.cli import main
from cropi.errors import CropiError
from cropi.options import Choosing, Comparing, Sketch
from cropi.ranking.scores import Scores
from cropi.ranking.table import write_scores
from cropi.store.rows import RowInfo
from cropi_kernels import SketchSpec
from cropi_kernels.spec import KINDS

RECORDS = [
    {"id": f"p{i}", "prompt": f"q{i}", "prompt_ids": [5, 7 + i], "response_ids": [[8, 1], [9, 1]],
     "responses": ["a", "b"], "rewards": [1.0, 0.0]}
    for i in range(4)
]  # fmt: skip
# What is given, and the option that has no effect beside it; of others than a sketch's, what that is for.
SKETCH = [
    *(({"kind": kind, name: 128}, name) for kind in KINDS if kind != "slab" for name in ("width", "vocab_width")),
    *(({"kind": kind, "keep": 0.5}, "keep") for kind in KINDS if kind != "dropout"),
]  # fmt: skip
OTHERS: list[tuple[type[Any], dict[str, Any], str, str]] = [
    (Choosing, {"count": 3, "fraction": 0.5}, "fraction", "a choice without count"),
    (Choosing, {"count": 3, "pool": "usable"}, "pool", "fraction, or per with count"),
    (
        Choosing,
        {"count": 3, "pool": "usable", "per": "file", "quota": ("a=1",)},
        "pool",
        "fraction, or per with count",
    ),
    (Choosing, {"rrf_constant": 3.0}, "rrf_constant", "method rrf_classic"),
    (Choosing, {"draw_temperature": 2.0}, "draw_temperature", "draw soft"),
    (Choosing, {"draw_temperature": 2.0, "draw": "p_selected"}, "draw_temperature", "draw soft"),
    (Choosing, {"candidates": 2.0}, "candidates", "diversity kmeans or facility"),
    (
        Choosing,
        {"method": "random", "confidence": 0.9},
        "confidence",
        "methods that rank by scores, and method is random",
    ),
    (Comparing, {"minus_weight": 2.0}, "minus_weight", "minus"),
    (Comparing, {"aggregate": "nearest", "mean": "normalised"}, "mean", "aggregate mean"),
]


@pytest.mark.parametrize(("given", "name"), SKETCH)
def test_kinds_refuse_what_they_do_not_look_at(given: dict[str, Any], name: str) -> None:
    with pytest.raises(CropiError, match=f"{name} {given[name]} is of no use here: it is for kind"):
        Sketch(**given)
    with pytest.raises(CropiError, match=f"{name} .* is of no use here"):
        cropi.sketch("a/model/that/is/not/there", RECORDS, **given)  # before the model is looked for
    with pytest.raises(ValueError, match=f"{name}={given[name]} needs kind="):
        SketchSpec(**given)
    if name != "keep":  # what was stored is read as it is, and stays what it is
        spec = SketchSpec.from_dict(given)
        assert spec.to_dict() == SketchSpec(kind=given["kind"]).to_dict() | given
        again = (
            SketchSpec.from_dict(spec.to_dict()),
            SketchSpec.from_recipe(spec.recipe),
            pickle.loads(pickle.dumps(spec)),
        )
        assert set(again) == {spec} and {one.fingerprint() for one in again} == {spec.fingerprint()}


@pytest.mark.long
def test_what_a_kind_refuses_has_no_effect_on_it() -> None:
    """A fold changes sketches of slab, and those of no other kind: with that of the defaults and without one."""
    options: dict[str, Any] = {"dim": 512, "progress": False, "verify": False, "behaviour_check": "off"}
    model = make_model(intermediate_size=160)  # wider than the fold of the defaults
    for kind in KINDS:
        folded, plain = (
            next(iter(cropi.sketch(model, RECORDS, kind=kind, **options, **more).shards()))[1]
            for more in ({}, {"width": None, "vocab_width": None})
        )
        assert folded.equal(plain) == (kind != "slab"), kind


@pytest.mark.parametrize(("options", "given", "name", "of"), OTHERS)
def test_options_refuse_what_nothing_reads(
    options: type[Any],
    given: dict[str, Any],
    name: str,
    of: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(CropiError, match=f"^{name} .* is of no use here: it is for {of}; leave it out"):
        options(**given)
    (tmp_path / "c.yaml").write_text(
        json.dumps(
            {"model": "x", "train": ["a"], "valid": ["b"], "out": str(tmp_path / "o")}
            | {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        )
    )
    assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 2
    assert f"{name} " in (told := capsys.readouterr().err) and "is of no use here" in told


def test_what_has_an_effect_is_taken() -> None:
    for kind in KINDS:
        assert SketchSpec(kind=kind, width=None, vocab_width=None).kind == Sketch(kind=kind, width=None).kind
    assert Sketch(kind="dropout", keep=0.5).keep == 0.5 and Sketch(width=128).width == 128
    assert Choosing(count=3, pool="usable", per="file").count == 3  # the files' shares of it


@pytest.mark.long
def test_a_behaviour_model_beside_another_source_is_refused() -> None:
    with pytest.raises(CropiError, match="does not use the behaviour model"):
        cropi.sketch(make_model(), RECORDS, behaviour="current", behaviour_model=make_model(), progress=False)
    with pytest.raises(CropiError, match="trust_remote_code=True is for a model that is loaded by name"):
        cropi.Policy(make_model(), trust_remote_code=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("convert RECORDS --out OUT --id-key uid", "--id-key has no effect on trajectory records; leave it out"),
        ("convert RECORDS --out OUT --temperature 0.7", "--temperature has no effect on trajectory records"),
        ("convert RECORDS --out OUT --steps all", "--steps has no effect on trajectory records"),
        ("convert RECORDS --out OUT --max-gib 2", "--max-gib has no effect on trajectory records"),
        ("convert RECORDS --out OUT --allow-pickle", "--allow-pickle has no effect on trajectory records"),
        ("convert NEMO --out OUT --allow-pickle", "--allow-pickle has no effect on training data of NeMo-RL"),
        ("convert NEMO --out OUT --columns reward=x", "--columns has no effect on training data of NeMo-RL"),
        ("convert VERL --out OUT --columns id=x", "--columns: 'id' has no effect on rollouts of verl; leave out all"),
        ("convert NEMO --out OUT --trust-remote-code", "--trust-remote-code is for --model"),
        ("info RECORDS --model x", "--model is for --show-tokens N"),
        ("info RECORDS --chat-template none", "--chat-template is for --show-tokens N"),
        ("info RECORDS --no-eos", "--no-eos is for --show-tokens N"),
        ("info STORE --columns id=x", "--columns: STORE holds no trajectories but a store, or results; leave it out"),
        ("info STORE --skip-bad --source trl", "--source and --skip-bad: STORE holds no trajectories but a store"),
        ("info SCORES --skip-bad", "--skip-bad: SCORES holds no trajectories but a table of scores; leave it out"),
    ],
)  # fmt: skip
def test_commands_refuse_what_they_do_not_look_at(
    words: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {
        "RECORDS": write_lines(tmp_path / "r.jsonl", RECORDS),
        "NEMO": write(tmp_path / "train_data_step7.jsonl", made("nemo-rl")),
        "VERL": write(tmp_path / "7.jsonl", made("verl text")),
        "OUT": tmp_path / "out.jsonl",
        "STORE": tmp_path / "store",
        "SCORES": tmp_path / "s.parquet",
    }
    if "STORE" in words:
        paths["STORE"].mkdir()
        (paths["STORE"] / "manifest.json").write_text("{}")
    if "SCORES" in words:
        write_scores(paths["SCORES"], Scores([RowInfo("a")], ["v"], np.array([[0.5]]), {}))
    for name, path in paths.items():
        told = told.replace(name, str(path))
    try:
        code = main([str(paths.get(word, word)) for word in words.split()])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2 and told in capsys.readouterr().err and not paths["OUT"].exists()


def test_exports_refuse_what_they_do_not_look_at(tmp_path: Path) -> None:
    from cropi.data.export import check_export, export

    for work in (
        lambda **given: export(tmp_path / "o.jsonl", ["p0"], trajectories=RECORDS, **given),
        lambda **given: check_export(given.pop("format", "jsonl"), trajectories=RECORDS, **given),
    ):
        with pytest.raises(CropiError, match="id_key 'uid' names a column of a dataset; give --dataset"):
            work(id_key="uid")
        with pytest.raises(
            CropiError, match="data_source 'x' is for format verl, not for jsonl; leave it out"
        ):
            work(data_source="x")
    assert not (tmp_path / "o.jsonl").exists()
