"""Rollouts by the embedded engine: exact log-probs, the same file after a kill, rewards and inputs that are wrong."""

from __future__ import annotations

import errno
import json
import shlex
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.commands import json_lines
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines
from support.oracle import response_logprobs
from support.versions import needs

import cropi
from cropi.errors import CropiError, RecordError
from cropi.rollouts import trial
from cropi.rollouts.file import RolloutFile
from cropi.rollouts.generate import past
from cropi.rollouts.hf import FewerRows, HfEngine
from cropi.rollouts.job import OneResponse


def prompts(count: int = 7) -> list[dict[str, Any]]:
    """Prompts of different lengths with a common beginning."""
    system = {"role": "system", "content": "say it"}
    asked = [{"role": "user", "content": f"{'7' * (i % 4 + 1)}+{i}="} for i in range(count)]
    return [{"id": f"p{i}", "prompt": [system, turn], "answer": str(i)} for i, turn in enumerate(asked)]


def has_digit(prompt: Any, response: str, answer: str) -> float:
    return float(answer in response)


def rolled(
    out: Path, model: Any, tokenizer: Any = None, asked: Any = None, **options: Any
) -> list[dict[str, Any]]:
    given = {"n": 4, "max_tokens": 10, "progress": False, "rows": 12} | options
    tokenizer = tokenizer or make_tokenizer(chat=True)
    cropi.rollout(model, asked or prompts(), given.pop("reward", has_digit), out, tokenizer, **given)
    return json_lines(out)


def teacher_forced(model: Any, record: dict[str, Any], k: int) -> torch.Tensor:
    """Log-probs in float64 of one response alone, in a pass without cache and padding."""
    wide = type(model)(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    return response_logprobs(
        wide, record["prompt_ids"], record["response_ids"][k], record["temperature"]
    ).detach()


@pytest.mark.parametrize(
    ("kind", "changes", "way", "temperature"),
    [
        ("llama", {}, "shared", 0.7),
        ("gpt2", {}, "shared", 1.0),
        ("bloom", {}, "shared", 1.3),
        ("mistral", {"sliding_window": 6}, "padded", 0.7),
        pytest.param(
            "lfm2",
            {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
            "padded",
            1.0,
            marks=needs("transformers", "5.23", "it does not decode with a cache"),
        ),
    ],
)
def test_log_probs_are_those_of_the_response_alone(
    tmp_path: Path, kind: str, changes: Any, way: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind, **changes)
    taken: list[str] = []
    real = trial.way_of
    monkeypatch.setattr("cropi.rollouts.hf.way_of", lambda *args: taken.append(real(*args)) or taken[-1])
    records = rolled(tmp_path / "out.jsonl", model, temperature=temperature)
    assert taken == [way]
    assert [record["id"] for record in records] == [f"p{i}" for i in range(7)]
    eps = torch.finfo(torch.float32).eps
    for record in records:
        assert record["temperature"] == temperature
        for k in range(4):
            ids = record["response_ids"][k]
            assert record["truncated"][k] == (ids[-1] != 1) and 1 not in ids[:-1] and len(ids) <= 10
            want = teacher_forced(model, record, k)
            got = torch.tensor(record["logprobs"][k], dtype=torch.float64)
            # A few hundred roundings of logits of size 10, as in any float32 pass.
            torch.testing.assert_close(got, want, rtol=0, atol=300 * 10 * eps)


def test_an_adapter_is_part_of_the_policy_that_samples(tmp_path: Path) -> None:
    """The records are of the model with its adapter, and only the logits that are drawn from are computed."""
    peft = pytest.importorskip("peft")
    model = make_model()
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=64)
    )
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    records = rolled(tmp_path / "out.jsonl", made.eval())
    kept = sizes[:]
    for record in records:
        want = response_logprobs(made, record["prompt_ids"], record["response_ids"][0]).detach()
        torch.testing.assert_close(torch.tensor(record["logprobs"][0]), want, rtol=0, atol=1e-4)
    assert max(kept) <= 16  # no pass over a prompt has the logits of all its tokens


class Places(torch.nn.Module):
    """A wrapper that makes a model take the column for the position, whatever it is told."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        self.dtype = model.dtype

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs["position_ids"] = torch.arange(start, start + input_ids.shape[1])[None]
        return self.model(input_ids, **past(self.model, past_key_values), **inputs)


class Forgets(Places):
    """One whose cache is not read."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        inputs.pop("attention_mask", None)
        return self.model(input_ids, position_ids=inputs.get("position_ids"), use_cache=False)


class Beside(Places):
    """One that keeps what it has read beside its cache, by the place in the batch, as RecurrentGemma does."""

    read: torch.Tensor

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        begun = past_key_values is not None and input_ids.shape[1] == 1
        self.read = torch.cat([self.read, input_ids], 1) if begun else input_ids
        return self.model(self.read, use_cache=False)


class Renamed(Places):
    """One that has its cache under the name of transformers 5.24, and no other."""

    def forward(self, input_ids: torch.Tensor, cache: Any = None, **inputs: Any) -> Any:
        assert "past_key_values" not in inputs
        return self.model(input_ids, **past(self.model, cache), **inputs)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_keys_and_values_go_in_by_the_name_that_the_model_has(tmp_path: Path) -> None:
    model = make_model()
    policy = cropi.Policy(Renamed(model), make_tokenizer(chat=True), name="llama")
    close_to_teacher_forced(model, rolled_policy(tmp_path / "out.jsonl", policy))


def test_a_model_that_padding_moves_is_given_prompts_of_one_length(tmp_path: Path) -> None:
    """GPT-2's positions are absolute, so that a column in place of a position shows."""
    model = make_model("gpt2")
    assert trial.way_of(Places(model), 20) == "alone"
    asserting = Places(model)
    asserting.forward = mock.Mock(side_effect=AssertionError("one token"))  # type: ignore[method-assign]
    for wrong, said in ((Forgets(model), "--engine vllm or"), (Beside(model), ""), (asserting, "one token")):
        with pytest.raises(CropiError, match=f"{type(wrong).__name__} does not decode with a cache.*{said}"):
            trial.way_of(wrong, 20)
    # A window of its own code (the cache has none), which a beginning that is shared moves, and only responses reach.
    window = make_model("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=32)
    assert [trial.way_of(window, 20, more) for more in (0, 20)] == ["shared", "padded"]
    policy = cropi.Policy(Places(model), make_tokenizer(chat=True), name="gpt2")
    close_to_teacher_forced(model, rolled_policy(tmp_path / "out.jsonl", policy))


def close_to_teacher_forced(model: Any, records: list[dict[str, Any]]) -> None:
    assert records
    for record in records:
        want = teacher_forced(model, record, 0)
        got = torch.tensor(record["logprobs"][0], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=300 * 10 * torch.finfo(torch.float32).eps)


def rolled_policy(out: Path, policy: Any) -> list[dict[str, Any]]:
    cropi.rollout(policy, prompts(), has_digit, out, n=2, max_tokens=6, progress=False)
    return json_lines(out)


def test_what_is_sampled_is_the_policys_distribution(tmp_path: Path) -> None:
    """The first tokens of many responses against the probabilities of one plain pass."""
    model = make_model()
    (record,) = rolled(tmp_path / "out.jsonl", model, asked=prompts(1), n=3000, max_tokens=1)
    with torch.no_grad():
        p = model(torch.tensor([record["prompt_ids"]])).logits[0, -1].double().softmax(0)
    counts = torch.bincount(torch.tensor(record["response_ids"])[:, 0], minlength=len(p)).double()
    chi = float(((counts - 3000 * p) ** 2 / (3000 * p)).sum())
    degrees = len(p) - 1
    assert abs(chi - degrees) < 5 * (2 * degrees) ** 0.5


def test_every_end_token_of_the_generation_config_ends_a_response(tmp_path: Path) -> None:
    model = make_model()
    model.generation_config.eos_token_id = list(range(1, 40))
    records = rolled(tmp_path / "out.jsonl", model)
    ends = [0 < ids[-1] < 40 for record in records for ids in record["response_ids"]]
    assert not any(
        0 < token < 40 for record in records for ids in record["response_ids"] for token in ids[:-1]
    )
    assert ends == [not cut for record in records for cut in record["truncated"]] and any(ends)


@pytest.mark.long
def test_the_batch_changes_rounding_alone(tmp_path: Path) -> None:
    model = make_model()
    whole = rolled(tmp_path / "a.jsonl", model)
    single = [rolled(tmp_path / f"{i}.jsonl", model, asked=[row])[0] for i, row in enumerate(prompts())]
    for a, b in zip(whole, single):
        assert a["response_ids"] == b["response_ids"] and a["rewards"] == b["rewards"]
        for x, y in zip(a["logprobs"], b["logprobs"]):
            torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=0, atol=3e-5)


@pytest.mark.long
def test_the_records_go_into_a_sketch_with_ratio_one(tmp_path: Path) -> None:
    """The look at the stored log-probs passes, and the effective sample size is whole, also under top-p."""
    model, tokenizer = make_model(), make_tokenizer(chat=True)
    for number, options in enumerate(({"temperature": 0.7}, {"top_p": 0.8})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rolled(tmp_path / f"{number}.jsonl", model, tokenizer, **options)
            warnings.simplefilter("error", category=UserWarning)
            store = cropi.sketch(
                model, str(tmp_path / f"{number}.jsonl"), tokenizer, dim=1024, progress=False,
                estimator="ppo", behaviour="file",
            )  # fmt: skip
        assert len(store) == 7


def test_a_run_that_is_killed_and_continued_gives_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before every batch in turn, and in the middle of a line: the bytes are those of a run in one go."""
    model = make_model()
    rolled(tmp_path / "whole.jsonl", model)
    out, sample, left = tmp_path / "out.jsonl", HfEngine.sample, [0]

    def stopping(self: HfEngine, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return sample(self, *args)

    monkeypatch.setattr(HfEngine, "sample", stopping)
    for batches in (1, 1, 9):
        left[0] = batches
        try:
            rolled(out, model)
        except KeyboardInterrupt:
            assert not out.exists()
            with open(tmp_path / "out.jsonl.part", "ab") as file:
                file.write(b'{"id": "p3", "prom')  # a line that a kill left
    assert left[0] > 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.part").exists()


def test_a_finished_file_takes_more_prompts_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = make_model(), tmp_path / "out.jsonl"
    first = rolled(out, model, asked=prompts(4))
    more = rolled(out, model, asked=prompts(6))
    assert more[:4] == first and len(more) == 6
    with pytest.raises(CropiError, match=r"out.jsonl:1 holds a record that was not made with these settings"):
        rolled(out, model, seed=1)
    with pytest.raises(CropiError, match="weights"):
        rolled_part(out, model)
    assert json_lines(out) == more
    # What it has begun meanwhile cannot be removed, as in a folder that became read-only: the same error.
    with monkeypatch.context() as disk, pytest.raises(CropiError, match="not made with these settings"):
        disk.setattr(Path, "unlink", refuse)
        rolled(out, model, seed=1)


def refuse(path: Path, missing_ok: bool = False) -> None:
    raise OSError(errno.EROFS, "no", str(path))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"answer": "8"}, "answer = '1', and now it is '8'"),
        ({"prompt": "other"}, "prompt = .* and now it is 'other'"),
        ({"task": "sums"}, "task = None, and now it is 'sums'"),
    ],
)  # fmt: skip
def test_records_of_a_prompt_that_has_changed_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], named: str, finished: bool
) -> None:
    model, out, asked = make_model(), tmp_path / "out.jsonl", prompts(4)
    with monkeypatch.context() as patched, nullcontext() if finished else pytest.raises(KeyboardInterrupt):
        if not finished:
            patched.setattr(RolloutFile, "finish", interrupted)
        rolled(out, model, asked=prompts(3))
    held = out if finished else out.with_name("out.jsonl.part")
    before = held.read_bytes()
    asked[1] |= change
    with pytest.raises(CropiError, match=f"{held.name} holds the prompt 'p1' with {named}"):
        rolled(out, model, asked=asked)
    assert held.read_bytes() == before
    # A prompt that is left out now may be there with anything.
    rest = [asked[0], *asked[2:]]
    assert [record["id"] for record in rolled(out, model, asked=rest)] == ["p0", "p2", "p3"]


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


def rolled_part(out: Path, model: Any) -> None:
    """A part file of other weights stands there."""
    held = '{"cropi_rollout": {"weights": "xxh3:00"}}\n'
    part = out.with_name("other.jsonl.part")
    part.write_text(held)
    try:
        rolled(out.with_name("other.jsonl"), model)
    except CropiError as error:
        assert part.read_text() == held
        raise CropiError(f"weights: {error}") from error


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
def test_memory_that_runs_out_makes_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    from cropi.rollouts import hf

    real, model = hf.generate, make_model()
    expected = rolled(tmp_path / "a.jsonl", model)

    def small(model: Any, batch: Any, n: int, *args: Any, **options: Any) -> Any:
        if len(batch) > 1:
            raise full
        return real(model, batch, n, *args, **options)

    monkeypatch.setattr(hf, "generate", small)
    with pytest.warns(FewerRows, match="memory ran out with (12|8) responses") as said:
        found = rolled(tmp_path / "b.jsonl", model)
    assert len(said) >= 2
    assert [r["response_ids"] for r in found] == [r["response_ids"] for r in expected]
    monkeypatch.setattr(
        hf, "generate", lambda *args, **options: small(*args[:1], [1, 2], *args[2:], **options)
    )
    with pytest.raises(CropiError, match="give a smaller -n or --max-tokens"):
        rolled(tmp_path / "c.jsonl", model)


def test_prompts_of_a_trajectory_file_are_rolled_out_again(tmp_path: Path) -> None:
    old = write_lines(tmp_path / "old.jsonl", make_records(3))
    made = rolled(tmp_path / "new.jsonl", make_model(), make_tokenizer(), asked=str(old))
    for before, after in zip(json_lines(old), made):
        same = ("id", "prompt", "answer", "task")
        assert [before[key] for key in same] == [after[key] for key in same]
        assert after["responses"] != before["responses"] and len(after["rewards"]) == 4


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"id": "p0"}, r"prompts\[3\]: the prompt id 'p0' was used before, at prompts\[0\]"),
        ({"prompt": None, "question": "1+1"}, r"did you mean --columns prompt=question\?"),
        ({"prompt": "7" * 200}, "a response may have 10, but the model's context is 128"),
        ({"images": ["a.png"]}, "'images' is known, but not supported"),
        ({"prompt_ids": [3, 900]}, "beyond the model's vocabulary"),
        ({"id": None}, "the key 'id' is missing or null"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named_before_work_begins(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    rows = prompts()
    rows[3] = {key: value for key, value in (rows[3] | change).items() if value is not None}
    with pytest.raises(RecordError, match=problem):
        rolled(tmp_path / "out.jsonl", make_model(), asked=rows)
    assert not list(tmp_path.iterdir())
    report = cropi.rollout(
        make_model(), rows, has_digit, tmp_path / "out.jsonl", make_tokenizer(chat=True), n=2, max_tokens=10,
        progress=False, skip_bad=True,
    )  # fmt: skip
    assert report.prompts == 6 and len(report.skipped) == 1
    assert "left out" in report.text() and "--skip-bad" not in report.text()


def test_one_response_a_prompt_is_said_to_have_no_gradient(tmp_path: Path) -> None:
    with pytest.warns(OneResponse, match=r"n is 1: .* has no gradient, .* \(in Python n=\)$"):
        rolled(tmp_path / "out.jsonl", make_model(), asked=prompts(1), n=1, max_tokens=1)


def test_options_of_another_engine_are_refused(tmp_path: Path) -> None:
    for options, problem in (
        ({"url": "http://localhost:1"}, "leave --url out"),
        ({"timeout": 9.0}, "leave --timeout out"),
        ({"retries": 2}, "leave --retries out"),
        (
            {"api_key": "KEY"},
            "api_key is for --engine openai-url, and the engine is 'hf'; leave --api-key out",
        ),
        ({"engine": "openai-url", "dtype": "float32"}, "the server has them; leave --dtype out"),
        ({"engine": "openai-url", "quantize": "4bit"}, "the server has them; leave --quantize out"),
        ({"engine": "openai-url", "rows": None}, "needs the server's --url"),
        ({"engine": "openai-url", "url": "localhost", "rows": None}, "is not a URL of a server"),
        ({"engine": "openai-url", "url": "http://localhost:1"}, "leave --rows out"),
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"top_k": -2}, "top_k must be 0 or more"),
        ({"retries": -1}, "retries must be 0 or more"),
        ({"tempreture": 1.0}, "did you mean 'temperature'"),
    ):
        with pytest.raises(CropiError, match=problem):
            rolled(tmp_path / "out.jsonl", make_model(), **options)


@pytest.mark.long
def test_the_three_commands_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts alone name the command, and what it writes is selected from; as they stand there, but for the model."""
    from cropi.cli import main

    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = next(part for part in readme.split("```") if "cropi rollout" in part)
    commands = [shlex.split(line)[1:] for line in block.strip().splitlines()]
    assert [words[0] for words in commands] == ["rollout", "rollout", "run"]
    monkeypatch.chdir(tmp_path)
    save_policy("model", chat=True, max_position_embeddings=64)
    (tmp_path / "reward.py").write_text("def f(prompt, response, answer): return len(set(response)) / 10\n")
    write_lines(tmp_path / "prompts.jsonl", prompts(10))
    write_lines(tmp_path / "math500.jsonl", prompts(4))
    own = {"Qwen/Qwen2.5-0.5B-Instruct": "model", "512": "8", "math": "reward.py:f"}
    quick = {"rollout": ["-n", "3"], "run": ["--dim", "1024", "--no-report", "--draws", "0"]}
    for words in commands:
        assert main([*(own.get(word, word) for word in words), *quick[words[0]], "--no-progress"]) == 0
    assert len((tmp_path / "out" / "selected.jsonl").read_text().splitlines()) == 1
    capsys.readouterr()
    words = [
        "--model",
        "model",
        "--prompts",
        "math500.jsonl",
        "--reward",
        "reward.py:f",
        "--out",
        "math.jsonl",
        "--json",
    ]
    assert main(["rollout", *words, "-n", "3", "--max-tokens", "8", "-q"]) == 0  # nothing is left to be done
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["prompts"], told["responses"], told["mean_reward"]) == (
        "math.jsonl",
        4,
        0,
        None,
    )


def test_a_run_on_prompts_alone_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cropi.cli import main

    path = write_lines(tmp_path / "prompts.jsonl", prompts(3))
    save_policy(tmp_path / "model", chat=True)
    words = ["--model", str(tmp_path / "model"), "--train", str(path), "--valid", str(path)]
    assert main(["run", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "prompts" in said and "`cropi rollout" in said and str(path) in said


def test_the_bar_counts_the_tokens_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch of all prompts shows how far it is before the first prompt is finished."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    rolled(tmp_path / "out.jsonl", make_model("llama"), rows=64, max_tokens=3, progress=True)
    shown = capsys.readouterr().err
    assert 0 < shown.index("token 1 of at most 3") < shown.index("token 3 of at most 3") < shown.index("7/7")
