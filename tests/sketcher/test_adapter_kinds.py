"""Every kind of adapter of the installed PEFT: held to autograd, or refused with the words that this table expects.

A kind that is new in PEFT is not in the table, and shows itself here.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support import zoo
from support.tensors import off

from cropi_kernels import GradientSketcher, SketchSpec

SPEC = SketchSpec(width=16, vocab_width=64)
KINDS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
TARGETS: dict[str, Any] = dict(target_modules=["q_proj", "down_proj"])
VIRTUAL: dict[str, Any] = dict(num_virtual_tokens=3, task_type="CAUSAL_LM")
RANK = dict(r=4, **TARGETS)
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        """LORA ADAMSS BONE DEFT DELORA GLORA HIRA HRA LILY LOHA LOKR MISS PEANUT PSOFT RANDLORA SUPERTUNING TINYLORA
        UNILORA""".split(),
        RANK,
    ),
    **dict.fromkeys(("BEFT", "FROD"), TARGETS),
    **dict.fromkeys(("VERA", "PVERA"), dict(r=4, target_modules=["q_proj", "o_proj"])),
    **dict.fromkeys(("FOURIERFT", "WAVEFT"), dict(n_frequency=20, **TARGETS)),
    **dict.fromkeys(("CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING"), VIRTUAL),
    "ADALORA": dict(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]),
    "ADAPTION_PROMPT": dict(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    "BOFT": dict(boft_block_size=4, **TARGETS),
    "C3A": dict(block_size=16, **TARGETS),
    "CPT": dict(cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], task_type="CAUSAL_LM"),
    "GRALORA": dict(gralora_k=2, **RANK),
    "IA3": dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN_TUNING": dict(target_modules=["input_layernorm"]),
    "MULTITASK_PROMPT_TUNING": dict(num_tasks=2, **VIRTUAL),
    "OFT": dict(r=0, oft_block_size=4, **TARGETS),
    "OSF": dict(effective_rank=4, **TARGETS),
    "POLY": dict(n_tasks=2, n_skills=2, n_splits=1, **RANK),
    "P_TUNING": dict(encoder_hidden_size=16, **VIRTUAL),
    "ROAD": dict(group_size=16, variant="road_2", **TARGETS),
    "SHADOW": {},
    "SHIRA": dict(r=2, **TARGETS),
    "TRAINABLE_TOKENS": dict(token_indices=[17, 31, 94]),
    "VBLORA": dict(num_vectors=8, vector_length=8, **RANK),
}  # fmt: skip
_IN_FRONT = "do not give its logits"
REFUSED = {
    # Tokens, keys or a second model beside the decoder, which PEFT's own forward puts there.
    **dict.fromkeys(("CARTRIDGE", "CPT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW"), _IN_FRONT),
    # Its router takes the mean of all tokens.
    "LILY": "is not causal",
    "OSF": "not those of the gradients that autograd formed",
    # PEFT's own words: these want the number of a task with every call.
    **dict.fromkeys(("MULTITASK_PROMPT_TUNING", "POLY"), "task_ids"),
}
# A mixture of other adapters.
LEFT_OUT = {"XLORA"}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@mock.patch.dict(os.environ)  # PEFT's BOFT leaves CXX=gcc behind, which does not link C++
def test_a_kind_of_adapter(kind: str) -> None:
    if kind in LEFT_OUT:
        pytest.skip("is not built of itself")
    assert kind in SETTINGS, f"{kind} is new in PEFT {peft.__version__}"
    model = zoo.with_adapter(
        zoo.make("llama"), PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**SETTINGS[kind])
    )  # type: ignore[call-arg]
    with GradientSketcher(model, SPEC) as sketcher:
        if kind in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[kind]):
                zoo.padded().sketch(sketcher)
            return
        got = zoo.padded().sketch(sketcher).sketches.double()
    assert sketcher.self_test is not None and not sketcher.self_test.untested
    own = zoo.sketches(model, zoo.gradients(model), SPEC)
    # Two float32 passes of two layers; the largest here is 1.5e-6, of RandLoRA's scaled products.
    assert 0 < off(got, own) <= 5e-6


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_two_kinds_at_once() -> None:
    """PEFT's model for them is of another class than its others, and not reached in the same way."""
    lora = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(zoo.make("llama"), lora, mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=3, init_weights=False, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["default", "other"])
    with GradientSketcher(model, SPEC) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches.double()
    own = zoo.sketches(model, zoo.gradients(model), SPEC)
    assert len(sketcher.coverage.names) == 2 * 2 * (2 + 4) and 0 < off(got, own) <= 5e-6
