"""What `GradientSketcher` says to bad arguments, and to models that it cannot take apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import odd_models, zoo
from support.versions import checkpoint_layers
from torch import nn
from torch.utils.checkpoint import checkpoint

from cropi_kernels import GradientSketcher, LiveSketcher, SketchSpec, UncoveredParameterError
from cropi_kernels.sketcher.taps import exact

SPEC = SketchSpec(width=16, vocab_width=64)
transformers.logging.set_verbosity_error()

BATCH = zoo.padded()
ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    (dict(input_ids=BATCH.input_ids[0]), r"input_ids has shape \(9,\): give a non-empty \[batch, length\]"),
    (dict(input_ids=BATCH.input_ids[:0]), r"input_ids has shape \(0, 9\)"),
    (dict(input_ids=BATCH.input_ids.tolist()), r"input_ids is of type list: give a tensor"),
    (dict(input_ids=BATCH.input_ids.float()), r"input_ids is torch.float32: give int64 token ids"),
    (dict(targets=BATCH.targets.numpy()), r"targets is of type ndarray: give a tensor"),
    (dict(segments=[0, 0, 1, 1, 1, 2]), r"segments is of type list: give a tensor"),
    (
        dict(attention_mask=torch.ones(5, 9)),
        r"attention_mask has shape \(5, 9\): give \[6, 9\], 1 for tokens",
    ),
    (dict(attention_mask=torch.ones(6, 9, 9)), r"attention_mask has shape \(6, 9, 9\)"),
    (dict(attention_mask=torch.ones(6, 1, 1, 9)), r"attention_mask has shape \(6, 1, 1, 9\)"),
    (dict(position_ids=torch.zeros(6, 8)), r"position_ids has shape \(6, 8\): give int64 \[6, 9\]"),
    (dict(input_ids=BATCH.input_ids + 90), r"input_ids runs from 90 to 186: the vocabulary is 0 .. 96"),
    (dict(targets=BATCH.targets - 2), r"targets runs from -1 to 31: the vocabulary is 0 .. 96"),
    (
        dict(targets=BATCH.targets[1:]),
        r"positions \(18,\) .* and targets \(17,\) .* must be int64 of one length",
    ),
    (dict(positions=BATCH.positions.int()), r"positions \(18,\) torch.int32"),
    (dict(positions=BATCH.positions + 55), r"positions run from 58 to 106: input_ids holds 0 .. 53"),
    (dict(positions=BATCH.positions - 4), r"positions run from -1 to 47"),
    (dict(positions=BATCH.positions.flip(0)), r"positions jump back to an earlier segment: sort"),
    (dict(segments=BATCH.segments.flip(0)), r"segments must be >= 0 and must not decrease"),
    (dict(segments=BATCH.segments - 1), r"segments must be >= 0"),
    (
        dict(segments=BATCH.segments.float()),
        r"segments is torch.float32 \(6,\): give int64 ids per row \[6\]",
    ),
    (dict(segments=BATCH.segments[1:]), r"segments is torch.int64 \(5,\)"),
    (dict(num_segments=2), r"num_segments=2 but segments holds id 2"),
    # Ids of a data set's rows: a sketch of each would fill the memory.
    (
        dict(segments=BATCH.segments + 10**9),
        r"segments holds id 1000000002, and the batch .* number its prompts 0, 1",
    ),
    (dict(temperature=0.0), r"temperature"),
    (dict(temperature=-1.0), r"temperature"),
    (dict(temperature="1.0"), r"temperature='1.0'"),
    (
        dict(model_kwargs={"token_type_id": BATCH.input_ids}),
        r"'token_type_id', which LlamaForCausalLM does not take",
    ),
    (dict(model_kwargs={"cache": None}), r"model_kwargs holds cache, which the pass gives"),
    (dict(model_kwargs={"labels": BATCH.input_ids}), r"model_kwargs holds labels, which the pass gives"),
    (dict(model_kwargs=[1]), r"model_kwargs is of type list: give a dictionary"),
    (dict(weigh=lambda logp, a, b: torch.zeros(3)), r"weigh\(logp, 0, 18\) returned \(3,\)"),
]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return zoo.make("llama")


@pytest.mark.parametrize("changes, message", ARGUMENTS, ids=[message[:40] for _, message in ARGUMENTS])
def test_bad_arguments_are_named(llama: nn.Module, changes: dict[str, Any], message: str) -> None:
    with GradientSketcher(llama, SPEC) as sketcher:
        with pytest.raises(ValueError, match=message):
            BATCH.sketch(sketcher, **changes)


def test_what_is_no_model_no_spec_and_no_graph(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="model is of type NoneType: give a torch.nn.Module"):
        GradientSketcher(None, SPEC)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spec is of type int: give a SketchSpec"):
        GradientSketcher(llama, 32768)  # type: ignore[arg-type]
    with GradientSketcher(llama, SPEC) as sketcher, torch.inference_mode():
        with pytest.raises(RuntimeError, match="policy_gradient under torch.inference_mode"):
            BATCH.sketch(sketcher)


def test_a_model_that_was_made_under_inference_mode() -> None:
    with torch.inference_mode():
        layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"weight, bias: made under torch.inference_mode\(\), so that they"):
        GradientSketcher(layer, SPEC)
    assert layer.weight.requires_grad


def test_a_model_without_decoder_and_head_is_sent_to_batch() -> None:
    model = nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 97))
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(ValueError, match=r"not a decoder with a linear head: use `with sketcher.batch"):
            zoo.padded().sketch(sketcher)
        with pytest.raises(ValueError, match=r"segments has shape \(3,\): give ids per token, or shape="):
            with sketcher.batch(torch.zeros(3, dtype=torch.int64)):
                pass


def test_a_head_that_is_not_all_is_noticed() -> None:
    """The decoder and the head are run apart: what the model does between or behind them must not get lost."""
    model = zoo.make("llama")
    plain = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = plain(self, *args, **kwargs)
            out.logits = out.logits + torch.arange(97) * 0.01
            return out

    model.__class__ = Shifted
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(ValueError, match="do not give its logits.*use `with sketcher.batch"):
            zoo.padded().sketch(sketcher)


def test_a_weight_that_is_used_without_its_module_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba multiplies by dt_proj's weight itself: its tap hears nothing. Small ones are covered all the same
    (test_exact.py)."""
    pytest.importorskip("transformers", "5.15")  # before, it calls the module
    monkeypatch.setattr(exact, "LARGEST", 0)
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    exclude = ["*.A_log", "*.D", "*.conv1d.*"]
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        for _ in range(2):
            with pytest.raises(
                UncoveredParameterError, match=r"layers.1.mixer.dt_proj \(Linear\): used without"
            ) as error:
                BATCH.sketch(sketcher)
        assert "exclude=['backbone.layers.0.mixer.dt_proj.weight', ...]" in str(error.value)
        assert not any(p.requires_grad for p in model.parameters())
    exclude.append("*.dt_proj.*")
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        got = BATCH.sketch(sketcher).sketches
    own = zoo.sketches(model, zoo.gradients(model), SPEC, tuple(exclude), torch.float32)
    want = zoo.sketches(model, zoo.gradients(model.double()), SPEC, tuple(exclude))
    assert ((got - want).norm(dim=1) <= 2 * (own - want).norm(dim=1)).all()


@pytest.mark.long
def test_a_norm_with_a_gate_is_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its gate it is an RMSNorm, and that is how it would be sketched. Small ones are covered as they are
    (test_exact.py)."""
    monkeypatch.setattr(exact, "LARGEST", 0)
    sizes = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
    torch.manual_seed(0)
    model = transformers.BambaForCausalLM(transformers.BambaConfig(**zoo.SIZES, **sizes)).eval()
    exclude = ["*.A_log", "*.D", "*.dt_bias", "*.conv1d.*"]
    with pytest.raises(UncoveredParameterError, match=r"model.layers.0.mamba.norm.weight \(64,\) in Bamba"):
        GradientSketcher(model, SPEC, exclude)
    exclude.append("*.mamba.norm.*")
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        got = BATCH.sketch(sketcher).sketches
    own = zoo.sketches(model, zoo.gradients(model), SPEC, tuple(exclude), torch.float32)
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)


def test_a_second_tensor_is_noticed_in_a_batch() -> None:
    class Gated(nn.RMSNorm):
        def forward(self, x: torch.Tensor, *gates: torch.Tensor) -> torch.Tensor:
            return super().forward(x * gates[0] if gates else x)

    norm = Gated(8, eps=1e-6)
    with GradientSketcher(norm, SPEC) as sketcher, sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
        with pytest.raises(ValueError, match="called with a second tensor .*: exclude its parameters"):
            norm(torch.ones(2, 6, 8), torch.ones(2, 6, 8))
        norm(torch.ones(2, 6, 8)).sum().backward()


def test_a_module_that_nothing_uses_has_no_gradient() -> None:
    """A tower for images, say: without images it is not an error."""
    model, plain = zoo.make("llama"), zoo.make("llama")
    model.model.tower = nn.Linear(8, 8)  # type: ignore[union-attr]
    results = []
    for one in (model, plain):
        with GradientSketcher(one, SPEC) as sketcher:
            results.append(BATCH.sketch(sketcher).sketches)
    assert torch.equal(*results)


def test_noise_that_eval_does_not_turn_off_is_said_to_be_that() -> None:
    """It was said that decoder and head do not give the logits, with a remedy that gives random gradients."""
    model = zoo.make("llama")
    mlp, plain = model.model.layers[0].mlp, model.model.layers[0].mlp.forward
    mlp.forward = lambda x: nn.functional.dropout(plain(x), 0.3, training=True)
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(
            ValueError, match=r"other hidden states each time .* after model.eval\(\) too: set the rate"
        ):
            BATCH.sketch(sketcher)


@pytest.mark.parametrize(
    "kind, message", [("Prompt", r"give \[4, 97\] for 4 tokens"), ("Prefix", "difference")]
)
def test_tokens_that_peft_puts_in_front_are_noticed(kind: str, message: str) -> None:
    """They are trained, but the decoder alone does not see them: their sketch would be zero."""
    import peft

    config = getattr(peft, f"{kind}TuningConfig")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(zoo.make("llama"), config).eval()
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(ValueError, match=f"do not give its logits .*{message}"):
            BATCH.sketch(sketcher)


@pytest.mark.parametrize("where", ["plain", "checkpointed", "reentrant"])
def test_outputs_may_be_changed_in_place(where: str) -> None:
    """What ordinary training allows: an activation and a position added in the memory of a tapped module's output."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first, self.second = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.get_input_embeddings = lambda: self.words
            self.out_of_place = False

        def block(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.second(torch.relu(y) if self.out_of_place else torch.relu_(y))  # type: ignore[no-any-return]

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.words(ids)
            x = x + 0.5 if self.out_of_place else x.add_(0.5)
            if where == "plain":
                return self.block(x)
            out: torch.Tensor = checkpoint(self.block, x, use_reentrant=where == "reentrant")
            return out

    torch.manual_seed(0)
    model, ids = InPlace(), torch.randint(11, (2, 6))
    sketches = []
    with GradientSketcher(model, SPEC) as sketcher:
        for model.out_of_place in (True, False):
            with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as result:
                model(ids).square().sum().backward()
            sketches.append(result.sketches)
    assert torch.equal(*sketches) and sketches[0].any(dim=1).all()


def test_a_backward_pass_after_its_batch_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with GradientSketcher(model, SPEC) as sketcher:
        with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
            loss = model(torch.ones(2, 6, 8)).sum()
            loss.backward(retain_graph=True)
        with pytest.raises(
            RuntimeError, match="a backward pass reached 0 after its batch had ended: run it inside"
        ):
            loss.backward()
        with pytest.raises(RuntimeError, match="a backward pass reached 0 after its batch had ended"):
            with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
                model(torch.ones(2, 6, 8)).sum().add(loss).backward()


def test_a_module_that_does_not_see_every_token_is_named() -> None:
    """Half the tokens go through the second layer: which segment they belong to is unknown."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)[:, ::2])

    # [length, batch, n] has the right number of tokens in the wrong order.
    for shape in ((2, 6, 8), (6, 2, 8)):
        model = Half()
        with GradientSketcher(model, SPEC) as sketcher:
            with pytest.raises(
                ValueError, match=r"(first|second) saw an input of shape .* in a batch of 2 x 6 tokens"
            ):
                with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
                    model(torch.ones(shape)).sum().backward()


def replaced(model: Any) -> None:
    model[1] = nn.Linear(8, 8)


def normalised(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model[1])


def tied(model: Any) -> None:
    model[2].weight = model[0].weight


@pytest.mark.parametrize("kind", [GradientSketcher, LiveSketcher])
@pytest.mark.parametrize("change", [replaced, normalised, tied])
@pytest.mark.parametrize("inside", [True, False], ids=["inside of the block", "between two"])
def test_modules_that_have_changed_since_the_taps_came_are_named(
    kind: Any, change: Any, inside: bool
) -> None:
    """What came has no tap, so its gradient would be missing."""
    model, ids = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)), torch.ones(2, 6).long()
    sketcher = kind(model, SketchSpec(1024))

    def step() -> None:
        with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
            model(ids).square().sum().backward()

    with sketcher:
        step()
        if inside:
            change(model)
            with pytest.raises(ValueError, match=r"(weight|bias) belongs to other modules than when"):
                step()
    if not inside:
        change(model)
        with pytest.raises(ValueError, match=r"(weight|bias) belongs to other modules than when"):
            with sketcher:
                step()


def test_a_parameter_may_be_replaced() -> None:
    """Its module reads the new one, and so does its tap."""
    model, ids = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), torch.ones(2, 6).long()
    sketches = []
    with LiveSketcher(model, SketchSpec(1024)) as live:
        for _ in range(2):
            with live.batch(torch.tensor([0, 1]), shape=(2, 6)) as got:
                model(ids).square().sum().backward()
            sketches.append(got.sketches)
            model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    assert torch.equal(*sketches)


@pytest.mark.parametrize("kind", [GradientSketcher, LiveSketcher])
def test_weights_on_the_meta_device_are_named(kind: Any) -> None:
    """As accelerate leaves them, which loads the weights of a module when it is called."""
    model = zoo.make("llama").to("meta")
    with pytest.raises(ValueError, match="parameters of LlamaForCausalLM are on the meta device"):
        with kind(model, SPEC) as sketcher, sketcher.batch(torch.tensor([0]), shape=(1, 2)):
            raise AssertionError("begun")


@pytest.mark.long
def test_the_remedy_where_a_weight_is_used_without_its_module_is_the_mode_that_changes_it() -> None:
    """Gemma 3n clamps two weights in train(); reentrant checkpointing takes none of the passes inside of Mamba."""
    with GradientSketcher(odd_models.make("gemma3n").train(), SPEC) as sketcher:
        with pytest.raises(
            UncoveredParameterError, match=r"(?s)altup.*call model.eval\(\), .* or freeze them"
        ):
            BATCH.sketch(sketcher)
    model: Any = odd_models.make("mamba").train()
    checkpoint_layers(model, {"use_reentrant": True})
    ids = BATCH.input_ids
    with LiveSketcher(model, SPEC) as live:
        with pytest.raises(
            UncoveredParameterError, match=r"(?s)dt_proj.*make it use_reentrant=False; or freeze"
        ):
            with live.batch(torch.zeros(len(ids), dtype=torch.int64), shape=ids.shape):
                model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
