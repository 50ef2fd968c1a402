"""What the TRL adapter adds to a training step outside the scoring phases: ``python -m benchmarks.trl_overhead``.

Three trainers on the same small model, data and seed, one after the other in an order that changes from round to round:
``GRPOTrainer`` as it is, with recording, and with the curriculum inside its first stage (no scoring in it). Completions
have a fixed length, so every step does the same amount of work. A step is the time from the end of one optimizer step
to the end of the next, data loading and recording included; the first steps of every run are left out. CPU time of the
process, so that other processes do not count.

The difference of two noisy steps says little about a share of a percent, so the adapter's own work (making records of a
generation, writing them, giving out rows) is timed by itself too, in the same steps.
"""

from __future__ import annotations

import os

# Before torch: spinning workers burn time that is not the step's.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.environment import describe

ARMS = ("plain", "recording", "curriculum")
WORDS = 2048


def make_tokenizer() -> Any:
    """A vocabulary of made-up words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(WORDS - 2))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def make_model(options: argparse.Namespace) -> Any:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=options.hidden, intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden // 64, max_position_embeddings=1024,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Something cheap that differs from response to response."""
    return [len(set(text.split())) / 100 + len(text) / 1000 for text in completions]


def timed(owner: Any, name: str, spent: list[float]) -> None:
    """Add the CPU time of every call of ``owner.name`` to ``spent[0]``."""
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - begun

    setattr(owner, name, outer)


def step_times(
    arm: str, options: argparse.Namespace, folder: Path, tokenizer: Any
) -> tuple[list[float], list[float]]:
    """CPU seconds of each step of one run, the first two left out, and those of them spent inside the adapter."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from cropi.trainers.trl import Curriculum, curriculum, recording

    ends: list[float] = []
    own_ends: list[float] = []
    spent = [0.0]

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.process_time())
            own_ends.append(spent[0])

    draw = random.Random(0)
    rows = [
        {"id": i, "prompt": " ".join(f"w{draw.randrange(WORDS - 2)}" for _ in range(options.prompt))}
        for i in range(512)
    ]
    steps, prompts = options.steps + 2, options.prompts
    arguments = GRPOConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=prompts * options.responses,
        num_generations=options.responses, max_completion_length=options.length, temperature=1.0, bf16=False,
        use_cpu=True, generation_kwargs={"min_new_tokens": options.length}, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    common: dict[str, Any] = dict(
        model=make_model(options), reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    if arm == "plain":
        trainer: Any = GRPOTrainer(**common)
    elif arm == "recording":
        trainer = recording()(**common)
    else:
        staged = Curriculum(stage_steps=steps)
        trainer = curriculum()(**common, eval_dataset=Dataset.from_list(rows[:8]), curriculum=staged)
    if arm != "plain":
        timed(trainer._cropi, "begin", spent)
        timed(trainer._cropi, "write", spent)
    trainer.train()
    if arm != "plain":
        log = folder / "cropi" / "rollouts" / "train-rank00000.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines()
        first = json.loads(lines[0])
        assert len(lines) == steps * prompts and len(first["logprobs"][0]) == options.length
    steps_taken, own = ([b - a for a, b in zip(times[1:], times[2:])] for times in (ends, own_ends))
    return steps_taken, own


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median of the rounds' ratios and a 95 % bootstrap interval of it."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="timed steps a run")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens a prompt")
    parser.add_argument("--length", type=int, default=64, help="tokens a response")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the table to this .md file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        step_times("curriculum", options, Path(folder), tokenizer)  # imports, allocator: not part of any arm
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    inside: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = list(ARMS)
    for number in range(options.rounds):
        order = order[1:] + order[:1]
        for arm in order:
            with tempfile.TemporaryDirectory() as folder:
                whole, own = step_times(arm, options, Path(folder), tokenizer)
            seconds[arm].append(statistics.median(whole))
            inside[arm].append(statistics.median(own))
        print(
            f"round {number}:",
            {arm: round(values[-1], 4) for arm, values in seconds.items()},
            file=sys.stderr,
        )
    size = sum(p.numel() for p in make_model(options).parameters())
    text = [
        f"{describe()}; {size / 1e6:.1f} M parameters, {options.prompts} prompts x {options.responses} responses x "
        f"{options.length} tokens a step, {options.rounds} rounds of {options.steps} steps.",
        "",
        "| trainer | CPU s a step (median) | ratio to plain, median of rounds | 95 % | inside the adapter |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        middle, low, high = interval([a / b for a, b in zip(seconds[arm], seconds["plain"])])
        share = statistics.median([a / b for a, b in zip(inside[arm], seconds[arm])])
        text.append(
            f"| {arm} | {statistics.median(seconds[arm]):.3f} | {middle:.4f} | {low:.4f} to {high:.4f} | {share:.3%} |"
        )
    print("\n".join(text))
    if options.out:
        options.out.write_text(
            "# What the TRL adapter costs outside the scoring phases\n\n" + "\n".join(text) + "\n"
        )


if __name__ == "__main__":
    main()
