"""Rephrased problems are found, and other problems of the same kind are not."""

from __future__ import annotations

import random

from fastalign.evaluation.neighbours import near_neighbours, terms_of

NAMES = ["Ana", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas"]
THINGS = ["apples", "books", "candles", "coins", "eggs", "flowers", "pencils", "shells", "stamps", "tickets"]


def problems(count: int) -> list[tuple[str, str]]:
    """Problems, and what they are in other words."""
    draw, found = random.Random(0), []
    for _ in range(count):
        who, thing, a, b = draw.choice(NAMES), draw.choice(THINGS), draw.randint(10, 999), draw.randint(1000, 9999)
        found.append((
            f"{who} has {a} {thing} and buys {b} more of them on the market. How many {thing} does {who} have now?",
            f"At first {who} owned {a} {thing}. After buying another {b:,}, what is the total of {who}'s {thing}?",
        ))  # fmt: skip
    return found


def test_rephrased_problems_are_found_and_others_are_not():
    made = problems(400)
    items = [first for first, _ in made[:200]]
    found = near_neighbours(items, [second for _, second in made[:200]])
    assert len(found) >= 180
    assert sum(near.item == near.text for near in found) >= 0.95 * len(found)
    assert len(near_neighbours(items, [second for _, second in made[200:]])) <= 10


def test_few_items_and_short_ones():
    items = ["Why?", "The quick brown fox jumps over the lazy dog near the river bank"]
    assert [near.item for near in near_neighbours(items, ["Why?", items[1].upper() + "!", "x"])] == [1]
    assert near_neighbours(items, [""]) == []


def test_terms():
    assert terms_of("Two eggs, 1,234.5 l at $3") == ["2", "eggs", "1234.5", "l", "at", "3"]
