"""Rollouts by a server with OpenAI's interface (with a small model behind it) and by a stand-in of vLLM's classes."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.commands import json_lines
from support.made_data import make_model, make_tokenizer, save_policy
from support.oracle import stored_logprobs
from support.served import Served, serve

import cropi
from cropi.errors import CropiError
from cropi.rollouts import http
from cropi.rollouts.http import ServerError
from cropi.rollouts.server import ServerNote


def prompts(count: int = 5) -> list[dict[str, Any]]:
    return [
        {"id": f"p{i}", "prompt": [{"role": "user", "content": f"{i}+1="}], "answer": "1"}
        for i in range(count)
    ]


def reward(prompt: Any, response: str, answer: str) -> float:
    return float(answer in response)


def asked(out: Path, server: Served, rows: Any = None, **options: Any) -> list[dict[str, Any]]:
    given = {
        "engine": "openai-url",
        "url": server.url,
        "n": 3,
        "max_tokens": 5,
        "concurrency": 4,
        "retries": 2,
    }
    given |= {"progress": False, "api_key": "CROPI_TEST_KEY"} | options
    cropi.rollout(server.model, rows or prompts(), reward, out, server.tokenizer, **given)
    return json_lines(out)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between repeated requests, which are not slept."""
    pauses: list[float] = []

    def none(attempt: int, asked: str | None) -> float:
        pauses.append(pause(attempt, asked))
        return 0.0

    pause = http._pause
    monkeypatch.setattr(http, "_pause", none)
    return pauses


def check_exact(model: Any, records: list[dict[str, Any]]) -> None:
    """Token ids and log-probs are those of the policy at the temperature."""
    assert [record["id"] for record in records] == [f"p{i}" for i in range(len(records))]
    for record in records:
        own = stored_logprobs(model, record, record["temperature"])
        for ids, found, right, cut in zip(
            record["response_ids"], record["logprobs"], own, record["truncated"], strict=True
        ):
            assert found == pytest.approx(right, rel=0, abs=1e-4)
            assert cut == (ids[-1] != 1)


@pytest.mark.parametrize(
    ("kind", "api"),
    [
        ("vllm", "completions"),
        ("vllm", "chat"),
        ("tokens", "completions"),
        ("tokens", "chat"),
        ("sglang", "chat"),
        ("llama.cpp", "completions"),
        ("llama.cpp", "chat"),
    ],
)
def test_a_server_with_token_ids_gives_exact_records(tmp_path: Path, api: str, kind: str) -> None:
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    with serve(model, tokenizer, kind=kind) as server:
        records = asked(tmp_path / "out.jsonl", server, api=api)
    check_exact(model, records)
    assert records[0]["policy"] == "tiny"
    for body in server.requests:  # what a server would take from defaults of its own is said
        assert body["top_k"] == (1 if body["temperature"] == 2 else -1)
        assert body["repetition_penalty"] == 1.0 and body["min_p"] == 0.0
    with serve(model, tokenizer, kind=kind, processed=True) as server:
        records = asked(
            tmp_path / "cool.jsonl",
            server,
            rows=prompts(2),
            temperature=0.7,
            server_logprobs="processed",
            api=api,
        )
    check_exact(model, records)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_p": 0.5, "server_logprobs": "processed"}, {"server_logprobs": "none"}],
)
@pytest.mark.filterwarnings("ignore::cropi.rollouts.job.Truncated")
def test_log_probs_that_an_estimator_cannot_use_are_left_out_and_said(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(make_model(), make_tokenizer(chat=True)) as server:
        records = asked(tmp_path / "out.jsonl", server, rows=prompts(2), say=print, **options)
    assert all("logprobs" not in record and "response_ids" in record for record in records)
    assert "log-probs not recorded: " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["plain", "bare"])
def test_a_server_without_token_ids_gives_text_and_says_so(tmp_path: Path, kind: str) -> None:
    with (
        serve(make_model(), make_tokenizer(chat=True), kind=kind) as server,
        pytest.warns(ServerNote) as said,
    ):
        records = asked(tmp_path / "out.jsonl", server, api="chat", rows=[*prompts(3)])
    assert all("response_ids" not in record and len(record["responses"]) == 3 for record in records)
    texts = [str(one.message) for one in said]
    assert any("gives no token ids" in text for text in texts)
    assert any("neither truncate nor penalise" in text for text in texts)


@pytest.mark.filterwarnings("ignore::cropi.rollouts.job.Truncated")
def test_a_server_that_ignores_what_it_does_not_know_is_said(tmp_path: Path) -> None:
    """As Ollama, whose interface has no top_k, and takes prompts of completions as text alone."""
    with serve(make_model(), make_tokenizer(chat=True), kind="ollama") as server:
        with pytest.raises(
            ServerError, match="cannot unmarshal array .* if it takes no token ids, use --api chat"
        ):
            asked(tmp_path / "out.jsonl", server)
        with pytest.warns(ServerNote) as said:
            records = asked(tmp_path / "out.jsonl", server, api="chat")
        with (
            pytest.warns(ServerNote),
            pytest.raises(CropiError, match="top_k: the server at .* ignores it; leave"),
        ):
            asked(tmp_path / "k.jsonl", server, api="chat", top_k=3)
    assert all(len(record["responses"]) == 3 for record in records)
    assert sum("ignores top_k" in str(one.message) for one in said) == 1


def test_a_text_without_its_thoughts_is_an_error(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    with serve(model, tokenizer, kind="plain", thoughts="Hm.") as server, pytest.warns(ServerNote):
        with pytest.raises(ServerError, match="takes the thoughts out of the text of a response to 'p0'"):
            asked(tmp_path / "out.jsonl", server, api="chat")
    with serve(model, tokenizer, kind="llama.cpp", thoughts="Hm.") as server:  # its ids are of all tokens
        check_exact(model, asked(tmp_path / "ids.jsonl", server, api="chat"))


def test_failures_that_pass_are_repeated_and_others_are_not(tmp_path: Path, waited: list[float]) -> None:
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    with serve(model, tokenizer) as server:
        server.failures = [503, 429, 0, 500]
        records = asked(tmp_path / "out.jsonl", server, concurrency=1, retries=4)
        check_exact(model, records)
        assert waited == [1.0, 2.0, 4.0, 8.0]
        server.failures = [-1]
        with pytest.raises(ServerError, match=r"did not answer within 0.2 seconds \(--timeout\), 1 times"):
            asked(tmp_path / "slow.jsonl", server, timeout=0.2, retries=0)
        server.key = "secret"
        with pytest.raises(ServerError, match="answered 401: 'wrong key'") as error:
            asked(tmp_path / "key.jsonl", server)
        assert "secret" not in str(error.value)


def test_the_key_goes_to_the_server_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROPI_TEST_KEY", "secret")
    with serve(make_model(), make_tokenizer(chat=True), key="secret") as server:
        assert len(asked(tmp_path / "out.jsonl", server, rows=prompts(1))) == 1
    assert "secret" not in (tmp_path / "out.jsonl").read_text()


def test_a_server_that_dies_midway_loses_nothing_that_is_finished(
    tmp_path: Path, waited: list[float]
) -> None:
    model, tokenizer, out = make_model(), make_tokenizer(chat=True), tmp_path / "out.jsonl"
    with serve(model, tokenizer) as server:
        whole = asked(tmp_path / "whole.jsonl", server, concurrency=1)
    with serve(model, tokenizer, dies_after=6) as server:  # three of them find out what it takes
        with pytest.raises(ServerError, match="finished prompts are kept"):
            asked(out, server, concurrency=1)
        assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 4
        server.dies_after = None
        before = len(server.requests)
        found = asked(out, server, concurrency=1)
        later = [body["prompt"] for body in server.requests[before:] if body["max_tokens"] == 5]
    assert found == whole
    assert {tuple(ids) for ids in later} == {tuple(record["prompt_ids"]) for record in whole[3:]}


def test_a_server_that_reads_another_prompt_or_has_several_models_is_an_error(tmp_path: Path) -> None:
    with serve(make_model(), make_tokenizer(chat=True), shift=1) as server:  # a second start token, say
        with pytest.raises(ServerError, match="given as token ids, as 13 tokens, but .* make 12 of it"):
            asked(tmp_path / "out.jsonl", server)
    with serve(make_model(), make_tokenizer(chat=True), names=("a", "b")) as server:
        with pytest.raises(CropiError, match=r"has 2 models \(a, b\); name one with --served-model"):
            asked(tmp_path / "out.jsonl", server)
        assert len(asked(tmp_path / "out.jsonl", server, rows=prompts(1), served_model="b")) == 1
        assert server.requests[-1]["model"] == "b"
    with pytest.raises(ServerError, match="cannot be reached"):
        asked(tmp_path / "none.jsonl", server, retries=0)


@pytest.mark.parametrize("engine", ["openai-url", "vllm"])
def test_a_response_that_an_engine_broke_off_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Neither an end token nor the limit: its last token is not where the policy would have ended."""
    model, tokenizer, made = make_model(), make_tokenizer(chat=True), Served._choice

    def aborted(self: Served, k: int, *rest: Any) -> dict[str, Any]:
        return made(self, k, *rest) | ({"finish_reason": "abort"} if k == 1 else {})

    monkeypatch.setattr(Served, "_choice", aborted)
    with pytest.raises(CropiError, match="a response to 'p0' was ended by 'abort', not by its end token or"):
        if engine == "vllm":
            save_policy(tmp_path / "model", chat=True)
            monkeypatch.setitem(sys.modules, "vllm", stand_in(model, tokenizer, []))
            given: dict[str, Any] = {"engine": "vllm", "n": 2, "max_tokens": 5, "progress": False}
            cropi.rollout(str(tmp_path / "model"), prompts(), reward, tmp_path / "out.jsonl", **given)
        else:
            with serve(model, tokenizer) as server:
                asked(tmp_path / "out.jsonl", server, rows=prompts(1))
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 1, "nothing of it is kept"


# --------------------------------------------------------------------------------------------------- vLLM
@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def stand_in(model: Any, tokenizer: Any, calls: list[dict[str, Any]]) -> types.ModuleType:
    """``vllm`` with the public classes that are used, by their published signatures."""
    module = types.ModuleType("vllm")

    @dataclass
    class SamplingParams:
        n: int = 1
        temperature: float = 1.0
        top_p: float = 1.0
        top_k: int = 0
        seed: int | None = None
        max_tokens: int | None = 16
        logprobs: int | None = None
        stop_token_ids: list[int] | None = None
        skip_special_tokens: bool = True

    class LLM:
        def __init__(
            self, model: str, *, dtype: str = "auto", seed: int = 0, trust_remote_code: bool = False,
            revision: str | None = None, max_model_len: int | None = None, logprobs_mode: str = "raw_logprobs",
        ) -> None:  # fmt: skip
            calls.append({"model": model, "dtype": dtype, "mode": logprobs_mode, "length": max_model_len})
            self.mode = logprobs_mode

        def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[Any]:
            return [
                self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)
            ]

        def _one(self, ids: list[int], s: SamplingParams) -> Any:
            served = Served(model, tokenizer, processed=self.mode == "processed_logprobs")
            body = {
                "seed": s.seed,
                "temperature": s.temperature,
                "max_tokens": s.max_tokens,
                "n": s.n,
                "prompt": ids,
            }
            choices = served.answer("completions", body | {"return_token_ids": True})["choices"]
            outputs = []
            for choice in choices:
                values = choice["logprobs"]["token_logprobs"]
                entries = [{t: Logprob(v)} for t, v in zip(choice["token_ids"], values)]
                outputs.append(
                    types.SimpleNamespace(
                        index=choice["index"], text=choice["text"], token_ids=tuple(choice["token_ids"]),
                        logprobs=entries, finish_reason=choice["finish_reason"], stop_reason=None,
                    )
                )  # fmt: skip
            return types.SimpleNamespace(prompt_token_ids=list(ids), outputs=outputs)

    module.LLM, module.SamplingParams, module.__version__ = LLM, SamplingParams, "0.33.0"  # type: ignore[attr-defined]
    return module


def test_vllm_is_called_for_exact_log_probs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, calls = make_model(), make_tokenizer(chat=True), []
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "vllm", stand_in(model, tokenizer, calls))
    given: dict[str, Any] = {"engine": "vllm", "n": 3, "max_tokens": 5, "progress": False}
    name = str(tmp_path / "model")
    cropi.rollout(name, prompts(), reward, tmp_path / "out.jsonl", temperature=0.7, **given)
    check_exact(model, json_lines(tmp_path / "out.jsonl"))
    assert calls == [{"model": name, "dtype": "auto", "mode": "processed_logprobs", "length": 17}]
    with pytest.raises(CropiError, match="top_k or top_p at temperature 0.7: vLLM gives log-probs of"):
        cropi.rollout(name, prompts(), reward, tmp_path / "x.jsonl", temperature=0.7, top_p=0.9, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cropi.rollout(name, prompts(), reward, tmp_path / "p.jsonl", top_p=0.9, **given)
    assert calls[-1]["mode"] == "raw_logprobs"
    with pytest.raises(CropiError, match="give its folder or hub id, not a module"):
        cropi.rollout(model, prompts(), reward, tmp_path / "m.jsonl", tokenizer, **given)
    # It would sample from the model without the adapter.
    with pytest.raises(
        CropiError, match="adapter='lora': not for --engine vllm; leave it out, or use --engine hf"
    ):
        cropi.rollout(cropi.Policy(name, adapter="lora"), prompts(), reward, tmp_path / "a.jsonl", **given)
    # The folder is trained on, and keeps its name.
    cropi.rollout(name, prompts(), reward, tmp_path / "out.jsonl", temperature=0.7, **given)
    model.lm_head.weight.data += 1.0
    model.save_pretrained(name)
    with pytest.raises(CropiError, match="out.jsonl was begun with another model: model.files = '"):
        cropi.rollout(name, prompts(6), reward, tmp_path / "out.jsonl", temperature=0.7, **given)


def test_vllm_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    save_policy(tmp_path / "model", chat=True)
    with pytest.raises(ModuleNotFoundError, match="pip install vllm"):
        cropi.rollout(
            str(tmp_path / "model"), prompts(), reward, tmp_path / "o.jsonl", engine="vllm", max_tokens=5
        )
