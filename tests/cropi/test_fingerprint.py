"""Fingerprints change with every weight and every token, and with nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cropi.model.fingerprint import model_fingerprint, tokenizer_fingerprint
from cropi.model.policy import Policy


def test_one_bit_of_one_weight_changes_the_fingerprint() -> None:
    model, first = make_model(), model_fingerprint(make_model())
    assert model_fingerprint(model) == first and first["dtype"] == "float32"
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    changed = model_fingerprint(model)
    assert changed["weights"] != first["weights"] and changed["size"] == first["size"]
    model.requires_grad_(False)
    assert model_fingerprint(model) == changed, "freezing changes no weight"
    assert model_fingerprint(make_model().to(torch.bfloat16))["dtype"] == "bfloat16"


def test_the_last_weight_of_a_large_tensor_counts() -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        first = model_fingerprint(model)
        with torch.no_grad():
            parameter.view(-1)[-1] += 1.0
        assert model_fingerprint(model)["weights"] != first["weights"], name


@pytest.mark.long
def test_which_adapter_is_in_use_counts_and_its_scale() -> None:
    """All adapters of a model are among its parameters; which of them it adds is not."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), config := peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", config)
    policy = Policy(model)
    first = policy.fingerprint
    model.set_adapter("other")
    assert (other := policy.fingerprint["weights"]) != first["weights"], "a policy notices it, too"
    with model.disable_adapter():
        assert policy.fingerprint["weights"] not in (other, first["weights"])
    model.set_adapter("default")
    assert policy.fingerprint == first
    model.base_model.model.model.layers[1].self_attn.q_proj.scaling["default"] *= 2
    assert policy.fingerprint["weights"] not in (other, first["weights"])


def test_the_end_of_a_tokenizer_counts() -> None:
    """Two tokens that change places at the end of the vocabulary, and the end of a long template."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["~"], vocabulary["}"] = vocabulary["}"], vocabulary["~"]
    names = {"eos_token": "<eos>", "pad_token": "<pad>"}
    backend = Tokenizer.from_str(json.dumps(state))
    swapped = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    swapped.chat_template = tokenizer.chat_template = "{# " + "long " * 1000 + "#}x"
    assert tokenizer_fingerprint(swapped) != tokenizer_fingerprint(tokenizer)
    first = tokenizer_fingerprint(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template[:-1] + "y"
    assert tokenizer_fingerprint(tokenizer) != first


def test_tokenizer_fingerprint_ignores_what_it_was_last_used_for() -> None:
    tokenizer = make_tokenizer()
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == first
    assert tokenizer_fingerprint(make_tokenizer(chat=True)) != first
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != first


class Pair(torch.Tensor):
    """A tensor made of two, as quantised weights are of numbers and scales; it has no bytes of its own."""

    @staticmethod
    def __new__(cls, first: torch.Tensor, second: torch.Tensor) -> Pair:
        return torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        self.first, self.second = first, second

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], *rest: object) -> Pair:
        return Pair(parts["first"], parts["second"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(str(function))


def test_every_part_of_a_quantised_weight_counts() -> None:
    found = set()
    for first, second in ((1, 1), (2, 1), (1, 2)):
        model = make_model()
        part = Pair(torch.full((2, 2), first, dtype=torch.int8), torch.full((2,), float(second)))
        model.lm_head.weight = torch.nn.Parameter(part, requires_grad=False)
        found.add(model_fingerprint(model)["weights"])
    assert len(found) == 3
