"""Recorded rollouts: what was generated, with the log-probs of the policy that did it, ready for `cropi sketch`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.made_data import make_model, make_tokenizer

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

from support.commands import json_lines  # noqa: E402
from support.trl_runs import SPEC, Seen, dataset, digits, recorded, staged, stored  # noqa: E402
from support.versions import needs  # noqa: E402

from cropi.data.readers import read  # noqa: E402
from cropi.data.scan import scan  # noqa: E402
from cropi.errors import CropiError  # noqa: E402
from cropi.model.policy import Policy  # noqa: E402
from cropi.sketching.job import SketchJob  # noqa: E402
from cropi.sketching.run import sketch  # noqa: E402
from cropi.store.store import SketchStore  # noqa: E402
from cropi.trainers.newest import merge_rollouts  # noqa: E402
from cropi.trainers.trl import Live, Recording, collect  # noqa: E402

LOG = "cropi/rollouts/train-rank00000.jsonl"
# float32 logits of size 10 divided by the temperature, a sum over 97 words, and six recorded decimals.
TOLERANCE = 97 * 2.0**-24 * 10 / 0.7 + 1e-6


def exact_logprobs(model: Any, record: dict[str, Any], k: int) -> torch.Tensor:
    ids = record["prompt_ids"] + record["response_ids"][k]
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0] / record["temperature"]
    start = len(record["prompt_ids"])
    return torch.log_softmax(logits, dim=-1)[torch.arange(start - 1, len(ids) - 1), ids[start:]]


# Of responses without an end TRL computes no log-probs, in either way.
MASKED = {"mask_truncated_completions": True, "max_completion_length": 48}


# A policy that stays put within a generation (its log-probs come from the loss), the same cut in two micro-batches, and
# two passes over each generation (TRL computes "old" log-probs itself).
@pytest.mark.long
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"num_iterations": 2},
        {"per_device_train_batch_size": 4, "steps_per_generation": 2},
        MASKED,
        MASKED | {"num_iterations": 2},
    ],
    ids=["one-batch", "accumulated", "two-passes", "two-steps", "masked", "masked-two-passes"],
)
def test_logprobs_are_those_of_the_sampling_policy(shape: dict[str, Any], tmp_path: Path) -> None:
    seen = Seen()
    trainer = recorded(
        tmp_path,
        reward_funcs=seen,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-2,
        **shape,
    )
    policies = {0: make_model()}
    trainer.train()
    records = json_lines(tmp_path / LOG)
    steps = sorted({record["step"] for record in records})
    assert len(steps) >= 2 and [r["step"] for r in records] == sorted(r["step"] for r in records)
    assert {s: list(dict.fromkeys(i)) for s, i in seen.ids.items()} == {
        s: [r["id"] for r in records if r["step"] == s] for s in steps
    }
    worst = away = 0.0
    for record in records:
        step = record["step"]
        if step not in policies:
            from transformers import AutoModelForCausalLM

            policies[step] = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert record["temperature"] == 0.7 and len(record["rewards"]) == 4
        for k, ids in enumerate(record["response_ids"]):
            got = torch.tensor(record["logprobs"][k], dtype=torch.float64)
            assert len(got) == len(ids)
            worst = max(worst, float((got - exact_logprobs(policies[step], record, k)).abs().max()))
            if step:
                away = max(away, float((got - exact_logprobs(policies[0], record, k)).abs().max()))
    if "mask_truncated_completions" in shape:
        assert {True, False} == {cut for record in records for cut in record["truncated"]}
    assert worst < TOLERANCE
    assert away > 100 * worst  # the policy did move, so another step's log-probs would have shown


@pytest.mark.long
def test_file_goes_through_the_sketcher_with_ratio_one(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, max_steps=2, learning_rate=0.0)
    trainer.train()
    merged = tmp_path / "train.jsonl"
    assert merge_rollouts([tmp_path / LOG], merged) == len({r["id"] for r in json_lines(tmp_path / LOG)})
    found = scan([merged])
    assert found.with_ids == found.with_logprobs == found.prompts and not found.bad
    job = SketchJob(trajectories=[merged], out=tmp_path / "store", spec=SPEC, behaviour="auto")
    summary = sketch(Policy(make_model(), make_tokenizer()), job, progress=False)
    rows = SketchStore.open(tmp_path / "store").rows()
    used = [row for row in rows if row.status == "ok"]
    assert summary.sketched == len(used) == found.usable > 0 and len(rows) == found.prompts
    for row in used:  # weights that have not moved: pi = beta
        assert row.extra["ratio"] == pytest.approx(1.0, abs=1e-4), row.id


@pytest.mark.long
def test_training_is_not_changed(tmp_path: Path) -> None:
    from support.trl_runs import arguments
    from trl import GRPOTrainer

    plain = GRPOTrainer(
        model=make_model(), reward_funcs=digits, args=arguments(tmp_path / "plain", max_steps=3),
        train_dataset=dataset(20), processing_class=make_tokenizer(),
    )  # fmt: skip
    plain.train()
    ours = recorded(tmp_path / "ours", max_steps=3)  # a new trainer sets the seed again
    ours.train()
    start = make_model()
    assert not torch.equal(start.lm_head.weight, ours.model.lm_head.weight.cpu())
    for (name, a), b in zip(plain.model.named_parameters(), ours.model.parameters()):
        assert torch.equal(a, b), name


def test_record_holds_what_was_generated(tmp_path: Path) -> None:
    kept: list[tuple[str, str, float]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        values = digits(completions)
        kept.extend(zip(columns["id"], completions, values))
        return values

    def second(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if "0" in text else 1.0 for text in completions]

    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[1] *= 30  # the end is likely now and then
    options = {"reward_funcs": [reward, second], "reward_weights": [2.0, 0.5]}
    trainer = recorded(tmp_path, model=model, max_steps=3, **options)
    trainer.train()
    tokenizer = make_tokenizer()
    flat = [(r["id"], t, w) for r in json_lines(tmp_path / LOG) for t, w in zip(r["responses"], r["rewards"])]
    assert flat == [(i, text, pytest.approx(2 * v + (0.0 if "0" in text else 0.5))) for i, text, v in kept]
    for record in json_lines(tmp_path / LOG):
        assert tokenizer.decode(record["prompt_ids"]) == record["prompt"] and record["task"] in (
            "sum0",
            "sum1",
        )
        assert record["answer"] == str(eval(record["prompt"][:-1]))
        for ids, text, cut in zip(record["response_ids"], record["responses"], record["truncated"]):
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert cut == (ids[-1] != 1) and len(ids) <= 8
    cuts = [cut for record in json_lines(tmp_path / LOG) for cut in record["truncated"]]
    assert len(cuts) == len(kept) == 24 and 4 <= sum(cuts) <= 20, "some end by themselves, some are cut"


@pytest.mark.long
def test_responses_without_a_score_are_left_out(tmp_path: Path) -> None:
    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if k % 4 == 1 or i == "p0-003" else k / 4 for k, i in enumerate(columns["id"])]

    trainer = recorded(tmp_path, reward_funcs=reward, train_dataset=dataset(4), max_steps=4)
    trainer.train()
    records = json_lines(tmp_path / LOG)
    assert {r["id"] for r in records} == {"p0-000", "p0-001", "p0-002"}
    for record in records:
        sizes = {
            len(record[key]) for key in ("rewards", "responses", "response_ids", "logprobs", "truncated")
        }
        assert sizes == {3} and all(map(math.isfinite, record["rewards"]))


def test_evaluations_are_recorded_by_set(tmp_path: Path) -> None:
    sets = {"x": dataset(2, seed=1), "y": dataset(3, seed=2)}
    trainer = recorded(tmp_path, Recording(text=False), eval_dataset=sets, per_device_eval_batch_size=4)
    trainer.evaluate()
    groups = list(read(tmp_path / "cropi/rollouts/valid-rank00000.jsonl"))
    assert [(g.id[:2], g.set) for g in groups] == [("p1", "x")] * 2 + [("p2", "y")] * 3
    assert all(g.logprobs and g.responses is None and g.prompt is None for g in groups)


def test_without_logprobs(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, Recording(logprobs=False, folder=tmp_path / "here"), max_steps=1)
    trainer.train()
    (group, _) = read(tmp_path / "here/train-rank00000.jsonl")
    assert group.logprobs is None and group.response_ids


@pytest.mark.long
def test_a_loss_of_its_own_is_an_error_not_a_loss_of_logprobs(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    from cropi.trainers.trl import recording

    class Own(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return model(inputs["completion_ids"]).logits.sum()

    from support.trl_runs import arguments

    trainer = recording(Own)(
        model=make_model(), reward_funcs=digits, args=arguments(tmp_path), train_dataset=dataset(20),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    with pytest.raises(CropiError, match="logprobs=False"):
        trainer.train()


@pytest.mark.long
@pytest.mark.parametrize("live", [False, True], ids=["recorded", "live"])
def test_a_trainer_that_replays_other_responses_is_an_error(live: bool, tmp_path: Path) -> None:
    """As GRPOWithReplayBufferTrainer of TRL 1.8 to 1.13: groups of equal rewards give way to earlier ones."""
    from trl import GRPOTrainer

    class Replaying(GRPOTrainer):
        kept: Any = None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            self.kept = made if self.kept is None else self.kept
            return made | {
                name: self.kept[name] for name in made if name.startswith(("prompt", "completion"))
            }

    if live:
        stages = {"live": Live(), "recording": None, "valid": stored(tmp_path / "v.jsonl", seed=1, count=4)}
        trainer = staged(tmp_path, stages, base=Replaying, max_steps=2)
    else:
        trainer = recorded(tmp_path, base=Replaying, max_steps=2)
    with pytest.raises(CropiError, match="Replaying trains on other responses than those that it generated"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(True, id="its-logprobs", marks=needs("trl", "1.16", "it takes no others")),
        pytest.param(False, id="trls"),
    ],
)
def test_what_an_environment_wrote_is_masked(given: bool, tmp_path: Path) -> None:
    """A rollout function's own tokens stand in the responses, with what it says of them, and are not scored."""
    mask, made = [1, 0, 0, 1], iter(range(1000))

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [[5 + next(made) % 60, 7, 8, 9] for _ in prompts]
        known = [[-0.5, float("nan"), None, -1.0] for _ in prompts]
        prompt_ids = [make_tokenizer()(prompt)["input_ids"] for prompt in prompts]
        return {
            "prompt_ids": prompt_ids, "completion_ids": ids, "env_mask": [mask] * len(ids),
            "logprobs": known if given else None,
        }  # fmt: skip

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(ids[0] % 3) for ids in completion_ids]

    trainer = recorded(tmp_path, max_steps=2, learning_rate=0.0, rollout_func=rollout, reward_funcs=reward)
    trainer.train()
    records = json_lines(tmp_path / LOG)
    assert len({ids[0] for record in records for ids in record["response_ids"]}) == 16
    for record, group in zip(records, read(tmp_path / LOG), strict=True):
        assert group.loss_mask == record["loss_mask"] == [mask] * 4
        for k, got in enumerate(group.logprobs):
            want = torch.tensor([-0.5, 0.0, 0.0, -1.0]) if given else exact_logprobs(make_model(), record, k)
            assert (torch.tensor(got) - want).abs().max() < TOLERANCE


@pytest.mark.long
def test_what_tools_answered_is_masked(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    class Calls(GRPOTrainer):
        """Whatever is sampled calls a tool, which answers with two tokens; one more of the policy's follows."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.tools = [print]

        def _tool_call_loop(
            self,
            prompts: Any,
            prompt_ids: Any,
            completion_ids: Any,
            completions: Any,
            logprobs: Any,
            *rest: Any,
        ) -> Any:
            masks = [[1] * len(ids) + [0, 0, 1] for ids in completion_ids]
            return masks, completions, [[*ids, 7, 8, 9] for ids in completion_ids], logprobs, 0, 0, []

    trainer = recorded(tmp_path, base=Calls, max_steps=2, learning_rate=0.0)
    trainer.train()
    records, model = json_lines(tmp_path / LOG), make_model()
    assert len(records) == 4
    for record, group in zip(records, read(tmp_path / LOG), strict=True):
        assert group.loss_mask == [[1] * (len(ids) - 3) + [0, 0, 1] for ids in record["response_ids"]]
        for k, ids in enumerate(record["response_ids"]):
            assert ids[-3:] == [7, 8, 9]
            assert (
                torch.tensor(group.logprobs[k]) - exact_logprobs(model, record, k)
            ).abs().max() < TOLERANCE


# Tools are listed by their number; whatever holds a digit from 0 to 4 is a call of the tool `look`.
TOOLS = (
    "{% if tools %}T{{ tools | length }}{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m.get('content') or '' }}"
    "{% for c in m.get('tool_calls') or [] %}[{{ c.function.name }}{{ c.function.arguments | tojson }}]{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"name": "look", "arguments": {"where": "{content}"}}
PARSED = {
    "defaults": {"role": "assistant"}, "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open_pattern": "[0-4]", "close_pattern": "[^0-4]", "repeats": True, "content": "text",
            "transform": {"type": "function", "function": CALL},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}  # fmt: skip


class Room:
    """An environment: what a prompt shows at first, by its row, and what its tool says."""

    def reset(self, answer: str, **row: Any) -> str:
        return f" at {answer}"

    def look(self, where: str) -> str:
        """Look around.

        Args:
            where: a place.
        """
        return "SEEN"


class Restless(Room):
    made = 0

    def reset(self, answer: str, **row: Any) -> str:
        Restless.made += 1
        return f" at {Restless.made}"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_environments_that_show_all_responses_the_same_are_recorded(tmp_path: Path) -> None:
    """Their first words are the prompt's, what tools say is masked; others are an error at the first batch."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 15):
        pytest.skip("TRL parses such calls by templates of transformers 5.15")
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = TOOLS, PARSED
    data = dataset(20).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(len(set(ids))) for ids in completion_ids]

    policy = make_model()
    # Responses are short: tools have room to answer.
    policy.generation_config.eos_token_id = [1, *range(60, 72)]
    given = dict(
        model=policy, processing_class=tokenizer, train_dataset=data, eval_dataset=None, reward_funcs=reward,
        max_steps=2, learning_rate=0.0, max_completion_length=48, max_tool_calling_iterations=1,
    )  # fmt: skip
    recorded(tmp_path, **given, environment_factory=Room).train()
    records, model, answers = json_lines(tmp_path / LOG), make_model(), 0
    for record, group in zip(records, read(tmp_path / LOG), strict=True):
        assert f" at {record['answer']}<assistant>" in tokenizer.decode(record["prompt_ids"])
        for k, (ids, mask) in enumerate(zip(group.response_ids, group.loss_mask, strict=True)):
            written = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if not own])
            answers += "SEEN" in written
            assert not written or "SEEN" in written and "SEEN" in tokenizer.decode(ids)
            error = torch.tensor(group.logprobs[k]) - exact_logprobs(model, record, k)
            assert (error * torch.tensor(mask)).abs().max() < TOLERANCE
    assert answers
    given["train_dataset"] = data.remove_columns("prompt")  # which the environments own then
    recorded(tmp_path / "bare", **given, environment_factory=Room).train()
    bare = json_lines(tmp_path / "bare" / LOG)
    assert all("prompt" not in record and record["prompt_ids"] for record in bare) and len(bare) == 4
    restless = recorded(tmp_path / "other", **given, environment_factory=Restless)
    with pytest.raises(
        CropiError, match="prompts of different tokens.*let an environment's reset say the same to all"
    ):
        restless.train()


def test_collect_writes_a_trajectory_file_of_a_dataset(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, Recording(text=False), num_generations_eval=3, per_device_eval_batch_size=6)
    for name, out in ((None, tmp_path / "train.jsonl"), ("sums", tmp_path / "valid.jsonl")):
        assert collect(trainer, dataset(5, seed=4), out, set=name) == 5
        groups = list(read(out))
        assert [group.id for group in groups] == [f"p4-{i:03d}" for i in range(5)]
        assert all(group.size == 3 and group.set == name and group.logprobs for group in groups)
    assert not list((tmp_path).glob(".*")) and not (tmp_path / "cropi").exists()
    worst = max(
        float((torch.tensor(line).double() - exact_logprobs(make_model(), record, k)).abs().max())
        for record in json_lines(tmp_path / "train.jsonl")
        for k, line in enumerate(record["logprobs"])
    )
    assert worst < TOLERANCE
    with pytest.raises(CropiError, match="dataset has no column 'id'"):
        collect(trainer, dataset(5, id=None), tmp_path / "no.jsonl")
    with pytest.raises(
        CropiError, match="set is 'sums', and row 0 of dataset has the set 'others': collect each"
    ):
        collect(trainer, dataset(5, set="others"), tmp_path / "no.jsonl", set="sums")
    with pytest.raises(CropiError, match="set is '': give the name of a validation set"):
        collect(trainer, dataset(5), tmp_path / "no.jsonl", set="")
    with pytest.raises(CropiError, match="must be one of recording"):
        collect(object(), dataset(5), tmp_path / "no.jsonl")
    trainer.args.bf16_full_eval = True  # transformers would round the policy, and leave it so
    with pytest.raises(
        CropiError, match="bf16_full_eval is True: .* rounds the trainer's own model to torch.bfl"
    ):
        collect(trainer, dataset(5), tmp_path / "no.jsonl")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    for p in trainer.model.parameters():
        p.data = p.data.bfloat16()
    with pytest.raises(
        CropiError, match=r"bf16_full_eval is True: .* \(model.rotary_emb.inv_freq, for example"
    ):
        collect(trainer, dataset(5), tmp_path / "no.jsonl")
    trainer.args.bf16_full_eval = False
    trainer.args.per_device_eval_batch_size = 4
    with pytest.raises(CropiError, match="batch_size 4 is not a multiple of num_generations_eval 3, .* to 6"):
        collect(trainer, dataset(5), tmp_path / "no.jsonl")
