"""Every public name that is used in a wrong way raises at once: the argument, its value or type, and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer

import cropi
import cropi_kernels as kernels

QUIET: dict[str, Any] = dict(progress=False, dim=1024)
T, O = torch.randn(2, 8), torch.tensor([0, 2])
OUT = torch.zeros(1, 1024)
META = torch.randn(5, 8, device="meta")


def record(name: str, rewards: Any = (1.0, 0.0)) -> dict[str, Any]:
    return {"id": name, "prompt_ids": [5, 7], "response_ids": [[8, 9, 1], [10, 1]], "rewards": list(rewards)}


TRAIN, VALID = [record(f"p{i}") for i in range(4)], [record("v")]


@functools.cache
def model() -> Any:
    return make_model()


@functools.cache
def scores() -> cropi.Scores:
    return cropi.score(model(), TRAIN, VALID, **QUIET)


@functools.cache
def store() -> cropi.SketchStore:
    return cropi.sketch(model(), TRAIN, **QUIET)


def batch(**changes: Any) -> Any:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8]])
    mask = torch.tensor([[0, 0, 1, 1]] * 2)
    given = dict(response_mask=mask, prompt_ids=["a", "a"], advantages=torch.tensor([1.0, -1.0]))
    return cropi.score_batch(model(), changes.pop("input_ids", ids), **{**given, **changes})


def tapped(call: Callable[[Any], Any]) -> Any:
    with kernels.GradientSketcher(model(), kernels.SketchSpec(1024)) as sketcher:
        return call(sketcher)


def plan() -> Any:
    return kernels.plan_matrix(kernels.SketchSpec(1024), "w", 8, 8, role="linear")


ROWS = torch.tensor([[5, 6, 7]])
PASS: dict[str, Any] = dict(
    segments=torch.tensor([0]), positions=torch.tensor([1]), targets=torch.tensor([7])
)
CSR = kernels.ProjectionSpec(64)

# name of the public name, and what is wrong: the call, and what its message names
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "score: order": (lambda: cropi.score(TRAIN, model(), VALID, **QUIET), "model is of type list: give a name"),
    "score: a tokenizer for the model": (lambda: cropi.score(make_tokenizer(), TRAIN, VALID), "model is of type"),
    "score: no training prompts": (lambda: cropi.score(model(), [], VALID, **QUIET), "train is empty; give"),
    "score: None": (lambda: cropi.score(model(), None, VALID, **QUIET), "train is None: give trajectories"),
    "score: a set of None": (lambda: cropi.score(model(), TRAIN, {"x": None}), r"valid\['x'\] is None: give traj"),
    "sketch: None": (lambda: cropi.sketch(model(), None), "trajectories is None: give trajectories"),
    "check: another name of n": (lambda: cropi.check(model(), TRAIN, prompts=4), "'prompts' is .* did you mean 'n'"),
    "score: no validation prompts": (lambda: cropi.score(model(), TRAIN, [], **QUIET), "valid is empty; give"),
    "score: no validation set": (lambda: cropi.score(model(), TRAIN, {}, **QUIET), r"valid has the keys \[\]: give"),
    "score: validation without a gradient": (
        lambda: cropi.score(model(), TRAIN, [record("v", (1.0, 1.0))], **QUIET),
        "validation set 'valid' usefully: none of its 1 prompts has a gradient",
    ),
    "score: training without a gradient": (
        lambda: cropi.score(model(), [record("p", (1.0, 1.0))], VALID, **QUIET), "nothing to select: none of the 1",
    ),
    "score: one record": (lambda: cropi.score(model(), TRAIN, VALID[0], **QUIET), "valid is one record: give a list"),
    "score: a set without a record": (
        lambda: cropi.score(model(), TRAIN, {"sums": VALID, "more": []}, **QUIET), r"valid\['more'\] is empty; give",
    ),
    "score: a bad record of a set": (
        lambda: cropi.score(model(), TRAIN, {"sums": VALID, "more": [{"id": "p"}]}, **QUIET), r"valid\['more'\]\[0\]",
    ),
    "score: one training record": (
        lambda: cropi.score(model(), TRAIN[0], VALID), "train is one dictionary; give a list",
    ),
    "score: read once": (
        lambda: cropi.score(model(), iter(TRAIN), VALID, **QUIET), "train is a list_iterator.* can be read once",
    ),
    "score: tokenizer second": (
        lambda: cropi.score(model(), make_tokenizer(), TRAIN, VALID), "tokenizer is a list: give a Hugging Face",
    ),
    "score: tokenizer for train": (
        lambda: cropi.score(model(), make_tokenizer(), VALID), "train must be a path, a list",
    ),
    "score: a tensor": (lambda: cropi.score(model(), T, VALID), "train must be a path, a list"),
    "score: numbers": (lambda: cropi.score(model(), [1, 2], VALID), r"train\[0\]: a record is a dictionary"),
    "score: text": (
        lambda: cropi.score(model(), make_records(8), VALID), r"train\[\d+\].*its text needs a tokenizer",
    ),
    "score: sets by number": (lambda: cropi.score(model(), TRAIN, {1: VALID}), r"valid has the keys \[1\]: give"),
    "score: an empty set": (lambda: cropi.score(model(), TRAIN, {"x": []}), "valid is empty"),
    "score: an option": (lambda: cropi.score(model(), TRAIN, VALID, dims=3), "'dims' is not an option.*'dim'"),
    "score: a share, misspelt": (lambda: cropi.score(model(), TRAIN, VALID, fractoin=0.2), "mean 'fraction'"),
    "score: a parameter, misspelt": (lambda: cropi.score(model(), TRAIN, VALID, nosie=True), "mean 'noise'"),
    "score: what a parameter collects": (
        lambda: cropi.score(model(), TRAIN, VALID, options={}), "^'options' is not an option; known are",
    ),
    "check: a parameter, misspelt": (lambda: cropi.check(model(), TRAIN, exakt=True), "mean 'exact'"),
    # 'source' shares four of its letters, and was offered.
    "score: an option that none is near to": (
        lambda: cropi.score(model(), TRAIN, VALID, scores="s"), "^'scores' is not an option; known are",
    ),
    "score: an option of select": (lambda: cropi.score(model(), TRAIN, VALID, dedup=0.9), "'dedup' is not an option"),
    "score: fraction": (lambda: cropi.score(model(), TRAIN, VALID, fraction=1.5), "fraction must be"),
    "score: metric": (lambda: cropi.score(model(), TRAIN, VALID, metric="cos"), "metric must be one of cosine, dot"),
    "score: a type": (
        lambda: cropi.score(model(), TRAIN, VALID, tokens_per_batch="many"),
        "tokens_per_batch must be an integer or None, got",
    ),
    "score: dim": (lambda: cropi.score(model(), TRAIN, VALID, dim=1000), "dim"),
    "score: dtype": (lambda: cropi.score("m", TRAIN, VALID, dtype="int4"), "dtype must be one of auto, float"),
    "score: behaviour model": (
        lambda: cropi.score(model(), TRAIN, VALID, estimator="reinforce", behaviour_model=make_model(), **QUIET),
        "the estimator 'reinforce' has no ratio",
    ),
    "score: dtype of torch": (
        lambda: cropi.score("m", TRAIN, VALID, dtype=torch.float16), "auto, float32, .*, got torch.float16",
    ),
    "score: noise": (lambda: cropi.score(model(), TRAIN, VALID, noise="no"), "noise must be True or False, got 'no'"),  # type: ignore[arg-type]
    "score: columns": (
        lambda: cropi.score(model(), TRAIN, VALID, columns={"prompt": "a,b"}), "columns: 'a,b' holds ','",
    ),
    "score: progress": (lambda: cropi.score(model(), TRAIN, VALID, progress="no"), "progress must be True or False"),
    "score: device": (lambda: cropi.score(model(), TRAIN, VALID, device="cpu"), "device='cpu' is for a model that"),
    "score: too long": (
        lambda: cropi.score(model(), TRAIN, VALID, max_length=3, **QUIET),
        r"--max-length or --too-long skip .*\(in Python max_length=, too_long=\)",
    ),
    "sketch: bad record": (
        lambda: cropi.sketch(model(), [record("a", ("1", 2.0))], **QUIET), r"--skip-bad \(in Python skip_bad=True\)$",
    ),
    "sketch: out": (lambda: cropi.sketch(model(), TRAIN, out=3), "out"),  # type: ignore[arg-type]
    "sketch: a number": (lambda: cropi.sketch(model(), 3, **QUIET), "int"),
    "sketch: a token id": (
        lambda: cropi.sketch(model(), [{**record("a"), "prompt_ids": [10**6]}], **QUIET), "token id 1000000 is beyond",
    ),
    "score: no gradient": (
        lambda: cropi.score(model(), TRAIN, [record("v") | {"response_ids": [[8, 1]], "rewards": [1.0]}], **QUIET),
        r"with --columns id=, and .* takes others\); .* or leave the set out \(in Python columns= for --columns\)$",
    ),
    "influence: paths": (lambda: cropi.influence("a", "b"), "train is a str: give a SketchStore"),  # type: ignore[arg-type]
    "influence: none": (lambda: cropi.influence(store(), []), "valid is empty: give a SketchStore"),
    "influence: a path": (lambda: cropi.influence(store(), "valid"), "valid is a str: give a SketchStore"),
    "influence: a store by name": (
        lambda: cropi.influence(store(), {"a": store()}), r"valid\['a'\] is a SketchStore.* in a list",
    ),
    "influence: max_valid": (lambda: cropi.influence(store(), store(), max_valid=0), "max_valid must be at least 1"),
    "influence: an option": (lambda: cropi.influence(store(), store(), metrik="dot"), "did you mean 'metric'"),
    "influence: integers": (lambda: cropi.influence(ROWS, torch.ones(1, 3)), "train is torch.int64"),
    "influence: one row": (lambda: cropi.influence(np.ones((2, 4)), np.ones(4)), r"valid is .*\[4\]: give floats"),
    "influence: objects": (lambda: cropi.influence(np.array([[None]]), store()), r"train is object \[1, 1\]: give f"),
    "influence: one number": (lambda: cropi.influence(torch.tensor(1.0), store()), r"train is torch.float32 \[\]"),
    "influence: sparse": (lambda: cropi.influence(torch.eye(2).to_sparse(), store()), r"\[2, 2\], sparse: give f"),
    "influence: zeros": (
        lambda: cropi.influence(torch.zeros(2, 2), torch.eye(2)),
        r"train: no training prompt .*: 2 were left out \(zero gradient\); give others, finite and not zero$",
    ),
    "influence: zeros of a set": (
        lambda: cropi.influence(torch.eye(2), {"a": torch.zeros(2, 2)}), "give others, finite and not zero, or leave",
    ),
    "neighbours: zeros": (lambda: cropi.neighbours(torch.zeros(2, 2), torch.eye(2)), "train: no training prompt has"),
    "influence: a set's name": (lambda: cropi.influence(store(), {1: torch.eye(2)}), "valid names a set 1: give"),
    "influence: other specs": (
        lambda: cropi.influence(store(), cropi.sketch(model(), VALID, dim=2048, progress=False)), "dim = 1024",
    ),
    "select: a list": (lambda: cropi.select([1.0]), "scores is a list: give the Scores"),  # type: ignore[arg-type]
    "select: text": (lambda: cropi.select(scores(), "0.5"), "fraction must be a finite number, got '0.5'"),  # type: ignore[arg-type]
    "select: percent": (lambda: cropi.select(scores(), 20), r"fraction must be in \(0, 1\], got 20; 20 % is 0.2"),
    "select: method": (lambda: cropi.select(scores(), 1.0, method="best"), "method must be one of rrf"),
    "select: no method": (lambda: cropi.select(scores(), 1.0, method=None), "method must be one of rrf.*, got None"),
    "select: nothing": (lambda: cropi.select(scores(), 0.01), "fraction 0.01 of a pool of 4 prompts chooses none"),
    "neighbours: paths": (lambda: cropi.neighbours("a", "b"), "train is a str"),  # type: ignore[arg-type]
    "neighbours: none": (lambda: cropi.neighbours(store(), []), "valid is empty"),
    "neighbours: k": (lambda: cropi.neighbours(store(), store(), 2.5), "k must be an integer"),  # type: ignore[arg-type]
    "neighbours: ids": (lambda: cropi.neighbours(store(), store(), ids="p1"), r"for one, write \['p1'\]"),
    "write_report: scores": (lambda: cropi.write_report(scores()), "chosen is a Scores: give a Selection"),  # type: ignore[arg-type]
    "write_report: a pdf": (
        lambda: cropi.write_report(scores().select(0.5), "page.pdf"), "page.pdf: what is written is no .pdf; .*html",
    ),
    "write_report: records": (
        lambda: cropi.write_report(scores().select(0.5), train=VALID[:1]), "selected prompts are not in",
    ),
    "write_report: check": (lambda: cropi.write_report(scores().select(0.5), check={}), "check is a dict"),  # type: ignore[arg-type]
    "score_batch: lists": (lambda: batch(input_ids=[[5, 6]]), "input_ids is of type list: give a tensor"),
    "score_batch: no rows": (lambda: batch(input_ids=torch.zeros(0, 4, dtype=torch.int64)), "input_ids is torch.int64"),
    "score_batch: device": (lambda: batch(advantages=torch.ones(2, device="meta")), "advantages is on meta"),
    "score_batch: both": (lambda: batch(weights=torch.ones(2)), "advantages and weights are given"),
    "score_batch: one row": (
        lambda: batch(advantages=None, rewards=torch.ones(2), prompt_ids=["a", "b"]), "a prompt has one row alone",
    ),
    "check: few": (lambda: cropi.check(model(), TRAIN[:2], **QUIET), "holds 2 prompts with a gradient"),
    "check: n as text": (lambda: cropi.check(model(), TRAIN, n="8", **QUIET), "n must be an integer, got '8'"),
    "check: n": (lambda: cropi.check(model(), TRAIN, n=1, **QUIET), "n must be at least 4, got 1"),
    "Policy: nothing": (lambda: cropi.Policy(None), "model is of type NoneType"),  # type: ignore[arg-type]
    "Policy: meta": (
        lambda: cropi.Policy(torch.nn.Linear(2, 2, device="meta")),
        "model: parameters of Linear are on the meta device",
    ),
    "Policy: order": (lambda: cropi.Policy(model(), model()), "the order is Policy"),
    "Scores: table": (lambda: cropi.Scores([], ["v"], [[1.0]], {}), "table is a list"),  # type: ignore[arg-type]
    "Scores: save as csv": (lambda: scores().save("table.csv"), "table.csv: what is written is no .csv; .*parquet"),
    "Scores: rows": (lambda: cropi.Scores(3, ["v"], T.numpy(), {}), "rows is of type int"),  # type: ignore[arg-type]
    "Scores: set": (lambda: scores().top("math", 5), "set is 'math': give one of 'valid'"),
    "Scores: n for the set": (lambda: scores().top(3), "set is 3: give one of 'valid'; n=3 is how many"),  # type: ignore[arg-type]
    "Scores: n": (lambda: scores().top(n=-1), "n must be an integer of at least 1, got -1"),
    "Scores: path": (lambda: cropi.Scores.open(3), "path is of type int: give a scores.parquet"),  # type: ignore[arg-type]
    "Scores: save": (lambda: scores().save(None), "path is of type NoneType: give a file that ends in .parquet"),  # type: ignore[arg-type]
    "Selection: save": (lambda: scores().select(0.5).save(3), "path is of type int: give a file, or a folder for"),  # type: ignore[arg-type]
    "Selection: save empty": (lambda: scores().select(0.5).save(""), "path is empty: give a file"),
    "write_report: path": (lambda: cropi.write_report(scores().select(0.5), b"a"), "path is of type bytes: give"),  # type: ignore[arg-type]
    "rollout: an option of loading, misspelt": (
        lambda: cropi.rollout("m", TRAIN, "exact", "x.jsonl", dtpye="auto"), "mean 'dtype'",
    ),
    "rollout: out": (
        lambda: cropi.rollout(model(), TRAIN, "exact", None),  # type: ignore[arg-type]
        "out is of type NoneType: give a file",
    ),
    "SketchStore: create": (lambda: cropi.SketchStore.create(None, {}), "path is of type NoneType: give the folder"),  # type: ignore[arg-type]
    "Scores: folder": (lambda: scores().plot("nowhere/at/all/x.png"), "fraction 0.1|nowhere"),
    "SketchStore: path": (lambda: cropi.SketchStore.open(3), "path is of type int"),  # type: ignore[arg-type]
    "SketchStore: none there": (lambda: cropi.SketchStore.open("nowhere"), "nowhere: there is no sketch store"),
    "SketchStore: join": (lambda: cropi.SketchStore.join(["a"]), r"stores is \['a'\]"),  # type: ignore[list-item]
    "SketchStore: join one": (lambda: cropi.SketchStore.join(store()), "stores is .*give a list"),  # type: ignore[arg-type]
    "Estimator: name": (lambda: cropi.Estimator(3), "name must be a name"),  # type: ignore[arg-type]
    "Estimator: clip": (lambda: cropi.Estimator("mine", clip_low=0.2), "clip_low=0.2"),
    "make_estimator: name": (lambda: cropi.make_estimator("gppo"), "got 'gppo'"),
    "make_estimator: field": (lambda: cropi.make_estimator("ppo", clip=0.1), "clip=0.1 is not a field.*clip_low"),
    "Selector: a text": (lambda: cropi.Selector("abc"), "ids is 'abc'"),
    "Selector: ids": (lambda: cropi.Selector(3), "ids is 3"),  # type: ignore[arg-type]
    "LiveSketcher: model": (lambda: kernels.LiveSketcher("m"), "model is of type str"),  # type: ignore[arg-type]
    "SketchSpec: dim": (lambda: kernels.SketchSpec("1024"), "dim='1024': give a power of two"),  # type: ignore[arg-type]
    "SketchSpec: kind": (lambda: kernels.SketchSpec(kind="slabs"), "kind='slabs': choose one of slab"),  # type: ignore[arg-type]
    "GradientSketcher: model": (lambda: kernels.GradientSketcher("m"), "give a torch.nn.Module"),  # type: ignore[arg-type]
    "GradientSketcher: order": (
        lambda: kernels.GradientSketcher(kernels.SketchSpec(), model()), "model is of type SketchSpec",  # type: ignore[arg-type]
    ),
    "GradientSketcher: exclude": (lambda: kernels.GradientSketcher(model(), exclude=[3]), r"exclude=\[3\]"),  # type: ignore[list-item]
    "GradientSketcher: outside": (
        lambda: kernels.GradientSketcher(model()).policy_gradient(ROWS, weigh=lambda *_: T, **PASS),
        "outside the `with",
    ),
    "GradientSketcher: ids": (
        lambda: tapped(lambda s: s.policy_gradient([[5]], weigh=lambda *_: T, **PASS)), "input_ids is of type list",
    ),
    "GradientSketcher: weights": (
        lambda: tapped(lambda s: s.policy_gradient(ROWS, weights="a", **PASS)), "weights",
    ),
    "GradientSketcher: segments": (
        lambda: tapped(lambda s: s.batch([0, 0]).__enter__()), "segments is of type list",
    ),
    "token_logprobs: ids": (
        lambda: kernels.token_logprobs(model(), [[5]], positions=O, targets=O), "input_ids is of type list",  # type: ignore[arg-type]
    ),
    "ProjectionSpec: dim": (lambda: kernels.ProjectionSpec("64"), "dim='64': give an integer"),  # type: ignore[arg-type]
    "project: order": (lambda: kernels.project(CSR, T), "spec is of type Tensor"),  # type: ignore[call-overload]
    "project: a list": (lambda: kernels.project([1.0], CSR), "x is of type list: give a torch.Tensor"),  # type: ignore[call-overload]
    "project: one row": (lambda: kernels.project(T[0], CSR), r"x\[None\] for one row"),
    "project_transpose: a list": (lambda: kernels.project_transpose([1.0], CSR, 8), "y is of type list"),  # type: ignore[arg-type]
    "project_csr: dense": (lambda: kernels.project_csr(T, CSR), "is of type Tensor: give a CsrRows"),  # type: ignore[arg-type]
    "project_csr_sparse: dense": (lambda: kernels.project_csr_sparse(T, CSR), "give a CsrRows"),  # type: ignore[arg-type]
    "explain: nothing": (lambda: kernels.explain(None), r"explain\(None\)"),
    "canonical_name: a number": (lambda: kernels.canonical_name(3), "name is of type int"),  # type: ignore[arg-type]
    "plan_matrix: spec": (lambda: kernels.plan_matrix(3, "w", 8, 8, role="linear"), "spec is of type int"),  # type: ignore[arg-type]
    "plan_vector: size": (lambda: kernels.plan_vector(kernels.SketchSpec(1024), "w", "8"), "size=8 of 'w'"),  # type: ignore[arg-type]
    "fold_inputs: a list": (lambda: kernels.fold_inputs([1.0], plan()), "is of type list: give a torch.Tensor"),  # type: ignore[arg-type]
    "fold_outputs: a list": (lambda: kernels.fold_outputs([1.0], plan()), "is of type list: give a torch.Tensor"),  # type: ignore[arg-type]
    "sketch_linear: plan": (lambda: kernels.sketch_linear(T, T, O, 3, OUT), "plan is of type int"),  # type: ignore[arg-type]
    "sketch_grouped: a list": (lambda: kernels.sketch_grouped([1.0], T, O, plan(), OUT), "give a torch.Tensor"),  # type: ignore[arg-type]
    "sketch_embedding: a list": (lambda: kernels.sketch_embedding([1.0], O, O, plan(), OUT), "give a torch.Tensor"),  # type: ignore[arg-type]
    "sketch_vector: a list": (lambda: kernels.sketch_vector([1.0], plan(), OUT), "is of type"),  # type: ignore[arg-type]
    "bias_grad: offsets": (lambda: kernels.bias_grad(T, [0, 2]), "offsets is of type list"),  # type: ignore[arg-type]
    "norm_grad: a list": (lambda: kernels.norm_grad([1.0], T, O, eps=1e-6, centered=False), "is of type list"),  # type: ignore[arg-type]
    "rms_norm: a list": (lambda: kernels.rms_norm([1.0], T[0], 1e-6), "x is of type list"),  # type: ignore[arg-type]
    "rms_norm_backward: a list": (lambda: kernels.rms_norm_backward(T, T, T[0], [1.0]), "scale is of type list"),  # type: ignore[arg-type]
    "swiglu: a list": (lambda: kernels.swiglu([1.0], T), "gate is of type list"),  # type: ignore[arg-type]
    "swiglu_backward: a list": (lambda: kernels.swiglu_backward(T, T, [1.0]), "up is of type list"),  # type: ignore[arg-type]
    "linear_logprob: a list": (lambda: kernels.linear_logprob([1.0], T, O), "hidden is of type list"),  # type: ignore[call-overload]
    "linear_logprob: device": (lambda: kernels.linear_logprob(T, META, O), "on meta"),
    "logprob_and_grad: weights": (
        lambda: kernels.logprob_and_grad(T, torch.randn(5, 8), O, torch.ones(2)), "is of type Tensor: give a function",  # type: ignore[arg-type]
    ),
    "reduce_sketch: a list": (lambda: kernels.reduce_sketch([1.0], 64), "is of type list"),  # type: ignore[arg-type]
    "quantize_rows: a list": (lambda: kernels.quantize_rows([1.0], torch.int8), "is of type list"),  # type: ignore[arg-type]
    "row_products: a list": (lambda: kernels.row_products([1.0], T), "is of type list"),  # type: ignore[arg-type]
}  # fmt: skip
# What is returned or raised and not called by users; `projection_of` has tests of its own arguments.
GIVEN = {
    "BatchSketch", "CheckReport", "CoupledLossError", "Coverage", "CropiError", "CsrRows", "LiveSketch", "MatrixPlan",
    "PolicyGradient", "QuantizedRows", "RecordError", "RolloutReport", "SketchedBatch",
    "UncoveredParameterError", "VectorPlan", "__version__", "projection_of",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_misuse_is_an_error_that_says_what_to_do(case: str) -> None:
    call, words = CASES[case]
    kinds = RuntimeError if "outside" in case else ValueError
    with pytest.raises(kinds, match=words):
        call()


def test_every_public_name_is_misused() -> None:
    tried = {case.split(":")[0] for case in CASES}
    assert tried.isdisjoint(GIVEN)
    assert tried | GIVEN == {*cropi.__all__, *kernels.__all__}
