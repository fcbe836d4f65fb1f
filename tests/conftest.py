"""Shared by every test: one thread, since the tensors are small and other work may hold the second core; and a tiny
model with its tokenizer, since most of what is above the losses needs both."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, 256 in all, and three special ones, with a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_llama():
    """A function that makes a randomly initialised Llama of 2 layers, the same one each time."""

    def make(*, tied=True, dtype=torch.float32, seed=0, vocab_size=259, **options):
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            # Large enough that log-probs differ by more than rounding between tokens, contexts and weights.
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            **options,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tiny_llama, tokenizer):
    """A folder with the tiny model and its tokenizer, as a user has it. Read only."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs():
    """Eight rows of preferences with prompts and completions of many lengths."""
    return [
        {"prompt": "Name a colour." + "!" * i, "chosen": "red"[: 1 + i % 3] * (i + 1), "rejected": "Mauve. " * (9 - i)}
        for i in range(8)
    ]


@pytest.fixture(scope="session")
def labelled(pairs):
    """Six rows with a label each, in turn."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(pairs[:6])
    ]
