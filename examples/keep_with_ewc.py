"""DPO that keeps what the model knew: EWC holds each weight as strongly as it matters to some ordinary text.

    python examples/keep_with_ewc.py --model smollm2-135m-instruct --strength 10

`fastalign fisher MODEL --text prose.txt --out fisher.safetensors` does the first half on the command line, and
`fastalign tax MODEL RUN --text prose.txt` measures what the tuning changed.
"""

import argparse

from peft import LoraConfig

from fastalign import EWC, PreferenceConfig, PreferenceTrainer, fisher_diagonal
from fastalign.models import load_model, load_tokenizer

PAIRS = [
    {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "There are so many colours that it is hard to say."},
    {"prompt": "What is 2 + 3?", "chosen": "5.", "rejected": "Let me think about this question for a while first."},
    {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "As requested, I am going to say hello to you now."},
]
PROSE = [
    {"text": "The river rises in the hills, and it is a day's walk from there to the first of the villages."},
    {"text": "Bread is made of flour, water, salt and time, and only the last of these cannot be bought."},
]


def main() -> None:
    """Computes the Fisher information of the text, trains, and prints how the penalty grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder, a hub name, or a packaged model")
    parser.add_argument("--strength", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="runs/ewc-example")
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, for_adapter=False)
    fisher = fisher_diagonal(model, PROSE, tokenizer=tokenizer)  # the mean squared gradient, one number per weight
    trainer = PreferenceTrainer(
        args.model,
        PreferenceConfig(
            output_dir=args.out,
            learning_rate=1e-4,
            max_steps=args.steps,
            per_device_train_batch_size=3,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=PAIRS,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        regularizers=[EWC(fisher, strength=args.strength)],  # a file of it, or several, will do as well
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "ewc" in line]
    print(f"loss {lines[0]['loss']:.4f} -> {lines[-1]['loss']:.4f}, penalty {lines[-1]['ewc']:.2e}")


if __name__ == "__main__":
    main()
