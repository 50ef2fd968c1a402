"""Fingerprints change with every weight and every token, and with nothing else."""

from __future__ import annotations

import torch
from made_data import make_model, make_tokenizer

from cropi.fingerprint import model_fingerprint, tokenizer_fingerprint


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


def test_tokenizer_fingerprint_ignores_what_it_was_last_used_for() -> None:
    tokenizer = make_tokenizer()
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == first
    assert tokenizer_fingerprint(make_tokenizer(chat=True)) != first
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != first
