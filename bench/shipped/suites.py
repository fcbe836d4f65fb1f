"""The items of the shipped suites, from tables of facts and from a random generator with a fixed seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.shipped import facts

FOLDER = Path(__file__).parents[2] / "fastalign/evaluation/suites"
Rows = Iterator[dict[str, Any]]

NAMES = [
    "Ana",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kim",
    "Lena",
    "Marco",
    "Nina",
]
THINGS = ["apples", "books", "candles", "coins", "eggs", "flowers", "pencils", "shells", "stamps", "tickets"]
TOPICS = [
    "bread", "bicycles", "rivers", "the moon", "bees", "chess", "gardens", "winter", "trains", "coffee", "mountains",
    "libraries", "dogs", "music", "rain", "bridges", "maps", "sleep", "soup", "the sea",
]  # fmt: skip


def _choices(draw: random.Random, right: str, wrong: list[str]) -> dict[str, Any]:
    options = [right, *wrong]
    draw.shuffle(options)
    return {"choices": options, "label": options.index(right)}


def knowledge() -> Rows:
    """Facts: the other options are answers to other questions of the same table."""
    draw = random.Random(1)
    tables = (
        ("geography", facts.CAPITALS, "What is the capital of {}?"),
        ("chemistry", facts.SYMBOLS, "What is the chemical symbol of {}?"),
        ("literature", facts.AUTHORS, 'Who wrote "{}"?'),
    )
    for category, table, question in tables:
        pairs = [tuple(word.replace("-", " ") for word in pair.split()) for pair in table.split(";")]
        for name, right in pairs:
            wrong = draw.sample([other for _, other in pairs if other != right], 3)
            prompt = f"Question: {question.format(name)}\nAnswer:"
            yield {"category": category, "prompt": prompt, **_choices(draw, right, wrong)}
    for category, table in (("science", facts.SCIENCE), ("everyday", facts.EVERYDAY)):
        for line in table.splitlines():
            question, right, *wrong = line.split("|")
            yield {"category": category, "prompt": f"Question: {question}\nAnswer:", **_choices(draw, right, wrong)}


def reasoning() -> Rows:
    """Arithmetic with a number as answer; order, sequences and rules with options."""
    draw = random.Random(2)
    yield from (_sum(draw, number) for number in range(40))
    yield from (_order(draw) for _ in range(30))
    yield from (_sequence(draw) for _ in range(30))
    yield from (_rule(draw) for _ in range(20))


def _sum(draw: random.Random, number: int) -> dict[str, Any]:
    who, other = draw.sample(NAMES, 2)
    thing, a, b, c = draw.choice(THINGS), draw.randint(3, 20), draw.randint(3, 12), draw.randint(2, 6)
    text, answer = [
        (f"{who} has {a} {thing} and gets {b} more from {other}. How many {thing} does {who} have?", a + b),
        (f"{who} had {a + b} {thing} and gave {b} of them to {other}. How many {thing} are left?", a),
        (f"{who} fills {b} boxes with {c} {thing} each. How many {thing} are in the boxes?", b * c),
        (f"{who} buys {c} packs of {b} {thing} and loses {c} {thing}. How many {thing} are left?", c * b - c),
        (f"{who} and {other} share {b * 2} {thing} equally, and then {who} finds {c} more. How many has {who}?", b + c),
    ][number % 5]
    return {"category": "arithmetic", "prompt": f"{text} End with the number.", "answer": str(answer)}


def _order(draw: random.Random) -> dict[str, Any]:
    people = draw.sample(NAMES, 4)
    more, most, least = draw.choice(
        [("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest")]
    )
    said = [f"{a} is {more} than {b}." for a, b in pairwise(people)]
    draw.shuffle(said)
    is_most = draw.random() < 0.5
    right = people[0] if is_most else people[-1]
    prompt = f"{' '.join(said)} Who is the {most if is_most else least} of the four?\nAnswer:"
    return {"category": "order", "prompt": prompt, **_choices(draw, right, [name for name in people if name != right])}


def _sequence(draw: random.Random) -> dict[str, Any]:
    start, step = draw.randint(1, 20), draw.randint(2, 9)
    if draw.random() < 0.3:
        numbers, step = [start * 2**i for i in range(5)], start
    else:
        numbers = [start + step * i for i in range(5)]
    right = numbers[-1]
    wrong = [str(right + change) for change in (1, -1, step + 1)]
    prompt = f"Continue the sequence: {', '.join(map(str, numbers[:-1]))}, ...\nThe next number is"
    return {"category": "sequence", "prompt": prompt, **_choices(draw, str(right), wrong)}


def _rule(draw: random.Random) -> dict[str, Any]:
    who, (kind, has) = draw.choice(NAMES), draw.choice([
        ("baker", "owns an oven"), ("pilot", "holds a licence"), ("painter", "owns a brush"), ("sailor", "can swim"),
    ])  # fmt: skip
    holds = draw.random() < 0.5
    case = f"{who} is a {kind}." if holds else f"{who} is no {kind}."
    asked = has.replace("owns", "own").replace("holds", "hold").replace("can ", "")
    verb = "Can" if has.startswith("can") else "Does"
    prompt = f"Every {kind} {has}. {case} {verb} {who} {asked}?\nAnswer:"
    right = "yes, certainly" if holds else "that is not known"
    wrong = [text for text in ("yes, certainly", "that is not known", "certainly not") if text != right]
    return {"category": "rule", "prompt": prompt, **_choices(draw, right, wrong)}


def instructions() -> Rows:
    """Length, words, letters and language, six kinds over twenty topics."""
    draw = random.Random(3)
    languages = {"de": "German", "fr": "French", "es": "Spanish"}
    for topic in TOPICS:
        most, least = draw.choice([20, 30, 40]), draw.choice([40, 50, 60])
        yield _write("length", topic, f"in at most {most} words", words_at_most=most)
        yield _write("length", topic, f"in at least {least} words", words_at_least=least)
        word, other = draw.sample(["water", "friend", "morning", "light", "hand", "stone", "journey"], 2)
        asked = f'in one or two sentences. Use the word "{word}"'
        yield _write("keywords", topic, asked, includes=word, sentences_at_most=2)
        yield _write(
            "keywords", topic, f'in one sentence, without the words "{other}" and "very"', excludes=[other, "very"]
        )
        case = draw.choice(["upper_case", "lower_case"])
        letters = "capital letters" if case == "upper_case" else "small letters, without any capital letter"
        yield _write("letters", topic, f"in one sentence that is written in {letters}", **{case: True})
        name = draw.choice([*languages])
        yield _write("language", topic, f"in one sentence in {languages[name]}", language=name)


def formats() -> Rows:
    """Lists, JSON, quotes, headings and endings, six kinds over twenty topics."""
    draw = random.Random(4)
    for topic in TOPICS:
        many = draw.randint(2, 5)
        yield _write(
            "bullets", topic, f'as a list of exactly {many} points, each on a line that begins with "- "', bullets=many
        )
        yield _write("numbered", topic, f'as exactly {many} numbered lines ("1. ", "2. " and so on)', numbered=many)
        keys = draw.sample(["name", "summary", "use", "colour", "place"], 2)
        asked = f'as a JSON object with exactly the keys "{keys[0]}" and "{keys[1]}", and nothing else'
        yield _write("json", topic, asked, json=keys)
        yield _write("quoted", topic, "in one sentence, and put the whole answer in double quotes", quoted=True)
        yield _write(
            "titled", topic, "in two sentences under a title in double angle brackets, as <<title>>", titled=True
        )
        ending = draw.choice(["That is all.", "Thank you.", "The end."])
        yield _write(
            "ending", topic, f'in two sentences, and end with exactly these words: "{ending}"', ends_with=ending
        )


def _write(category: str, topic: str, asked: str, **checks: Any) -> dict[str, Any]:
    return {"category": category, "prompt": f"Write about {topic} {asked}.".replace('.".', '."'), "checks": checks}


SUITES = {"knowledge": knowledge, "reasoning": reasoning, "instructions": instructions, "formats": formats}


def text_of(name: str) -> str:
    """The lines of a suite's file."""
    lines = [{"id": f"{name}-{number}", **row} for number, row in enumerate(SUITES[name](), start=1)]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_all() -> None:
    """Writes every suite."""
    for name in SUITES:
        (FOLDER / f"{name}.jsonl").write_text(text_of(name), encoding="utf-8")
