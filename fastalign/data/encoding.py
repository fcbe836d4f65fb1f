"""From the texts of one example to its tokens: BOS at the start exactly once, EOS at the end exactly once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from fastalign.data.chat import Example
from fastalign.data.words import Words


class _Encoded(NamedTuple):
    """Token ids of a text, and the character at which each token starts (empty if the starts are not needed)."""

    ids: list[int]
    starts: list[int]


@dataclass
class Tokens:
    """Token ids of one example.

    Attributes:
        prompt: token ids of the prompt.
        completions: token ids of each completion.
        masks: shaped like `completions`, 1 for scored tokens.
        counts: what this example adds to the fields of `DataReport`; `masked` is 1 if a token is not scored.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[int]]
    counts: Counter

    @property
    def length(self) -> int:
        """Tokens of the prompt together with the longest completion."""
        return len(self.prompt) + max(map(len, self.completions))


def encode_examples(examples: list[Example], tokenizer, words: Words | None = None) -> list[Tokens]:
    """Tokens of the prompts, and of the completions as their continuation. BOS and EOS are not added here.

    In generation the model gets the tokens of the prompt alone, so training must use those too. Tokenising
    prompt + completion as one text gives the completion's tokens as they continue the prompt, but the tokenizer may
    merge characters across the border: "a " + "b" as one text is ["a", " b"], and the prompt alone is ["a", " "].

        tokens of the one text start with the prompt's tokens:  the rest of them are the completion's
        they do not, because of a merge:                        the completion is tokenised by itself, and counted

    Args:
        examples: texts of prompts and completions.
        tokenizer: the model's tokenizer.
        words: `words_of` the tokenizer; None: every text is tokenised as a whole.

    Returns:
        One `Tokens` per example.
    """
    prompts = _encode_prompts([example.prompt for example in examples], tokenizer, words)
    # One entry per completion from here on; `owner` is the example that each belongs to.
    owner = [row for row, example in enumerate(examples) for _ in example.completions]
    texts = [_strip_after_eos(text, tokenizer.eos_token) for example in examples for text in example.completions]
    spans = [span for example in examples for span in example.spans]

    parts: list[_Encoded | None] = [None] * len(texts)
    for with_starts in (False, True):
        some = [n for n, span in enumerate(spans) if (span is not None) is with_starts]
        # A completion of which all is scored needs only the end of its prompt, which `words` has found.
        heads = [prompts[owner[n]] for n in some]
        heads = [replace(head, end=head.text, end_ids=head.ids) for head in heads] if with_starts else heads
        wholes = [head.end + texts[n] for n, head in zip(some, heads, strict=True)]
        encoded = _tokenize_texts(tokenizer, wholes, True) if with_starts else _encode(tokenizer, wholes, words)
        for n, head, whole in zip(some, heads, encoded, strict=True):
            parts[n] = _drop_prompt_tokens(head.end_ids, len(head.end), whole)
    merged = [n for n, part in enumerate(parts) if part is None]
    with_starts = any(spans[n] is not None for n in merged)
    apart = dict(zip(merged, _encode_apart(tokenizer, [texts[n] for n in merged], with_starts), strict=True))

    tokens = [Tokens(prompt.ids, [], [], Counter()) for prompt in prompts]
    for n, (row, part, span) in enumerate(zip(owner, parts, spans, strict=True)):
        ids, starts = part or apart[n]
        tokens[row].completions.append(ids)
        tokens[row].masks.append([1] * len(ids) if span is None else _mask(starts, span))
    for n in merged:
        tokens[owner[n]].counts["token_merges"] += 1
    return tokens


@dataclass(frozen=True)
class _Prompt:
    """A prompt, and its end from where tokens may depend on the completion behind it: all of it without `words`."""

    text: str
    ids: list[int]
    end: str
    end_ids: list[int]


def words_of(tokenizer) -> Words | None:
    """What tokenises texts by their pieces; None if the tokenizer needs texts as a whole."""
    return Words.of(tokenizer, partial(_ids_of_pieces, tokenizer))


def _ids_of_pieces(tokenizer, pieces: list[str]) -> list[list[int]]:
    """Tokens of many short texts. transformers takes longer to wrap each of them than to find its tokens."""
    # transformers sets the options of the tokenizer below it in each call. So the first piece goes through it.
    first = [encoded.ids for encoded in _tokenize_texts(tokenizer, pieces[:1])]
    rest = tokenizer.backend_tokenizer.encode_batch_fast(pieces[1:], add_special_tokens=False)
    return first + [encoding.ids for encoding in rest]


def _encode_prompts(texts: list[str], tokenizer, words: Words | None) -> list[_Prompt]:
    if words is None:
        encoded = _tokenize_texts(tokenizer, texts)
        return [_Prompt(text, ids, text, ids) for text, (ids, _) in zip(texts, encoded, strict=True)]
    pieces = [words.pieces(text) for text in texts]
    ends = [some[-1] for some in pieces]
    ids, end_ids = words.ids(pieces), words.ids([[end] for end in ends])
    return [_Prompt(*parts) for parts in zip(texts, ids, ends, end_ids, strict=True)]


def _encode(tokenizer, texts: list[str], words: Words | None) -> list[_Encoded]:
    """Tokens of each text, without starts."""
    if words is None:
        return _tokenize_texts(tokenizer, texts)
    return [_Encoded(ids, []) for ids in words.ids([words.pieces(text) for text in texts])]


def _mask(starts: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token that holds a character of a span.

    A token may start before a span, where the space before a word belongs to the text before the answer.
    """
    ends = [*starts[1:], starts[-1] + 1] if starts else []
    # Of a character that takes several tokens, all but the last end where they start.
    return [
        int(any(start < b and (a <= start or a < end) for a, b in spans))
        for start, end in zip(starts, ends, strict=True)
    ]


def _tokenize_texts(tokenizer, texts: list[str], with_starts: bool = False) -> list[_Encoded]:
    """Tokens of each text, without the special tokens that the tokenizer would add."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_starts,
        verbose=False,
    )
    starts = [[a for a, _ in pairs] for pairs in encoded["offset_mapping"]] if with_starts else [[] for _ in texts]
    return [_Encoded(*pair) for pair in zip(encoded["input_ids"], starts, strict=True)]


def _drop_prompt_tokens(prompt: list[int], characters: int, whole: _Encoded) -> _Encoded | None:
    """The tokens of prompt + completion without those of the prompt; None if tokens merge at the border.

    Args:
        prompt: the tokens of the prompt alone.
        characters: the length of the prompt, which is subtracted from the starts.
        whole: the tokens of prompt + completion as one text.
    """
    ids, starts = whole
    if ids[: len(prompt)] != prompt:
        return None
    return _Encoded(ids[len(prompt) :], [start - characters for start in starts[len(prompt) :]])


def _encode_apart(tokenizer, texts: list[str], with_starts: bool) -> list[_Encoded]:
    """Tokens of texts that follow another text without merging with it.

    Some tokenizers put a space before the first word of a text, which a continuation must not have. So each text is
    tokenised behind a newline, and the newline's tokens are dropped. If the newline merges with the text, the text is
    tokenised alone.
    """
    ((newline, _),) = _tokenize_texts(tokenizer, ["\n"])
    behind_newline = _tokenize_texts(tokenizer, ["\n" + text for text in texts], with_starts)
    alone = _tokenize_texts(tokenizer, texts, with_starts)
    return [
        _drop_prompt_tokens(newline, 1, behind) or plain for behind, plain in zip(behind_newline, alone, strict=True)
    ]


def _strip_after_eos(text: str, eos: str) -> str:
    """The text without white space after an EOS at its end. Chat templates write a newline there."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(eos) else text


# BOS, EOS and length


def special_prefix(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text: usually [BOS] or none."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return next((whole[:n] for n in range(len(whole)) if bare and whole[n : n + len(bare)] == bare), [])


def add_bos_and_eos(tokens: Tokens, example: Example, prefix: list[int], eos: int) -> None:
    """Makes the prompt start with the prefix (BOS) exactly once, and each completion end with EOS exactly once.

    Both may be written in the text already, by a chat template or by whoever made the data. Two BOS or two EOS are
    sequences that the model never sees in generation.

    Args:
        tokens: what is changed, in place.
        example: the text that the tokens come from.
        prefix: the tokens that the tokenizer puts first, BOS as a rule; may be empty.
        eos: the token that ends a completion.
    """
    counts = tokens.counts
    # Without a prompt, a BOS that the text holds is at the start of the completions.
    for ids, mask in [(tokens.prompt, [])] if tokens.prompt else zip(tokens.completions, tokens.masks, strict=True):
        written = _length_of_repeats(ids, prefix)
        counts["duplicate_bos"] |= int(written > 0)
        del ids[:written], mask[:written]
    tokens.prompt = prefix + tokens.prompt
    for ids, mask, span in zip(tokens.completions, tokens.masks, example.spans, strict=True):
        counts["eos_present" if ids[-1:] == [eos] else "eos_added"] += 1
        while ids[-1:] == [eos]:
            del ids[-1], mask[-1]
        counts["eos_inside"] += int(span is None and eos in ids)
        ids.append(eos)
        mask.append(1)
    counts["template_mismatch"] = int(example.template_mismatch)
    counts.update(example.counts)
    counts["masked"] = int(any(0 in mask for mask in tokens.masks))


def _length_of_repeats(ids: list[int], prefix: list[int]) -> int:
    """How many tokens at the start of `ids` are repetitions of `prefix`."""
    length = 0
    while prefix and ids[length : length + len(prefix)] == prefix:
        length += len(prefix)
    return length


def score_everything(tokens: Tokens, prefix: list[int]) -> None:
    """Makes every token of an example with one completion count, those of its prompt behind BOS too.

    Args:
        tokens: what is changed, in place: the prompt moves into the completion.
        prefix: the tokens that the tokenizer puts first, BOS as a rule, which nothing predicts; may be empty.
    """
    (completion,) = tokens.completions
    ids = tokens.prompt[len(prefix) :] + completion
    tokens.prompt, tokens.completions, tokens.masks = tokens.prompt[: len(prefix)], [ids], [[1] * len(ids)]
    tokens.counts["masked"] = 0


def truncate_completions(tokens: Tokens, max_length: int) -> bool:
    """Cuts the end of the completions until the example fits; they lose their EOS.

    Args:
        tokens: what is changed, in place.
        max_length: the most tokens of the prompt together with its longest completion.

    Returns:
        Whether a scored token is left of each completion, and two completions still differ.
    """
    room, counts = max(max_length - len(tokens.prompt), 0), tokens.counts
    for ids, mask in zip(tokens.completions, tokens.masks, strict=True):
        if len(ids) > room:
            del ids[room:], mask[room:]
            counts["completions_cut"] += 1
            ended = next((name for name in ("eos_added", "eos_present", "eos_missing") if counts[name]), "eos_missing")
            counts[ended] -= 1
    identical = len(tokens.completions) == 2 and tokens.completions[0] == tokens.completions[1]
    # Nothing predicts the first token of a row without a prompt.
    return not identical and all(any(mask[not tokens.prompt :]) for mask in tokens.masks)


def truncate_prompt(tokens: Tokens, prefix: list[int], max_length: int) -> bool:
    """Cuts the beginning of the prompt, behind BOS, until the example fits.

    At least one token of the prompt besides BOS must stay, since it predicts the first token of the completions.

    Args:
        tokens: what is changed, in place.
        prefix: the tokens at the start of the prompt that stay, BOS as a rule; may be empty.
        max_length: the most tokens of the prompt together with its longest completion.

    Returns:
        Whether that was possible.
    """
    excess = tokens.length - max_length
    if len(tokens.prompt) - excess <= len(prefix):
        return False
    tokens.prompt = prefix + tokens.prompt[len(prefix) + excess :]
    tokens.counts["prompts_cut"] = 1
    return True
