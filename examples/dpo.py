"""DPO with a LoRA adapter on a file of preference pairs; the run folder then holds adapter, metrics and tokenizer.

python examples/dpo.py --model smollm2-135m-instruct --train pairs.jsonl --steps 24
"""

import argparse

from peft import LoraConfig

from fastalign import PreferenceConfig, PreferenceTrainer

PAIRS = [
    {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "There are so many colours that it is hard to say."},
    {"prompt": "What is 2 + 3?", "chosen": "5.", "rejected": "Let me think about this question for a while first."},
    {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "As requested, I am going to say hello to you now."},
    {"prompt": "Capital of France?", "chosen": "Paris.", "rejected": "France is a country, and it has a capital."},
]


def main() -> None:
    """Trains and prints the metrics of the held-out rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder, a hub name, or a packaged model")
    parser.add_argument("--train", help="a .jsonl file with prompt, chosen, rejected; default: four pairs")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", default="runs/dpo-example")
    args = parser.parse_args()
    trainer = PreferenceTrainer(
        args.model,
        PreferenceConfig(
            output_dir=args.out,
            loss_type="dpo",  # any name of the table of losses, or several for a mixture
            beta=0.1,
            learning_rate=1e-4,  # LoRA; about 1e-6 when all weights are trained
            max_steps=args.steps,
            per_device_train_batch_size=2,
            logging_steps=2,
            save_strategy="no",
        ),
        train_dataset=args.train or PAIRS,
        eval_dataset=PAIRS[:2],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()  # the adapter, as peft reads it
    metrics = trainer.evaluate()
    print({name: round(metrics[name], 4) for name in ("eval_loss", "eval_rewards/margins", "eval_kl")})


if __name__ == "__main__":
    main()
