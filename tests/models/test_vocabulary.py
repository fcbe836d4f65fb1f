"""Whether tokenizers give every token the same number."""

import copy

import pytest
import tokenizers
import transformers as tf

from fastalign.errors import ModelError
from fastalign.models.vocabulary import check_vocabulary, embedding_rows, vocabulary_digest


def test_the_same_tokens_with_other_numbers_are_another_vocabulary(tokenizer):
    check_vocabulary(tokenizer, copy.deepcopy(tokenizer))
    assert vocabulary_digest(tokenizer) == vocabulary_digest(copy.deepcopy(tokenizer))
    numbered = {token: number if number < 3 else 261 - number for token, number in tokenizer.get_vocab().items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=numbered, merges=[]))
    other = tf.PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ModelError, match="256 of 259 tokens differ"):
        check_vocabulary(tokenizer, other)
    with pytest.raises(ModelError, match="The base and the tuned model have different tokenizers"):
        check_vocabulary(tokenizer, other, ("base", "tuned model"))
    assert vocabulary_digest(tokenizer) != vocabulary_digest(other)


def test_embeddings_may_be_padded_beyond_the_tokenizer(tiny_llama, tokenizer):
    assert embedding_rows(tiny_llama(vocab_size=264)) == 264 > len(tokenizer)
