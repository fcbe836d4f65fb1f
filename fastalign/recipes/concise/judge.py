"""A small rule-based judge of answers: concise and complete beats rambling. Pure Python, no model.

    score = 10 - sum over rules of weight * fault        each fault lies in [0, 1], 0 = nothing to complain about

`faults` names what is wrong with one answer, `score` adds it up, `is_concise` and `is_rambling` say who may be chosen
and who rejected, and `pick_pair` takes the best pair of a prompt's answers. The judge looks at form alone: length,
completeness, repetition, filler, layout, whether the answer stays with the prompt. It cannot tell true from false.
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
IDEAL_WORDS = (12, 45)  # no length fault in between
RAMBLING_WORDS = 60  # a rejected answer has at least so many
MIN_CHOSEN = 9.0  # a chosen answer scores at least so much
MIN_MARGIN = 2.5  # and leads the rejected one by at least so much

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
    """Lower-case words of `text`; an apostrophe or hyphen inside a word belongs to it."""
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
    """`word` without its commonest endings, so that `bake`, `bakes` and `baking` meet."""
    return re.sub(r"(?:ies|ing|es|ed|ly|'s|s|e|y)$", "", word) if len(word) > 3 else word


def content(text: str) -> list[str]:
    """Stems of the words of `text` that are no stop words."""
    return [stem(word) for word in words(text) if word not in STOP_WORDS]


def sentences(text: str) -> list[str]:
    """`text` cut after `.`, `!` or `?` (with a closing quote or bracket) before white space, and at line ends."""
    parts = re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'\u201d)])\s+|\n+", text.strip())
    return [part for part in parts if part]


# ------------------------------------------------------------------------------------------------------------ faults


def unfinished(text: str, ended: bool) -> float:
    """1 where the answer was cut off, lacks closing punctuation, ends in dots, or in a bare list number."""
    closed = re.search(r"[.!?][\"'\u201d)]?$", text) and not re.search(r"(?:(?:^|\s)\d{1,2}|\.\.)[.!?]$", text)
    return 0.0 if ended and closed else 1.0


def too_short(count: int) -> float:
    """0 from the ideal minimum of words on, 1 at half of it and below."""
    return min(1.0, max(0.0, (IDEAL_WORDS[0] - count) / (IDEAL_WORDS[0] / 2)))


def too_long(count: int) -> float:
    """0 up to the ideal maximum of words, 1 at twice as many and above."""
    return min(1.0, max(0.0, (count - IDEAL_WORDS[1]) / IDEAL_WORDS[1]))


def repetition(prompt: str, text: str) -> float:
    """The largest of: twice the share of word trigrams seen before; dullness; 0.2 for an echo; 1 for a doubling.

    Dullness sets in where under 70 % of the content words are distinct, and reaches 1 at 40 %. An echo is a sentence
    that says a content word of a "What ..." prompt twice ("A forest is found in forests"); a doubling is "sad or sad",
    "A tax is a tax", or a whole sentence said again.
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
    """Half for a stock opener, half for every other stock phrase, at most 1."""
    return min(1.0, 0.5 * bool(FILLER_OPENERS.search(text)) + 0.5 * len(FILLER_ANYWHERE.findall(text)))


def layout(text: str) -> float:
    """1 where headings, bold type, bullets, numbered points or several paragraphs stand in for prose."""
    return 1.0 if LAYOUT.search(text) or "\n" in text.strip() else 0.0


def off_topic(prompt: str, text: str) -> float:
    """1 where the answer shares no content word with the prompt."""
    return 0.0 if set(content(prompt)) & set(content(text)) else 1.0


def odd_text(text: str) -> float:
    """1 for placeholders such as [Name], links, foreign scripts and emoji, or a start that is no capital or digit."""
    start = re.match(r"[\"'\u201c(]?[A-Z0-9]", text)
    return 1.0 if not start or PLACEHOLDER.search(text) or ODD_CHARACTERS.search(text) else 0.0


def faults(prompt: str, text: str, *, ended: bool = True) -> dict[str, float]:
    """The faults of `text` as an answer to `prompt`, by rule, each in [0, 1]; `ended`: EOS came within the budget."""
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
    """10 minus the weighted faults; 10 is a concise, complete answer in plain prose."""
    return 10.0 - sum(WEIGHTS[rule] * fault for rule, fault in faults(prompt, text, ended=ended).items())


# ------------------------------------------------------------------------------------------------------------- pairs


def is_concise(prompt: str, text: str, *, ended: bool = True) -> bool:
    """May be chosen: `score` of at least `MIN_CHOSEN`, and at most the ideal number of words."""
    return len(words(text)) <= IDEAL_WORDS[1] and score(prompt, text, ended=ended) >= MIN_CHOSEN


def is_rambling(prompt: str, text: str) -> bool:
    """May be rejected: at least `RAMBLING_WORDS` words, and nothing unsafe in it."""
    return len(words(text)) >= RAMBLING_WORDS and not faults(prompt, text)["unsafe"]


def trim(text: str, max_words: int) -> str:
    """`text` up to the last sentence that ends within its first `max_words` words; empty where none does."""
    end = 0
    for stop in re.finditer(r"[.!?][\"'\u201d)]?(?=\s|$)", text):
        if len(words(text[: stop.end()])) <= max_words and not re.search(r"\b\d+\.$", text[: stop.end()]):
            end = stop.end()
    return text[:end].strip()


def agreement(prompt: str, text: str, others: Iterable[str]) -> float:
    """Mean share of the content words of `text`, the prompt's aside, that each of `others` has too; in [0, 1].

    The model's oddest inventions occur in one of its answers alone, what it knows in many (Wang et al.,
    "Self-consistency improves chain of thought reasoning", 2023).
    """
    own = set(content(text)) - set(content(prompt))
    shares = [len(own & set(content(other))) / len(own) for other in others if own]
    return sum(shares) / len(shares) if shares else 0.0


def pick_pair(prompt: str, answers: Iterable[tuple[str, bool]], *, max_words: int = 85) -> tuple[str, str] | None:
    """(chosen, rejected) out of `answers` = (text, ended) to `prompt`, or None where no clear pair is among them.

    Chosen is, of the concise answers within half a point of the best, the one that agrees most with the others.
    Rejected is a rambling answer that scores at least `MIN_MARGIN` less: one that came to its own end if there is any,
    else one that ran out of budget, trimmed to `max_words`; of equals, the worst-scoring.
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
