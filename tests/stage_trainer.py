"""A small real trainer, run by the curriculum's tests as a command: REINFORCE on stored rollouts.

python stage_trainer.py MODEL RECORDS STEPS OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cropi.advantages import group_advantages


def main(model_name: str, records: str, steps: str, out: str) -> None:
    torch.set_num_threads(1)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_name),
        AutoTokenizer.from_pretrained(model_name),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    groups = [json.loads(line) for line in Path(records).read_text().splitlines()]
    for step in range(int(steps)):
        group = groups[step % len(groups)]
        loss = torch.zeros(())
        for response, advantage in zip(group["responses"], group_advantages(group["rewards"]), strict=True):
            prompt = tokenizer(group["prompt"])["input_ids"]
            ids = torch.tensor([prompt + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]])
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            chosen = logprobs.gather(1, ids[0, len(prompt) :, None])
            loss = loss - advantage * chosen.mean() / len(group["rewards"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: prompt {group['id']}, loss {float(loss):.4f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
