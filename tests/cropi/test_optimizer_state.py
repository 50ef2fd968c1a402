"""Influence under an optimiser: validation gradients divided by the roots of its second moments, held to autograd."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.oracle import gradients_of, objective
from support.stores import sketches_of

import cropi
from cropi.errors import CropiError
from cropi.model.moments import SecondMoments, UnknownOrder, read_moments
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec, canonical_name
from cropi_kernels.sketcher.formed import FormedSketcher
from cropi_kernels.testing import sketch_gradients

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
SPEC = SketchSpec(dim=4096)


def trained(optimizer: str = "AdamW", steps: int = 3, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A small model and its optimiser after some steps."""
    model = make_model()
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3, **options)
    torch.manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(5, 60, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        made.step()
        made.zero_grad()
    return model, made


def expected(model: Any, scale: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """Every prompt's scaled gradient in float64, one response at a time, sketched coordinate by coordinate."""
    from cropi.data.records import make_group
    from cropi.sketching.job import make_tokenize

    wide = copy.deepcopy(model).double()
    tokens = make_tokenize(Policy(model, make_tokenizer()), SketchJob((), None))
    found = {}
    for number, record in enumerate(make_records(8)):
        group = make_group(record, f"x:{number}")
        if len(set(group.rewards)) == 1:
            continue
        made = tokens(group)
        of_tokens = {"prompt_ids": made.prompt, "response_ids": made.responses, "rewards": group.rewards}
        gradients = gradients_of(wide, objective(wide, of_tokens))
        if scale is not None:
            gradients = {name: gradient * scale[name] for name, gradient in gradients.items()}
        found[group.id] = sketch_gradients(wide, gradients, SPEC)
    return found


def adam_scale(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    scale = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        corrected = state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"]))
        # Rows of tokens that were not trained on take no step.
        scale[canonical_name(name)] = (corrected > 0) / (corrected.sqrt() + 1e-8)
    return scale


def groups_of(model: Any) -> list[dict[str, Any]]:
    """The groups of an optimiser that differ in all that D depends on."""
    parameters = list(model.parameters())
    return [
        {"params": parameters[:5], "lr": 4e-3, "eps": 1e-3},
        {"params": parameters[5:12], "betas": (0.9, 0.9)},
        {"params": parameters[12:], "lr": 5e-4},
    ]


def run(model: Any, tmp_path: Path, **options: Any) -> dict[str, torch.Tensor]:
    tmp_path.mkdir(exist_ok=True)
    path = write_lines(tmp_path / "records.jsonl", make_records(8))
    job = SketchJob([path], tmp_path / "out", spec=SPEC, **options)
    sketch(Policy(model, make_tokenizer()), job, progress=False)
    return sketches_of(tmp_path / "out")


def close(made: dict[str, torch.Tensor], right: dict[str, torch.Tensor], bound: float) -> None:
    assert made.keys() == right.keys() and len(made) > 3
    for name, vector in made.items():
        error = float((vector.double() - right[name]).norm() / right[name].norm())
        assert error < bound, (name, error)


def test_sketches_are_those_of_scaled_gradients(tmp_path: Path) -> None:
    model, optimizer = trained()
    scaled = run(model, tmp_path, optimizer_state=optimizer)
    close(scaled, expected(model, adam_scale(model, optimizer)), 2e-4)
    manifest = SketchStore.open(tmp_path / "out").manifest["preconditioner"]
    assert manifest["kind"] == "adam" and manifest["eps"] == 1e-8


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_without_a_change_both_sketchers_agree(name: str) -> None:
    """The same map: what autograd forms and what the taps add up, over several prompts, padded rows and one segment
    without a token."""
    from support.zoo import make

    from cropi_kernels import GradientSketcher

    model = make(name).eval()
    torch.manual_seed(2)
    ids = torch.randint(5, 90, (4, 9))
    arguments: dict[str, Any] = {
        "segments": torch.tensor([0, 0, 1, 3]), "num_segments": 4, "temperature": 0.7,
        "positions": torch.tensor([2, 3, 4, 11, 13, 20, 21, 30, 33]),
        "targets": torch.randint(5, 90, (9,)), "weigh": lambda logprobs, start, stop: 1e-3 * logprobs.exp() - 0.5,
    }  # fmt: skip
    with GradientSketcher(model, SPEC) as sketcher:
        taps = sketcher.policy_gradient(ids, **arguments)
    state = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    with FormedSketcher(model, SPEC) as formed:
        made = formed.policy_gradient(ids, **arguments)
        with torch.inference_mode():  # where rollouts are made
            made_there = ids.clone()
        with torch.device("meta"):  # the default device is the caller's
            again = formed.policy_gradient(made_there, **arguments)
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == state
    assert torch.equal(made.sketches, again.sketches) and not made.sketches[2].any()
    torch.testing.assert_close(made.logprobs, taps.logprobs, rtol=1e-4, atol=1e-5)
    for a, b in zip(made.sketches, taps.sketches):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-12


def test_every_form_of_a_checkpoint_is_the_same(tmp_path: Path) -> None:
    model, optimizer = trained()
    right = read_moments(optimizer, model)
    names = {id(p): n for n, p in model.named_parameters()}
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    flat = {
        f"{names[id(p)]}.{key}": value if value.ndim else value.reshape(1)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    from safetensors.torch import save_file

    save_file({k: v for k, v in flat.items() if k.endswith("exp_avg_sq")}, tmp_path / "o.safetensors")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    held = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": held}, checkpoint_id=tmp_path / "dcp")
    for source in (tmp_path / "optimizer.pt", tmp_path, str(tmp_path / "optimizer.pt"), tmp_path / "dcp"):
        found = read_moments(source, model)
        assert found.fingerprint() == right.fingerprint(), source
    late = read_moments(tmp_path / "o.safetensors", model)
    assert late.whole.keys() == right.whole.keys() and set(late.correction.values()) == {1.0}


def test_the_order_of_hugging_faces_trainer_is_known(tmp_path: Path) -> None:
    """Two groups, weights that decay first: the numbers of the parameters are not those of the model's order."""
    model, _ = trained(steps=1)
    kept = [p for n, p in model.named_parameters() if "norm" not in n and "bias" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
    optimizer = torch.optim.AdamW(
        [{"params": kept, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    )
    ids = torch.randint(5, 60, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = read_moments(tmp_path, model)
    for name, p in model.named_parameters():
        assert torch.equal(found.whole[canonical_name(name)], optimizer.state[p]["exp_avg_sq"])


def test_numbered_groups_in_an_order_of_their_own_are_told_and_named_ones_are_known(tmp_path: Path) -> None:
    """As for learning rates by layer, the last one first: all layers have the same shapes."""
    model, _ = trained(steps=1)
    named = list(model.named_parameters())
    layers = [[pair for pair in named if f"layers.{i}." in pair[0]] for i in (1, 0)]
    others = [pair for pair in named if "layers." not in pair[0]]
    groups = [others[:1], *layers, others[1:]]
    for own in (groups, [[p for _, p in group] for group in groups]):
        if own is groups and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
            continue  # which takes no names
        optimizer = torch.optim.AdamW([{"params": group} for group in own])
        ids = torch.randint(5, 60, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        if own is not groups:
            with pytest.warns(
                UnknownOrder, match="in 4 groups and names none; the model's own order is taken"
            ):
                read_moments(tmp_path, model)
        else:
            found = read_moments(tmp_path, model)
            for name, p in named:
                assert torch.equal(found.whole[canonical_name(name)], optimizer.state[p]["exp_avg_sq"])


@pytest.mark.filterwarnings("ignore::cropi.model.moments.UnknownOrder")
@pytest.mark.parametrize("amsgrad", [False, True])
def test_groups_of_parameters_are_scaled_as_the_step_scales_them(amsgrad: bool, tmp_path: Path) -> None:
    """Against the next step itself, without its first moment: from every form of a checkpoint that names groups."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model = make_model()
    optimizer = torch.optim.Adam(groups_of(model), lr=1e-3, amsgrad=amsgrad)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 3 else 0.0)
    torch.manual_seed(1)
    for scale in (1.0, 30.0, 0.1):  # so that the largest moment is not the last one
        ids = torch.randint(5, 60, (2, 12))
        (scale * model(input_ids=ids, labels=ids).loss).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        for held in optimizer.state.values():
            held["exp_avg"].zero_()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    state = {"optimizer": optimizer.state_dict()}
    torch.save(state["optimizer"], tmp_path / "optimizer.pt")
    torch.save({"model": model.state_dict(), **state}, tmp_path / "beside.pt")
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        held = get_optimizer_state_dict(model, optimizer, options=options)
        dcp.save({"optimizer": held}, checkpoint_id=tmp_path / f"dcp{flat}")
    right = read_moments(optimizer, model)
    for source in ("optimizer.pt", "beside.pt", "dcpFalse", "dcpTrue"):
        assert read_moments(tmp_path / source, model).fingerprint() == right.fingerprint()
    # With a first moment of zero a step is eta (1 - beta_1) / (1 - beta_1^3) D g, eta the largest rate.
    eta = 4e-3 * (1 - 0.9) / (1 - 0.9**3)
    for name, p in model.named_parameters():
        step = (before[name].double() - p.detach().double()) / eta
        mine = right.scaled(canonical_name(name), gradients[name].double())
        # The weights are float32: a step is off by the rounding of the weight.
        bound = 2 * torch.finfo(torch.float32).eps * float(before[name].abs().max()) / eta
        assert float((step - mine).abs().max()) <= bound + 1e-4 * float(mine.abs().max()), name
    model_of, plain = trained()
    assert read_moments(plain, model_of).fingerprint()["moments"] != right.fingerprint()["moments"]


@pytest.mark.parametrize("kind", ["torch", "transformers"])
def test_adafactor_is_its_own_update(kind: str, tmp_path: Path) -> None:
    """Against the step that each implementation makes of a new gradient, up to one factor for the whole parameter (the
    clipping of the update by its root mean square)."""
    model = make_model()
    if kind == "torch":
        optimizer: Any = torch.optim.Adafactor(model.parameters(), lr=1e-2, d=1e30)
    else:
        from transformers.optimization import Adafactor

        optimizer = Adafactor(model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (2, 12))
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moments = read_moments(optimizer, model)
    assert moments.kind == "adafactor"
    for name, p in model.named_parameters():
        step = (before[name] - p.detach()).double().flatten()
        mine = moments.scaled(canonical_name(name), p.grad.float()).double().flatten()
        some = p.grad.flatten().abs() > 1e-6
        cosine = torch.nn.functional.cosine_similarity(step[some], mine[some], dim=0)
        assert float(cosine) > 0.999, (name, float(cosine))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = read_moments(tmp_path / "optimizer.pt", model)
    assert again.fingerprint()["moments"] == moments.fingerprint()["moments"]


@pytest.mark.parametrize("kind", ["Adam", "Adafactor", "transformers"])
def test_what_has_never_had_a_gradient_takes_no_step(kind: str) -> None:
    """1 / eps for the rows of tokens that were not trained on would be all of a gradient that has one of them."""
    model = make_model(tie_word_embeddings=False)
    if kind == "transformers":
        from transformers.optimization import Adafactor

        optimizer: Any = Adafactor(model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)
    else:
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    torch.manual_seed(1)
    for _ in range(3):
        ids = torch.cat([torch.arange(5, 60)[None], torch.randint(5, 60, (1, 55))])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ids[0, 3] = 70  # this one comes once
    moments = read_moments(optimizer, model)
    model(input_ids=ids, labels=ids).loss.backward()
    own = model.model.embed_tokens.weight
    step = moments.scaled("model.embed_tokens.weight", own.grad)
    assert float(own.grad[70].norm()) > 0 and float(step[70].abs().max()) == 0
    others = own.grad.norm(dim=1) > 0
    others[70] = False
    assert others.sum() > 50 and bool((step[others].norm(dim=1) > 0).all())
    assert float(step.abs().max()) < 1e3 * float(step[others].abs().mean())


def test_torchs_adafactor_bounds_what_it_takes_the_root_of() -> None:
    """Gradients of large models are far below its eps_1; against the step that it makes, up to one factor."""
    model = make_model()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2, d=1e30)
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (2, 12))
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        (1e-5 * model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()
    moments = read_moments(optimizer, model)
    for name, p in model.named_parameters():
        step = (before[name] - p.detach()).double().flatten()
        mine = moments.scaled(canonical_name(name), p.grad.float()).double().flatten()
        assert float(torch.nn.functional.cosine_similarity(step, mine, dim=0)) > 0.999, name


@pytest.mark.long
def test_scores_are_dot_products_with_the_step(tmp_path: Path) -> None:
    """<g(s), D g(v)> = <D g(s), g(v)>: the effect of a step of Adam along a training prompt's gradient."""
    model, optimizer = trained()
    records = make_records(8)
    options: dict[str, Any] = {"dim": 4096, "metric": "dot", "progress": False, "draws": 0}
    scores = cropi.score(model, records, records, make_tokenizer(), optimizer_state=optimizer, **options)
    plain, scaled = expected(model, None), expected(model, adam_scale(model, optimizer))
    mean = torch.stack(list(scaled.values())).mean(dim=0)
    for row, value in zip(scores.rows, scores.table[:, 0]):
        if row.id in plain:
            right = float(plain[row.id] @ mean)
            assert abs(value - right) < 1e-4 * float(plain[row.id].norm() * mean.norm())


def test_the_training_side_is_never_scaled(tmp_path: Path) -> None:
    model, optimizer = trained()
    policy, records = Policy(model, make_tokenizer()), make_records(8)
    options: dict[str, Any] = {"dim": 1024, "progress": False}
    scaled = cropi.sketch(policy, records, optimizer_state=optimizer, **options)
    plain = cropi.sketch(policy, records, **options)
    assert cropi.influence(plain, scaled, draws=0)
    with pytest.raises(CropiError, match="holds gradients that are scaled by an optimiser's moments"):
        cropi.influence(scaled, plain)
    with pytest.raises(CropiError, match="cannot be used together: preconditioner"):
        cropi.influence(plain, [scaled, plain])
    with pytest.raises(CropiError, match="were made with different --optimizer-state"):
        SketchStore.join([plain, scaled])


def test_states_that_do_not_fit_name_what_differs(tmp_path: Path) -> None:
    model, optimizer = trained()
    other = make_model("gpt2")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for model_of, counts, first in (
        (
            other,
            "holds 21 parameters, and the model trains 28",
            r"\[32, 32\] for the parameter transformer.wpe.weight",
        ),
        (
            make_model(num_hidden_layers=1),
            "holds 21 parameters, and the model trains 12",
            "model.norm.weight",
        ),
    ):
        with pytest.raises(CropiError, match=rf"{counts}: it has a moment of shape .*{first}"):
            read_moments(tmp_path, model_of)
    state = optimizer.state_dict()
    state["state"][3]["exp_avg_sq"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "wrong.pt")
    named = [n for n, _ in model.named_parameters()][3]
    with pytest.raises(CropiError, match=rf"has a moment of shape \[2, 2\] for the parameter {named}"):
        read_moments(tmp_path / "wrong.pt", model)
    fresh = torch.optim.AdamW(model.parameters())
    with pytest.raises(CropiError, match="holds no second moments"):
        read_moments(fresh, model)
    sgd = trained("SGD", momentum=0.9)
    with pytest.raises(CropiError, match="holds no second moments"):
        read_moments(sgd[1], sgd[0])
    with pytest.raises(CropiError, match="the optimiser trains a parameter of shape"):
        read_moments(optimizer, other)
    with pytest.raises(CropiError, match="there is no file .*; did you mean 'wrong.pt'. give"):
        SketchJob((), None, optimizer_state=str(tmp_path / "worng.pt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CropiError, match="holds none of optimizer.pt"):
        SketchJob((), None, optimizer_state=tmp_path / "empty")
    (tmp_path / "junk.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CropiError, match="cannot be read"):
        read_moments(tmp_path / "junk.pt", model)
    torch.save({"actor": optimizer.state_dict(), "critic": optimizer.state_dict()}, tmp_path / "two.pt")
    with pytest.raises(CropiError, match="two.pt holds 2 optimisers"):
        read_moments(tmp_path / "two.pt", model)
    found = read_moments(optimizer, model)
    few = SecondMoments({}, {}, {}, {}, {}, "adam", "x")
    with pytest.raises(CropiError, match="x has none for the parameter"):
        few.check(model, list(found.whole))


@pytest.mark.parametrize("frozen", [True, False])
def test_lora_has_moments_of_its_adapters(frozen: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    parameters = [p for p in model.parameters() if p.requires_grad or not frozen]
    optimizer = torch.optim.AdamW(parameters)
    ids = torch.randint(5, 60, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = read_moments(optimizer, model)
    made = run(model, tmp_path, optimizer_state=optimizer)
    assert len(made) > 3 and all(bool(vector.isfinite().all()) for vector in made.values())
    assert len(found.whole) == sum(p.requires_grad for p in model.parameters())
    if frozen:
        assert read_moments(tmp_path / "optimizer.pt", model).fingerprint() == found.fingerprint()


@pytest.mark.long
def test_half_precision_weights_do_not_lose_small_gradients(tmp_path: Path) -> None:
    model, optimizer = trained()
    right = run(model, tmp_path / "wide", optimizer_state=optimizer)
    half = copy.deepcopy(model).to(torch.bfloat16)
    moments = read_moments(optimizer, model)
    states = dict(half.named_parameters())
    other = torch.optim.AdamW(half.parameters())
    for name, p in model.named_parameters():
        other.state[states[name]] = {k: v.clone() for k, v in optimizer.state[p].items()}
    assert moments.whole.keys() == read_moments(other, half).whole.keys()
    made = run(half, tmp_path / "half", optimizer_state=other)
    close(made, {name: vector.double() for name, vector in right.items()}, 0.2)
    assert isinstance(half, transformers.PreTrainedModel)
