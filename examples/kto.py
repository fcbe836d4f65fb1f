"""KTO: thumbs up and thumbs down on single answers instead of pairs.

python examples/kto.py --model smollm2-135m-instruct --train labelled.jsonl
"""

import argparse

from peft import LoraConfig

from fastalign import PreferenceConfig, PreferenceTrainer

ROWS = [
    {"prompt": "Name a colour.", "completion": "Red.", "label": True},
    {"prompt": "What is 2 + 3?", "completion": "Let me think about this for a while first.", "label": False},
    {"prompt": "Say hello.", "completion": "Hello!", "label": True},
    {"prompt": "Capital of France?", "completion": "France is a country, and it has one.", "label": False},
]


def main() -> None:
    """Trains and prints the rewards of answers that people liked and of those that they did not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder, a hub name, or a packaged model")
    parser.add_argument("--train", help="a .jsonl file with prompt, completion and label (true or false)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/kto-example")
    args = parser.parse_args()
    trainer = PreferenceTrainer(
        args.model,
        PreferenceConfig(
            output_dir=args.out,
            loss_type="kto",  # "bco" takes the same rows
            beta=0.1,
            desirable_weight=1.0,  # raise the weight of the rarer label
            undesirable_weight=1.0,
            learning_rate=1e-4,
            max_steps=args.steps,
            per_device_train_batch_size=4,  # KTO's baseline is a mean over the micro-batch: do not make it tiny
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=args.train or ROWS,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    print({name: round(value, 4) for name, value in last.items() if name == "loss" or name.startswith("rewards/")})


if __name__ == "__main__":
    main()
