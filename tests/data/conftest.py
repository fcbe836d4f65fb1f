"""Tokenizers with merges, made here: of the byte-level kind that most models have, and of the SentencePiece kind.

Test files that need merges make their `tokenizer` from these. In the others it has one token per byte.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TRAINING_TEXT = [
    "the quick brown fox jumps over the lazy dog and the dog sleeps",
    "what is the capital of france? paris is the capital of france.",
    "system user assistant hello there, how are you today? \n\n fine",
] * 20
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def make_byte_level(
    template=CHATML, eos="<|im_end|>", bos=None, specials=(), common=SPECIALS
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*common, *specials], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    wrapped.chat_template = template
    return wrapped


def make_metaspace() -> PreTrainedTokenizerFast:
    """Like SentencePiece models of the Llama 2 kind: a space is put before a text's first word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*TRAINING_TEXT, "Q: A:\n"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def chatml():
    """A chat template like those of most models."""
    return CHATML


@pytest.fixture(scope="session")
def byte_level():
    """A function that makes a byte-level tokenizer with a chat template."""
    return make_byte_level


@pytest.fixture(scope="session")
def metaspace():
    """A function that makes a tokenizer that puts a space before a text's first word."""
    return make_metaspace
