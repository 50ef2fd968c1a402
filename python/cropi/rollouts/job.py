"""A rollout from prompts to the file of records: what is checked before, what is sampled, what each record holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cropi.amounts import counted
from cropi.data.records import make_group
from cropi.data.rewards import no_gradient_reason
from cropi.errors import CropiError, RecordError, warn
from cropi.gradient.tokenize import Tokenize
from cropi.progress import bar_of
from cropi.rollouts.engine import Engine, Request, Response
from cropi.rollouts.file import SCORER, RolloutFile
from cropi.rollouts.options import Rollout, Sampling
from cropi.rollouts.prompts import Prompt
from cropi.rollouts.rewards import Reward


@dataclass
class RolloutReport:
    """What a rollout did.

    Attributes:
        out: the file.
        prompts: records in it.
        responses, tokens: how many were sampled in this run.
        seconds: how long sampling took.
        mean_reward: over all responses of this run; NaN without responses.
        mixed: prompts of this run whose rewards are not all equal: those that have a gradient.
        truncated: responses of this run that ``max_tokens`` cut.
        skipped: the errors of prompts that were left out.

    >>> report = RolloutReport(Path("train.jsonl"), prompts=2, responses=8, tokens=400, seconds=2.0, mean_reward=0.5,
    ...     mixed=2)
    >>> print(report)
    records       train.jsonl: 2 prompts
    sampled       8 responses, 400 tokens, 200 tokens a second
    rewards       mean 0.5; 2 prompts have different rewards, and so a gradient; 0 responses were cut
    """

    out: Path
    prompts: int = 0
    responses: int = 0
    tokens: int = 0
    seconds: float = 0.0
    mean_reward: float = math.nan
    mixed: int = 0
    truncated: int = 0
    skipped: list[RecordError] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """For people, a few lines."""
        lines = [f"records       {self.out}: {counted(self.prompts, 'prompt')}"]
        if self.responses:
            rate = f", {self.tokens / self.seconds:.0f} tokens a second" if self.seconds > 0 else ""
            lines.append(f"sampled       {counted(self.responses, 'response')}, {self.tokens} tokens{rate}")
            lines.append(
                f"rewards       mean {self.mean_reward:.3g}; {self.mixed} prompts have different rewards, and so a "
                f"gradient; {self.truncated} responses were cut"
            )
            if self.mixed and 2 * self.truncated > self.responses:
                lines.append(
                    "cut           most responses ended at --max-tokens, without an answer perhaps: raise it"
                )
            if not self.mixed:
                cut = (
                    f"--max-tokens ({self.truncated} of {self.responses} responses were cut), "
                    if self.truncated
                    else ""
                )
                lines.append(
                    f"nothing       to select from these prompts: raise {cut}-n or --temperature, take other prompts, "
                    "or look at the responses and the reward function"
                )
        for error in self.skipped[:20]:
            lines.append(f"left out      {error.of_left_out}")
        if len(self.skipped) > 20:
            lines.append(f"left out      {len(self.skipped) - 20} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """Everything a rollout needs, checked.

    Attributes:
        prompts: to be rolled out, in the order of the file.
        engine, options, reward: what samples, how, and what scores.
        tokens: its tokenizer makes text of the responses.
        settings: what the records depend on.
        policy: what records call the policy.
        notes: further keys of every record.
        bad: the errors of rows that were left out before.
    """

    prompts: Sequence[Prompt]
    engine: Engine
    options: Rollout
    reward: Reward
    tokens: Tokenize
    settings: dict[str, Any]
    policy: str
    notes: dict[str, Any]
    bad: list[RecordError]


def run(
    job: Job, out: str | Path, *, say: Callable[[str], None] = lambda text: None, progress: bool = True
) -> RolloutReport:
    """Sample, score and write; see :class:`cropi.rollouts.file.RolloutFile` for how a run goes on.

    Raises:
        CropiError: what is wrong with the file, the engine, or a reward.
    """
    rows = {prompt.id: prompt for prompt in job.prompts}
    file = RolloutFile(out, job.settings, lambda name: rows[name].row if name in rows else None)
    report = RolloutReport(file.out, skipped=list(job.bad))
    with file.opened():
        requests = [Request(p.id, p.ids, p.row.get("prompt"), _options(p)) for p in job.prompts]
        job.engine.prepare(requests, file.notes)
        file.begin(job.engine.notes())
        _warn_of_changed(job.reward, file)
        done = sum(request.name in file for request in requests)
        say(_start_line(job, len(requests), done))
        _sample(job, file, requests, report, done, progress)
        report.prompts = sum(prompt.id in file for prompt in job.prompts)
        if report.prompts == 0:
            raise CropiError(f"no prompt is left: all are bad; the first: {report.skipped[0].of_left_out}")
        file.finish([prompt.id for prompt in job.prompts])
    return report


class ChangedReward(UserWarning):
    """Records that are kept were scored by another version of the reward function."""


def _warn_of_changed(reward: Reward, file: RolloutFile) -> None:
    others = sum(count for version, count in file.scorers.items() if version not in ("", reward.version))
    if others and reward.version:
        warn(
            f"the reward function {reward.name} has changed since {others} of the prompts in {file.out} were scored, "
            "and their rewards stay as they are; to have all of them scored by the present one, remove the file, or "
            "give another --out", ChangedReward,
        )  # fmt: skip


def _sample(
    job: Job, file: RolloutFile, requests: list[Request], report: RolloutReport, done: int, progress: bool
) -> None:
    import time

    by_id, total = {prompt.id: prompt for prompt in job.prompts}, 0.0
    bar = bar_of(len(requests), "rollout", progress, initial=done)
    # No prompt of a batch is finished before all nearly are, which may take an hour on a CPU: the bar counts tokens.
    if not bar.disable:
        most = job.options.max_tokens
        job.engine.stepped = lambda tokens: bar.set_postfix_str(f"token {tokens} of at most {most}")
    with bar:
        for batch in job.engine.plan(requests, job.options.n):
            if all(request.name in file for request in batch):
                continue
            start = time.perf_counter()
            for request, responses in job.engine.sample(batch, job.options.n, lambda name: name in file):
                report.seconds += time.perf_counter() - start
                if request.name not in file:
                    total += _add(job, file, by_id[request.name], responses, report)
                    bar.update(1)
                    if report.responses:
                        rate, mean = report.tokens / max(report.seconds, 1e-9), total / report.responses
                        bar.set_postfix_str(f"{rate:.0f} tok/s, reward {mean:.3g}", refresh=False)
                start = time.perf_counter()
    if report.responses:
        report.mean_reward = total / report.responses


def _add(
    job: Job, file: RolloutFile, prompt: Prompt, responses: Sequence[Response], report: RolloutReport
) -> float:
    """Score a prompt's responses, write their record, and count them; returns the sum of the rewards.

    Raises:
        RecordError: the record is bad, and the job does not skip bad ones.
    """
    try:
        record = record_of(job, prompt, responses)
        file.add(record)
    except RecordError as error:
        if not job.options.skip_bad:
            raise
        report.skipped.append(error)
        return 0.0
    rewards: list[float] = record["rewards"]
    report.responses += len(responses)
    report.tokens += sum(len(response.ids) for response in responses)
    report.mixed += no_gradient_reason(rewards) is None
    report.truncated += sum(response.truncated for response in responses)
    return sum(rewards)


def record_of(job: Job, prompt: Prompt, responses: Sequence[Response]) -> dict[str, Any]:
    """The trajectory record of a prompt's responses, scored, and read once as ``cropi sketch`` will read it.

    Raises:
        RecordError: a reward or a log-prob is not what it has to be.
    """
    texts = [_text(job.tokens.tokenizer, response) for response in responses]
    rewards = job.reward(prompt, texts, [response.ids for response in responses])
    exact = all(response.ids for response in responses)
    record: dict[str, Any] = {**prompt.row, "responses": texts, "rewards": rewards}
    if exact:
        record |= {
            "prompt_ids": list(prompt.ids),
            "response_ids": [response.ids for response in responses],
        }
        if all(response.logprobs is not None for response in responses):
            record["logprobs"] = [
                [round(min(value, 0.0), 7) for value in response.logprobs or ()] for response in responses
            ]
    record |= {
        "truncated": [response.truncated for response in responses],
        "temperature": job.options.temperature, "policy": job.policy, **job.notes,
    }  # fmt: skip
    if job.reward.version:
        record[SCORER] = job.reward.version
    make_group(record, prompt.where)
    return record


def _text(tokenizer: Any, response: Response) -> str:
    if response.text is not None:
        return response.text
    return "" if tokenizer is None else str(tokenizer.decode(response.ids, skip_special_tokens=True))


def _options(prompt: Prompt) -> dict[str, Any]:
    """What a chat server needs to render the prompt."""
    return {key: prompt.row[key] for key in ("tools", "chat_template_kwargs") if prompt.row.get(key)}


def _start_line(job: Job, count: int, done: int) -> str:
    given = job.options
    how = f"temperature {given.temperature:g}"
    how += f", top-k {given.top_k}" if given.top_k else ""
    how += f", top-p {given.top_p:g}" if given.top_p < 1 else ""
    before = f", {done} of them done before" if done else ""
    return (
        f"rollout       {job.policy} by {job.engine.name} ({job.engine.describe()}): {given.n} responses of at most "
        f"{given.max_tokens} tokens to each of {count} prompts{before}; {how}, seed {given.seed}, reward "
        f"{job.reward.name}"
    )


class Truncated(UserWarning):
    """Responses are drawn from a part of the distribution."""


class OneResponse(UserWarning):
    """Prompts get one response each, of which no gradient is made."""


def warn_sampling(sampling: Sampling) -> None:
    """Say once what ``top_k`` and ``top_p`` do to the estimate, and that one response has no gradient."""
    if sampling.n == 1:
        warn(
            "n is 1: a prompt with one response has no gradient, so that nothing can be selected from what is sampled; "
            "give at least -n 2 (8 is usual)", OneResponse,
        )  # fmt: skip
    if sampling.truncates:
        warn(
            "top-k and top-p: the recorded log-probs are those of the whole distribution, as trainers take them, so "
            "that the ratio of an unchanged policy is 1; the responses are drawn from a part of it, which an estimator "
            "does not see", Truncated,
        )  # fmt: skip
