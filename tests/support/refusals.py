"""Which architectures are refused, with the words that say why; and which are not built from sizes alone."""

from __future__ import annotations


def _both(words: str) -> dict[str, str]:
    return {"policy_gradient": words, "batch": words}


_PARTS = "do not give its logits"
# A head of BERT's kind owns its bias twice, in two modules.
_TWICE = "no tap covers these trainable parameters"
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "ernie", "megatron-bert"),
            *(
                "roberta",
                "roberta-prelayernorm",
                "roc_bert",
                "roformer",
                "xlm-roberta",
                "xlm-roberta-xl",
                "xmod",
            ),
        ),
        _both(_TWICE),
    ),
    # Their experts are not gate and up, activation, down, or not as many of each.
    "inkling_text": _both("do not hold the same experts"),
    **dict.fromkeys(
        ("inkling2_text", "inkling2_loop_text"), _both("its forward is not gate and up, activation, down")
    ),
    "longcat_flash": _both("do not hold the same experts"),
    # Between decoder and head these do more than a factor and a cap; `batch` takes them.
    "dory": {"policy_gradient": _PARTS},
    "electra": {"policy_gradient": _PARTS},
    "modernbert-decoder": {"policy_gradient": _PARTS},
    "rembert": {"policy_gradient": "have 32 features, and its head takes 1664"},
    # A bias that is returned, and added elsewhere.
    "gpt_neox_japanese": _both("GPTNeoXJapaneseAttention): an output of shape (32,)"),
    # A prompt is seen from both sides.
    **dict.fromkeys(("cpmant", "xlm"), {"policy_gradient": "is not causal"}),
    # Its encoder hands patches to the next part beside its tokens.
    "blt": _both("BltLocalEncoder has a gradient, and does not hold the"),
    # Several streams of tokens, and [length, batch].
    "prophetnet": {"policy_gradient": _PARTS, "batch": "does not hold the"},
    "xlnet": _both("called on something else than every token once"),
}
# Configurations of several models, and defaults that are too large.
NOT_SMALL = frozenset(
    """
    dbrx dots3_note fuyu gemma3n gemma4_assistant gemma4_unified gemma4_unified_assistant got_ocr2
    moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal reformer
    """.split()
)
