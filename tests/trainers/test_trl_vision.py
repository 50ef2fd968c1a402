"""A policy that could see images, trained on text: rollouts are recorded, and steps sketched. Images are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::FutureWarning")]

from support.commands import json_lines  # noqa: E402
from support.made_data import make_tokenizer  # noqa: E402
from support.trl_runs import dataset, recorded, staged, stored  # noqa: E402
from support.versions import needs  # noqa: E402

from cropi.errors import CropiError  # noqa: E402
from cropi.trainers.trl import Live  # noqa: E402


class Processor(transformers.ProcessorMixin):  # type: ignore[misc]
    """Of text alone: what reads images needs torchvision."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def model() -> Any:
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text = dict(
        vocab_size=len(make_tokenizer()), num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    vision = dict(model_type="siglip_vision_model", image_size=16, patch_size=4)
    config = transformers.Gemma3Config(
        text_config=size | text, vision_config=size | vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def given(**changes: Any) -> dict[str, Any]:
    tokenizer = make_tokenizer(chat=True)

    def messages(rows: Any) -> Any:
        return rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    return {
        "model": model(), "processing_class": Processor(tokenizer, tokenizer.chat_template), "max_steps": 2,
        "train_dataset": messages(dataset(20)), "eval_dataset": None, "reward_funcs": lengths,
    } | changes  # fmt: skip


def lengths(completions: list[Any], **columns: Any) -> list[float]:
    return [len(set(completion[0]["content"])) / 8 for completion in completions]


@needs("transformers", "5.23", "it asks for token_type_ids that TRL does not give")
def test_text_is_recorded_and_sketched(tmp_path: Path) -> None:
    valid = stored(tmp_path / "valid.jsonl", seed=1, count=4)
    options = {"live": Live(dim=1024), "fraction": 0.5, "stage_steps": 2, "valid": valid}
    trainer = staged(tmp_path / "out", options, **given())
    own = model()  # of the same seed, as it was before the first step
    trainer.train()
    live = trainer._cropi.live
    assert live.selector.seen.any() and not live.selector.failed and live.sketcher.loss
    record = json_lines(tmp_path / "out" / "cropi" / "rollouts" / "train-rank00000.jsonl")[0]
    said = trainer._tokenize_prompts([trainer.train_dataset[int(record["id"].split("-")[1])]["prompt"]])
    assert record["prompt_ids"] == said[0][0]
    ids, start = record["prompt_ids"] + record["response_ids"][0], len(record["prompt_ids"])
    with torch.no_grad():
        logits = own.double()(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1] / record["temperature"]
    exact = torch.log_softmax(logits, -1)[torch.arange(len(ids) - start), ids[start:]]
    # float32 logits of size 1 divided by the temperature, a sum over 97 words, and six recorded decimals.
    atol = 97 * 2.0**-24 / record["temperature"] + 1e-6
    torch.testing.assert_close(torch.tensor(record["logprobs"][0]).double(), exact, rtol=0, atol=atol)


def test_images_are_refused(tmp_path: Path) -> None:
    """In a column of a dataset before the first step, in messages when the first batch holds one."""
    images = {"image": [None] * 20}
    for name in ("train_dataset", "eval_dataset"):
        data = dataset(20, seed=int(name == "eval_dataset")).add_column("image", images["image"])
        with pytest.raises(
            CropiError, match=r"recorded with images \(image or images in a dataset\).*recording=None"
        ):
            recorded(tmp_path, **given(**{name: data}))
    trainer = recorded(tmp_path, **given())
    batch = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
    with pytest.raises(
        CropiError, match=r"recorded with images \(in messages\): a trajectory record holds tokens"
    ):
        trainer._cropi.generated(batch | {"num_images": [1]})
