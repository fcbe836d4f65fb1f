"""Supervised fine-tuning of a chat model with LoRA: only the assistant's words are scored.

python examples/sft_lora.py --model smollm2-135m-instruct --train messages.jsonl
"""

import argparse

from peft import LoraConfig

from fastalign import SFTConfig, SFTTrainer


def chat(question: str, answer: str) -> dict:
    """A row of two messages; longer dialogues have more, and every assistant turn is scored."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [
    chat("Name a colour.", "Red."),
    chat("What is 2 + 3?", "5."),
    chat("Say hello.", "Hello!"),
    chat("Capital of France?", "Paris."),
]


def main() -> None:
    """Trains and prints the loss of the first and of the last logged step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder, a hub name, or a packaged model")
    parser.add_argument("--train", help="a .jsonl file with messages, or with prompt and completion")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/sft-example")
    args = parser.parse_args()
    trainer = SFTTrainer(
        args.model,
        SFTConfig(
            output_dir=args.out,
            learning_rate=2e-4,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=args.train or ROWS,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
