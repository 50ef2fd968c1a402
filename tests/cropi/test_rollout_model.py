"""A rollout goes on with the model that it was begun with (weights, settings, buffers); a model that it refuses."""

from __future__ import annotations

import json
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.commands import json_lines
from support.made_data import make_model, make_tokenizer, write_lines

import cropi
from cropi.errors import CropiError
from cropi.rollouts import trial
from cropi.rollouts.file import MODEL, RolloutFile
from cropi.sealed import sums_path

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


def rolled(out: Path, model: Any, count: int) -> list[dict[str, Any]]:
    asked = [{"id": f"p{i}", "prompt": f"{i}+1="} for i in range(count)]
    cropi.rollout(
        model, asked, lambda prompt, response: 0.0, out, make_tokenizer(), n=2, max_tokens=3, progress=False
    )
    return json_lines(out)


def changed(model: Any, what: str) -> Any:
    """A model of equal weights that is another one."""
    other = make_model(**(ROPE if what == "config" else {}))
    other.load_state_dict(model.state_dict(), strict=False)
    other.register_buffer("scale", model.scale + (what == "buffers"))
    return other


def with_buffer() -> Any:
    model = make_model()
    model.register_buffer("scale", model.lm_head.weight.new_ones(2))
    return model


@pytest.mark.parametrize("finished", [True, False])
def test_a_model_that_ends_its_responses_by_other_tokens_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """``generation_config.json`` may be mended between two runs: what was sampled before went on behind the new end."""
    out, model = tmp_path / "out.jsonl", make_model()
    with monkeypatch.context() as patched:
        if not finished:
            patched.setattr(RolloutFile, "finish", interrupted)
        with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
            rolled(out, model, 2)
    model.generation_config.eos_token_id = [1, 20]
    said = "not made with these settings" if finished else r"begun with ends = \[1\], and now it is \[1, 20\]"
    with pytest.raises(CropiError, match=said):
        rolled(out, model, 3)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("config", "model.config = .*10000.0.* and now it is .*500.0"),
        ("buffers", "model.buffers = 'xxh3:.* and now it is 'xxh3:"),
    ],
)
def test_a_model_of_the_same_weights_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, named: str, finished: bool
) -> None:
    out, model = tmp_path / "out.jsonl", with_buffer()
    if finished:
        rolled(out, model, 2)
    else:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(RolloutFile, "finish", interrupted)
            rolled(out, model, 2)
    held = out if finished else out.with_name("out.jsonl.part")
    before = held.read_bytes()
    with pytest.raises(CropiError, match=f"{held.name} was begun with another model: {named}"):
        rolled(out, changed(model, what), 3)
    assert held.read_bytes() == before
    records = rolled(out, changed(model, ""), 3)
    assert [MODEL in record for record in records] == [True, False, False]
    assert rolled(out, model, 3) == records


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("keys", ["none", "others"])
def test_files_of_earlier_releases_go_on(tmp_path: Path, keys: str, finished: bool) -> None:
    """Those without settings, and those of a transformers that knew other keys."""
    out, model = tmp_path / "out.jsonl", make_model()
    first, *rest = rolled(out, model, 3)
    known = json.loads(first.pop(MODEL))
    known["config"] = {key: value for key, value in known["config"].items() if key != "mlp_bias"} | {"new": 1}
    if finished:
        one = first if keys == "none" else first | {MODEL: json.dumps(known)}
        write_lines(out, [one, *rest])
        sums_path(out).unlink()
    else:
        out.unlink()
        settings = settings_of(model, tmp_path)
        begun = {"cropi_rollout": settings, "rows": 256, "linears": "torch"}
        lines = [begun if keys == "none" else begun | {MODEL: known}, first, *rest]
        texts = [json.dumps(line).encode() for line in lines]
        part, sums = out.with_name("out.jsonl.part"), [b"\t%08x\n" % zlib.crc32(text) for text in texts]
        part.write_bytes(b"".join(text + b"\n" for text in texts))
        with pytest.raises(CropiError, match="part is damaged: the checksum of a line does not match"):
            rolled(out, model, 4)
        part.write_bytes(b"".join(text + check for text, check in zip(texts, sums)))
    records = rolled(out, model, 4)
    assert [record["id"] for record in records] == ["p0", "p1", "p2", "p3"]
    now = json.loads(records[0].pop(MODEL))
    assert records[:3] == [first, *rest] and ("new" in now["config"]) == (keys == "others")


def settings_of(model: Any, folder: Path) -> dict[str, Any]:
    """The settings as the first line of a part file has them."""
    held: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    def keeping(self: RolloutFile, order: Any) -> None:
        held.append(self.settings)
        raise Stop

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stop):
        patched.setattr(RolloutFile, "finish", keeping)
        rolled(folder / "other.jsonl", model, 1)
    assert MODEL not in held[0]
    return held[0]


def test_what_stands_in_the_place_of_settings_is_compared(tmp_path: Path) -> None:
    out, model = tmp_path / "out.jsonl", make_model()
    first, *rest = rolled(out, model, 2)
    sums_path(out).unlink()
    write_lines(out, [first | {MODEL: "{"}, *rest])
    with pytest.raises(CropiError, match=r"out.jsonl was begun with .* model = '\{', and now it is"):
        rolled(out, model, 2)


def test_a_rollout_of_rolled_out_prompts_leaves_the_first_models_settings(tmp_path: Path) -> None:
    rolled(tmp_path / "first.jsonl", make_model(), 2)
    later = make_model(**ROPE)
    cropi.rollout(
        later, tmp_path / "first.jsonl", lambda prompt, response: 0.0, tmp_path / "second.jsonl", make_tokenizer(),
        n=2, max_tokens=3, progress=False,
    )  # fmt: skip
    first, second = (json_lines(tmp_path / f"{name}.jsonl") for name in ("first", "second"))
    assert json.loads(first[0][MODEL])["config"] != json.loads(second[0][MODEL])["config"]
    assert MODEL not in second[1]


def test_a_scale_of_positions_that_a_cache_does_not_follow() -> None:
    """Keys keep the positions with which they came: log-probs of responses that went beyond were off by 0.02."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    scaled = make_model("llama", rope_scaling=scaling, max_position_embeddings=40)
    assert trial.way_of(scaled, 20, 21) == "shared"
    with pytest.raises(CropiError, match="scales its positions anew beyond 40 tokens.*20 with 22 more"):
        trial.way_of(scaled, 20, 22)


def test_a_window_beyond_the_longest_row_of_the_trial_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    window = make_model("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=48)
    monkeypatch.setattr(trial, "_LONGEST", 32)
    assert [trial.way_of(window, 40, more) for more in (0, 20)] == ["shared", "padded"]


def test_a_trial_that_runs_out_of_memory_says_so() -> None:
    model = make_model()
    with mock.patch.object(model, "forward", side_effect=torch.OutOfMemoryError("8 GiB")):
        with pytest.raises(torch.OutOfMemoryError, match="8 GiB"):
            trial.way_of(model, 20)
