"""A small rule-based judge of answers, to which concise and complete is better than rambling. Pure Python, no model.

    score = 10 - sum over rules of weight * fault        each fault is in [0, 1]; 0 means that there is none

`faults` gives the faults of one answer, and `score` adds them up. `is_concise` and `is_rambling` say which answers may
be chosen and which rejected, and `pick_pair` takes the best pair from the answers to one prompt. The judge looks only
at form: length, completeness, repetition, filler, layout, and whether the answer is about the prompt. It cannot tell
true from false.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WEIGHTS = {
    "unfinished": 5.0,  # cut off: no EOS within the budget, no closing punctuation, a list point that never comes
    "too_short": 5.0,
    "too_long": 6.0,
    "repetition": 4.0,
    "filler": 3.0,
    "layout": 2.0,
    "off_topic": 3.0,
    "odd_text": 3.0,
    "unsafe": 10.0,
}
IDEAL_WORDS = (12, 45)  # an answer with a number of words between these has no fault of length
RAMBLING_WORDS = 60  # the fewest words of a rejected answer
MIN_CHOSEN = 9.0  # the lowest score of a chosen answer
MIN_MARGIN = 2.5  # the least difference between the scores of a pair

FILLER_OPENERS = re.compile(
    r"^\W*(?:sure|certainly|absolutely|of course|a (?:great|good|simple|classic)\b|great question|good question"
    r"|i'd be happy|i would be happy|i'm happy|i am happy|as an ai|as a (?:helpful|language|large|seasoned|digital)"
    r"|here (?:is|are)\b|here's|let's\b|when it comes to|in today's|in (?:a|the) world|imagine\b|ah,|oh,|hello|hi\b"
    r"|hey\b|in answer to|(?:the|a|my) (?:simple |short )?(?:answer|question)\b"
    r"|this (?:question|answer|sentence|prompt)\b)",
    re.IGNORECASE,
)
FILLER_ANYWHERE = re.compile(
    r"as an ai|language model|i hope (?:this|that|it) helps|hope this message finds you|let me know if|feel free to ask"
    r"|happy to help|if you have any (?:other |more )?questions|in conclusion|in summary|in a nutshell|to sum up"
    r"|it(?:'s| is) (?:important|worth|essential) to (?:note|remember)|good luck|remember,|two (?:short )?sentences"
    r"|(?:first|second|short) sentence|\bsmollm|hugging face",
    re.IGNORECASE,
)
LAYOUT = re.compile(
    r"^\s*(?:#{1,6}\s|[-*•]\s|\d+[.)]\s)|\*\*|__|```|\b(?:pros|cons|step \d+):", re.IGNORECASE | re.MULTILINE
)
PLACEHOLDER = re.compile(r"\[[^\]]*\]|<[^>]*>|https?://|www\.|[{}|\\]")
ODD_CHARACTERS = re.compile(r"[^\x20-\x7e\n\u00a0-\u024f\u2010-\u2026\u2070-\u209f\u20ac\u2212]")
UNSAFE = re.compile(
    r"\b(?:sex\w*|porn\w*|nude|naked|erotic|rap(?:e|ed|ist)|genitals?|penis|vagina\w*|fuck\w*|shit\w*|bitch\w*|suicid\w*"
    r"|kill\w*|murder\w*|bombs?|bleach|ammonia|drunk|cocaine|heroin|slaves?|slavery|nazi\w*|hitler|racis\w*"
    r"|terroris\w*|weapons?|guns?|hate|stupid|idiots?|ugly|retard\w*)\b",
    re.IGNORECASE,
)
CIRCULAR = re.compile(r"^(?:(?:a|an|the) )?(\w{4,})\w{0,3} (?:is|are) (?:\w+ ){0,4}\1", re.IGNORECASE)
DOUBLED = re.compile(r"\b(\w{3,})(?:,? and|,? or|,)? \1\b", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Lower-case words of a text. An apostrophe or hyphen inside a word belongs to the word."""
    return re.findall(r"[a-z0-9]+(?:['\u2019-][a-z0-9]+)*", text.lower())


STOP_WORDS = frozenset(
    words(
        "a about after all also an and another any are as at be because been before being between both but by can could"
        " did do does doing done each for from get give good had has have having he her his how i if in into is it its"
        " just keep know let like make many may me more most much my need no not of off on one only or other our out"
        " over own say should so some such than that the their them then there these they this those through to too two"
        " up us use very was way we were what when where which while who why will with without would write you your"
    )
)


def stem(word: str) -> str:
    """A word without its commonest endings, so that `bake`, `bakes` and `baking` are equal."""
    return re.sub(r"(?:ies|ing|es|ed|ly|'s|s|e|y)$", "", word) if len(word) > 3 else word


def content(text: str) -> list[str]:
    """Stems of the words of a text, without stop words."""
    return [stem(word) for word in words(text) if word not in STOP_WORDS]


def sentences(text: str) -> list[str]:
    """A text split at line ends, and after `.`, `!` or `?` (and a closing quote or bracket) before white space."""
    parts = re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'\u201d)])\s+|\n+", text.strip())
    return [part for part in parts if part]


# Faults


def unfinished(text: str, ended: bool) -> float:
    """1 if the answer was cut off, lacks closing punctuation, or ends in dots or a bare list number."""
    closed = re.search(r"[.!?][\"'\u201d)]?$", text) and not re.search(r"(?:(?:^|\s)\d{1,2}|\.\.)[.!?]$", text)
    return 0.0 if ended and closed else 1.0


def too_short(count: int) -> float:
    """0 from the ideal minimum of words on, rising to 1 at half of it and below."""
    return min(1.0, max(0.0, (IDEAL_WORDS[0] - count) / (IDEAL_WORDS[0] / 2)))


def too_long(count: int) -> float:
    """0 up to the ideal maximum of words, rising to 1 at twice as many and above."""
    return min(1.0, max(0.0, (count - IDEAL_WORDS[1]) / IDEAL_WORDS[1]))


def repetition(prompt: str, text: str) -> float:
    """The largest of four measures, at most 1.

    - Twice the share of word trigrams that occurred before in the text.
    - Dullness: 0 if at least 70 % of the content words are distinct, rising to 1 at 40 %.
    - 0.2 for an echo: a sentence with a content word of a "What ..." prompt twice ("A forest is found in forests").
    - 1 for a doubling: "sad or sad", "A tax is a tax", or a sentence that is repeated.
    """
    if DOUBLED.search(text) or CIRCULAR.search(text):
        return 1.0
    lines = [sentence.lower() for sentence in sentences(text)]
    if len(set(lines)) < len(lines):
        return 1.0
    terms = set(content(prompt)) if prompt.startswith("What ") else set()
    echo = any(content(line).count(term) > 1 for line in lines for term in terms)
    tokens, stems = words(text), content(text)
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    repeated = 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
    dull = (0.7 - len(set(stems)) / len(stems)) / 0.3 if stems else 0.0
    return min(1.0, max(2 * repeated, dull, 0.2 * echo))


def filler(text: str) -> float:
    """0.5 for a stock opener and 0.5 for every other stock phrase, at most 1."""
    return min(1.0, 0.5 * bool(FILLER_OPENERS.search(text)) + 0.5 * len(FILLER_ANYWHERE.findall(text)))


def layout(text: str) -> float:
    """1 if there are headings, bold type, bullets, numbered points or several paragraphs instead of prose."""
    return 1.0 if LAYOUT.search(text) or "\n" in text.strip() else 0.0


def off_topic(prompt: str, text: str) -> float:
    """1 if the answer shares no content word with the prompt."""
    return 0.0 if set(content(prompt)) & set(content(text)) else 1.0


def odd_text(text: str) -> float:
    """1 for placeholders such as [Name], links, foreign scripts, emoji, or a start that is not a capital or digit."""
    start = re.match(r"[\"'\u201c(]?[A-Z0-9]", text)
    return 1.0 if not start or PLACEHOLDER.search(text) or ODD_CHARACTERS.search(text) else 0.0


def faults(prompt: str, text: str, *, ended: bool = True) -> dict[str, float]:
    """The faults of an answer, by rule, each in [0, 1]. `ended` says whether EOS came within the budget."""
    text = text.strip()
    count = len(words(text))
    return {
        "unfinished": unfinished(text, ended),
        "too_short": too_short(count),
        "too_long": too_long(count),
        "repetition": repetition(prompt, text),
        "filler": filler(text),
        "layout": layout(text),
        "off_topic": off_topic(prompt, text),
        "odd_text": odd_text(text),
        "unsafe": 1.0 if UNSAFE.search(text) else 0.0,
    }


def score(prompt: str, text: str, *, ended: bool = True) -> float:
    """10 minus the weighted faults. 10 is a concise, complete answer in plain prose."""
    return 10.0 - sum(WEIGHTS[rule] * fault for rule, fault in faults(prompt, text, ended=ended).items())


# Pairs


def is_concise(prompt: str, text: str, *, ended: bool = True) -> bool:
    """Whether an answer may be chosen: it scores at least `MIN_CHOSEN`, and is not longer than ideal."""
    return len(words(text)) <= IDEAL_WORDS[1] and score(prompt, text, ended=ended) >= MIN_CHOSEN


def is_rambling(prompt: str, text: str) -> bool:
    """Whether an answer may be rejected: it has at least `RAMBLING_WORDS` words, and nothing unsafe in it."""
    return len(words(text)) >= RAMBLING_WORDS and not faults(prompt, text)["unsafe"]


def trim(text: str, max_words: int) -> str:
    """A text up to the last sentence that ends within its first `max_words` words; empty if none does."""
    end = 0
    for stop in re.finditer(r"[.!?][\"'\u201d)]?(?=\s|$)", text):
        if len(words(text[: stop.end()])) <= max_words and not re.search(r"\b\d+\.$", text[: stop.end()]):
            end = stop.end()
    return text[:end].strip()


def agreement(prompt: str, text: str, others: Iterable[str]) -> float:
    """Mean share of an answer's content words that each of the other answers has too, in [0, 1].

    Words of the prompt do not count. What a model knows occurs in many of its answers, and what it invents often in
    only one (Wang et al., "Self-consistency improves chain of thought reasoning", 2023, arXiv:2203.11171).
    """
    own = set(content(text)) - set(content(prompt))
    shares = [len(own & set(content(other))) / len(own) for other in others if own]
    return sum(shares) / len(shares) if shares else 0.0


def pick_pair(prompt: str, answers: Iterable[tuple[str, bool]], *, max_words: int = 85) -> tuple[str, str] | None:
    """The best pair (chosen, rejected) among the answers to a prompt, or None if there is no clear pair.

    Chosen: of the concise answers within half a point of the best one, the answer that agrees most with the others.
    Rejected: the rambling answer with the lowest score, if it scores at least `MIN_MARGIN` less. Answers that ended by
    themselves are preferred to answers that ran out of budget.

    Args:
        prompt: the prompt.
        answers: (text, whether EOS came within the budget) of each answer.
        max_words: an answer that ran out of budget is trimmed to the last sentence that ends within so many words.
    """
    answers = list(answers)
    concise = [text for text, ended in answers if is_concise(prompt, text, ended=ended)]
    rambling = [(not ended, text if ended else trim(text, max_words)) for text, ended in answers]
    rambling = [(cut, text) for cut, text in rambling if is_rambling(prompt, text)]
    if not concise or not rambling:
        return None
    best = max(score(prompt, text) for text in concise)
    concise = [text for text in concise if score(prompt, text) > best - 0.5]
    chosen = max(concise, key=lambda text: agreement(prompt, text, [other for other, _ in answers if other != text]))
    _, rejected = min(rambling, key=lambda item: (item[0], score(prompt, item[1])))
    return (chosen, rejected) if score(prompt, chosen) - score(prompt, rejected) >= MIN_MARGIN else None
