"""Distillation from a teacher's top-k log-probs, which are computed once and kept on disk.

    python examples/distil_topk.py --model ./small --teacher ./large --train prompts_and_answers.jsonl

The teacher must have the student's tokenizer. It is released after its log-probs are stored, so student and teacher
need not fit in memory together.
"""

import argparse

from fastalign import DistillationConfig, DistillationTrainer

ROWS = [
    {"prompt": "Name a colour.", "completion": " Red."},
    {"prompt": "What is 2 + 3?", "completion": " 5."},
    {"prompt": "Say hello.", "completion": " Hello!"},
    {"prompt": "Capital of France?", "completion": " Paris."},
]


def main() -> None:
    """Trains the student and prints its divergence from the teacher, first and last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the student")
    parser.add_argument("--teacher", default="smollm2-135m-instruct", help="the model to learn from")
    parser.add_argument("--train", help="a .jsonl file with prompt and completion, or with messages")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="runs/distil-example")
    args = parser.parse_args()
    trainer = DistillationTrainer(
        args.model,
        DistillationConfig(
            output_dir=args.out,
            teacher=args.teacher,
            top_k=16,  # the teacher's 16 largest log-probs per token; the rest of the vocabulary counts as one entry
            weight=0.3,  # of the data's own NLL; 0.7 goes to the teacher
            temperature=2.0,
            divergence="forward_kl",
            cache_dir=f"{args.out}/cache",
            learning_rate=1e-5,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=args.train or ROWS,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "distillation" in line]
    print(f"divergence from the teacher {lines[0]['distillation']:.4f} -> {lines[-1]['distillation']:.4f}")


if __name__ == "__main__":
    main()
