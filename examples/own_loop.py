"""DPO in a training loop of your own: fastalign computes the loss from hidden states, everything else is plain PyTorch.

python examples/own_loop.py --model smollm2-135m-instruct --steps 10
"""

import argparse

import torch

from fastalign import fused_linear_dpo, linear_logprobs, segment_sum
from fastalign.models import load_model, load_tokenizer

PAIRS = [
    ("Name a colour.", "Red.", "There are so many colours that it is hard to name one."),
    ("What is 2 + 3?", "5.", "Let me think about this question for a while before I answer."),
    ("Say hello.", "Hello!", "As requested by you, I am going to say hello to you now."),
]


def encode(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt + completion + EOS, and the targets: prompt tokens are ignored (-100)."""
    start = tokenizer(prompt + "\n")["input_ids"]
    end = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return start + end, [-100] * len(start) + end


def batch_of(tokenizer, pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded rows, the chosen ones first, then the rejected ones in the same order: (2B, T) each."""
    rows = [encode(tokenizer, p, c) for p, c, _ in pairs] + [encode(tokenizer, p, r) for p, _, r in pairs]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.eos_token_id] * (width - len(ids)) for ids, _ in rows])
    targets = torch.tensor([t + [-100] * (width - len(t)) for _, t in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return ids, mask, targets


def main() -> None:
    """Trains for a few steps and prints the loss and the reward margin of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype="float32")
    ids, mask, targets = batch_of(tokenizer, PAIRS)
    # hidden[:, t] predicts token t + 1: drop the last hidden state and the first target.
    targets = targets[:, 1:].contiguous()
    head = model.get_output_embeddings().weight.requires_grad_(False)  # frozen: one pass over the vocabulary is enough

    def hidden_states() -> torch.Tensor:
        return model.base_model(input_ids=ids, attention_mask=mask)[0][:, :-1]

    with torch.no_grad():  # the reference is the model before the first step: one log-probability sum per row
        logprobs = linear_logprobs(hidden_states(), head, targets)
        bounds = torch.arange(len(ids) + 1) * targets.shape[1]
        ref_logps = segment_sum(logprobs.flatten(), bounds)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    for step in range(args.steps):
        out = fused_linear_dpo(hidden_states(), head, targets, ref_logps=ref_logps, beta=0.1)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margin = (out.chosen_rewards - out.rejected_rewards).mean()
        print(f"step {step}: loss {out.loss.item():.4f}, margin {margin.item():.4f}")


if __name__ == "__main__":
    main()
