"""A trainer for `cropi curriculum` in one small file: REINFORCE on the stored rollouts of the selected prompts.

It shows what a trainer has to do: read the policy, train on what was selected, save the new policy in Hugging Face
form. Real training samples fresh rollouts; put the command of your trainer in its place (docs/trainers.md).
"""

from __future__ import annotations

import argparse

import torch

from cropi.data.readers import read
from cropi.gradient.estimators import group_advantages
from cropi.gradient.tokenize import Tokenize
from cropi.model.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("records")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--lr", type=float, default=1e-5)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model)
    tokenize = Tokenize(tokenizer, model.get_input_embeddings().weight.shape[0])
    groups = [tokenize(group) for group in read(args.records)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    for step in range(args.steps):
        group = groups[step % len(groups)]
        advantages = group_advantages(group.group.rewards)
        total = 0.0
        for k, (response, advantage) in enumerate(zip(group.responses, advantages, strict=True)):
            mask = torch.tensor(group.masks[k] if group.masks else [1] * len(response), dtype=torch.bool)
            ids = torch.tensor([group.prompt + response])
            logprobs = model(ids).logits[0, len(group.prompt) - 1 : -1].float().log_softmax(-1)
            chosen = logprobs.gather(1, torch.tensor(response)[:, None])
            loss = -float(advantage) * chosen[mask].mean() / len(advantages)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{args.steps}: prompt {group.id}, loss {total:.4f}", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
