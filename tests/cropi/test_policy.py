"""The policy: what is computed once, when it is computed again, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import sketches_of
from support.trl_runs import stored

import cropi.gradient.layout
import cropi.model.policy
import cropi_kernels.sketcher.attach.tapped
import cropi_kernels.sketcher.gradient_sketcher
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.layout import layout_of
from cropi.model.fingerprint import model_fingerprint
from cropi.model.policy import Policy
from cropi.ranking.influence import influence
from cropi.sketching.groups import sketch_groups
from cropi.sketching.job import SketchJob
from cropi.sketching.run import check_tokens, sketch
from cropi.store.memory import MemoryStore
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
SPEC = SketchSpec(dim=1024)


def test_three_stores_hash_check_and_tap_the_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(name), inner(*a, **k))[1])

    counted(cropi.model.policy, "model_fingerprint")
    counted(cropi.gradient.layout, "choose_layout")
    counted(cropi_kernels.sketcher.gradient_sketcher, "split_model")
    counted(cropi_kernels.sketcher.attach.tapped, "plan_model")
    policy = Policy(make_model(), make_tokenizer())
    for number in range(3):
        path = write_lines(tmp_path / f"{number}.jsonl", make_records(4, seed=number))
        sketch(policy, SketchJob([path], tmp_path / str(number), SPEC), progress=False)
    assert sorted(calls) == ["choose_layout", "model_fingerprint", "plan_model", "split_model"]


def test_training_in_between_is_noticed(tmp_path: Path) -> None:
    model = make_model()
    policy = Policy(model, make_tokenizer())
    first, layout = policy.fingerprint, layout_of(policy)
    assert layout_of(policy) is layout
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimiser.step()
    assert policy.fingerprint == model_fingerprint(model) != first
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1.0  # torch does not count this one
    policy.refresh()
    assert policy.fingerprint == model_fingerprint(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    assert policy.fingerprint == model_fingerprint(model)


def test_a_limit_of_less_than_one_position_is_none() -> None:
    policy = Policy(make_model())
    for limit, context in ((64, 64), (-1, None)):  # XLNet names -1
        policy.model.config.max_position_embeddings = limit
        assert policy.context == context


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 16}, 64),
    ],
    ids=["default", "dynamic", "qwen", "deepseek", "llama"],
)
def test_the_context_is_that_of_stretched_positions(rope: dict[str, Any], context: int) -> None:
    policy = Policy(make_model())
    policy.model.config.max_position_embeddings, policy.model.config.rope_parameters = 64, rope
    assert policy.context == context


def test_freezing_gives_other_taps() -> None:
    model = make_model()
    policy = Policy(model)
    whole = policy.sketcher(SPEC)
    assert policy.sketcher(SPEC) is whole and policy.sketcher(SPEC, ["*norm*"]) is not whole
    model.model.embed_tokens.requires_grad_(False)
    assert policy.sketcher(SPEC).coverage.covered < whole.coverage.covered


def test_memory_holds_what_a_folder_holds(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", make_records(8))
    policy = Policy(make_model(), make_tokenizer())
    for dtype in ("float32", "int8"):
        on_disk = tmp_path / dtype
        sketch(policy, SketchJob([path], on_disk, SPEC, store_dtype=dtype), progress=False)
        summary = sketch(policy, SketchJob([path], None, SPEC, store_dtype=dtype), progress=False)
        assert isinstance(summary.store, MemoryStore) and summary.store.expected == 8
        want, got = sketches_of(on_disk), sketches_of(summary.store)
        assert want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want)
        assert summary.store.rows() == [
            replace(a, row=b.row) for a, b in zip(SketchStore.open(on_disk).rows(), summary.store.rows())
        ]
    joined = SketchStore.join([SketchStore.open(on_disk)])
    scores = influence(joined, [summary.store])
    assert scores.usable.sum() == len(want)
    assert not list(tmp_path.glob("memory*"))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None,), {}, "model is of type NoneType: give a name"),
        (("",), {}, "model is an empty name"),
        ((3,), {}, "model is of type int"),
        ((torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)), {}, r"tokenizer is a Linear: the order is Policy"),
        ((torch.nn.Linear(1, 1), "gpt2"), {}, r"tokenizer is 'gpt2': give the tokenizer itself"),
        ((torch.nn.Linear(1, 1),), {"dtype": "bfloat16"}, r"dtype='bfloat16' is for a model that is loaded"),
        ((torch.nn.Linear(1, 1),), {"device": "cuda"}, r"device='cuda' is for a model that is loaded"),
    ],
)
def test_what_is_no_model_is_refused_at_once(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CropiError, match=message):
        Policy(*arguments, **options)


def test_models_that_are_no_policy_are_named() -> None:
    """Before a record is read."""
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    t5 = transformers.T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    refused = {
        "T5ForConditionalGeneration, an encoder-decoder": transformers.T5ForConditionalGeneration(t5),
        "LlamaModel, which has no head": transformers.LlamaModel(transformers.LlamaConfig(**sizes)),
        "LlamaForSequenceClassification, which has no head": transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**sizes)
        ),
    }
    for words, model in refused.items():
        with pytest.raises(CropiError, match=f"model is a {words}.*: give a causal language model .*batch"):
            Policy(model)
    with pytest.raises(CropiError, match="model is a Linear, which names no embedding of tokens"):
        _ = Policy(torch.nn.Linear(2, 2)).vocabulary
    with pytest.raises(CropiError, match="model is a Linear, which has no configuration"):
        _ = Policy(torch.nn.Linear(2, 2)).config


def test_a_policy_takes_nothing_beside_it() -> None:
    policy = Policy(make_model())
    assert Policy.of(policy) is policy
    with pytest.raises(CropiError, match="tokenizer is given beside a Policy"):
        Policy.of(policy, make_tokenizer())


def test_sketch_and_sketch_groups_name_what_they_were_given() -> None:
    policy, job = Policy(make_model(), make_tokenizer()), SketchJob((), None, SPEC)
    with pytest.raises(CropiError, match="policy is a LlamaForCausalLM: give cropi.Policy"):
        sketch(policy.model, job)
    with pytest.raises(CropiError, match="job is a SketchSpec"):
        sketch(policy, SPEC)  # type: ignore[arg-type]
    store = MemoryStore({"spec": SPEC.to_dict()})
    with pytest.raises(CropiError, match="groups holds a dict: give TokenGroups"):
        sketch_groups(policy, [{"id": "a"}], store, job, Behaviour("file"))  # type: ignore[list-item]
    with pytest.raises(CropiError, match="behaviour must be one of file, current, model, got 'auto'"):
        Behaviour("auto")


def test_the_old_form_of_sketch_works_for_one_more_release(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", make_records(4))
    job = SketchJob([path], tmp_path / "s", SPEC)
    with pytest.warns(DeprecationWarning, match="is now sketch"):
        summary = sketch(make_model(), make_tokenizer(), job, progress=False)  # type: ignore[arg-type]
    assert summary.sketched > 0


def test_groups_that_were_checked_for_one_policy_are_checked_again_for_another() -> None:
    """Scanned once, sketched twice: what fits one model may not fit the other."""
    tokenizer, records = make_tokenizer(), make_records(4)
    groups = read(records)
    sketch(Policy(make_model(), tokenizer), SketchJob(groups, None, SPEC), progress=False)
    short = Policy(make_model(max_position_embeddings=4), tokenizer)
    with pytest.raises(CropiError, match="more than the model's context of 4"):
        check_tokens(short, SketchJob(groups, None, SPEC), groups, groups.scan)
    with pytest.raises(CropiError, match="more than max_length 3"):
        sketch(Policy(make_model(), tokenizer), SketchJob(groups, None, SPEC, max_length=3), progress=False)


def test_a_folder_without_a_tokenizer_serves_records_of_token_ids(tmp_path: Path) -> None:
    """Their sketches have the bits of those with a tokenizer; a text, a damaged tokenizer are errors as before."""
    tokens = stored(tmp_path / "tokens.jsonl", seed=0, count=4)
    texts = write_lines(tmp_path / "texts.jsonl", make_records(4))
    for name in ("bare", "full", "damaged"):
        make_model().save_pretrained(tmp_path / name)
    make_tokenizer().save_pretrained(tmp_path / "full")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    found = []
    for name in ("bare", "full"):
        policy = Policy(tmp_path / name, progress=False)
        sketch(policy, SketchJob([tokens], tmp_path / f"of-{name}", SPEC), progress=False)
        found.append(sketches_of(tmp_path / f"of-{name}"))
        assert (policy.tokenizer is None) == (
            SketchStore.open(tmp_path / f"of-{name}").manifest["tokenizer"] is None
        )
        assert (policy.tokenizer is None) == (name == "bare")
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][i], found[1][i]) for i in found[0])
    for name, words in (
        ("bare", "its text needs a tokenizer, and there is none"),
        ("damaged", "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=words):
            sketch(
                Policy(tmp_path / name, progress=False),
                SketchJob([texts], tmp_path / "none", SPEC),
                progress=False,
            )
