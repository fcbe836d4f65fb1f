"""What is scored, decoded, for conversations of every kind and the chat templates of well-known families.

The table lies in templates/scored.txt. A template may leave words out or refuse a conversation; it must not do so in
silence, and nothing but the assistant's words and the tokens that end them may be scored.
"""

import json
import random
import re
from pathlib import Path

import pytest

from fastalign.data.formats import Format, to_example
from fastalign.data.messages import RowProblem
from fastalign.data.show import trained_parts
from fastalign.data.tokenization import tokenize
from fastalign.errors import DataError

FOLDER = Path(__file__).parent / "templates"
FAMILIES = json.loads((FOLDER / "families.json").read_text())
COUNTS = {
    "answers_cut": "words or thoughts of earlier answers left out",
    "thoughts_kept": "thoughts put in",
    "foreign_thoughts": "thoughts as words",
    "unstopped_answers": "earlier answers without an end",
    "template_mismatch": "starts otherwise than in generation",
}


@pytest.fixture(scope="module")
def tokenizers(byte_level):
    return {
        name: byte_level((FOLDER / f"{name}.jinja").read_text(), family["eos"], family["bos"], family["specials"], ())
        for name, family in FAMILIES.items()
    }


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def call(*names):
    calls = [
        {"id": "abcdefgh" + str(n), "type": "function", "function": {"name": name, "arguments": {"at": "north"}}}
        for n, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = "<think>\nThey said so.\n</think>\n\n"
TOOLS = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])
RESULT = {"role": "tool", "tool_call_id": "abcdefgh0", "name": "look", "content": "a gate"}
ONE = [user("Who comes?"), assistant("The neighbours.")]
TWO = [*ONE, user("Every day?"), assistant("Every morning.")]
HUMAN = [{"from": "human", "value": "Who comes?"}, {"from": "gpt", "value": "The neighbours."}]
TREE = {"text": "Who comes?", "role": "prompter", "replies": [
    {"text": "The neighbours.", "role": "assistant", "rank": 0, "replies": []},
    {"text": "Nobody.", "role": "assistant", "rank": 1, "replies": []}]}  # fmt: skip
CASES = {
    "one turn": {"messages": ONE},
    "one turn, with a system turn": {"messages": [SYSTEM, *ONE]},
    "two turns": {"messages": TWO},
    "two turns, with a system turn": {"messages": [SYSTEM, *TWO]},
    "two turns, the first one not to be scored": {"messages": [*ONE[:1], {**ONE[1], "train": False}, *TWO[2:]]},
    "two answers to one question": {"messages": [*ONE, assistant("And friends.")]},
    "prompt and completion": {"prompt": ONE[:1], "completion": ONE[1:]},
    "prompt of two turns": {"prompt": TWO[:3], "completion": TWO[3:]},
    "pair": {"prompt": ONE[:1], "chosen": ONE[1:], "rejected": [assistant("Nobody.")]},
    "pair behind two turns, with a system turn": {
        "prompt": [SYSTEM, *TWO[:3]], "chosen": TWO[3:], "rejected": [assistant("Never.")]},
    "pair of conversations": {"chosen": TWO, "rejected": [*TWO[:3], assistant("Never.")]},
    "pair of messages": {"prompt": ONE[:1], "chosen": ONE[1], "rejected": assistant("Nobody.")},
    "thoughts": {"messages": [user("Who comes?"), assistant(THOUGHT + "The neighbours.")]},
    "thoughts in both turns": {"messages": [
        user("Who comes?"), assistant(THOUGHT + "The neighbours."), user("Every day?"), assistant(THOUGHT + "Yes.")]},
    "thoughts of a pair": {
        "prompt": ONE[:1], "chosen": [assistant(THOUGHT + "The neighbours.")], "rejected": [assistant("Nobody.")]},
    "thoughts under reasoning_content": {
        "messages": [user("Who comes?"), assistant("The neighbours.", reasoning_content="They said so.")]},
    "thoughts under thinking": {
        "messages": [user("Who comes?"), assistant("The neighbours.", thinking="They said so.")]},
    "a call of a tool": {"messages": [user("Who comes?"), call("look"), RESULT, assistant("A goat.")], "tools": TOOLS},
    "a call of a tool, no list of tools": {
        "messages": [user("Who comes?"), call("look"), RESULT, assistant("A goat.")]},
    "two calls in a turn": {"messages": [
        user("Who comes?"), call("look", "hear"), RESULT, {**RESULT, "tool_call_id": "abcdefgh1", "name": "hear"},
        assistant("A goat.")], "tools": TOOLS},
    "a call as the answer": {"messages": [user("Who comes?"), call("look")], "tools": TOOLS},
    "tools, and an answer without a call": {"messages": ONE, "tools": TOOLS},
    "content parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who comes?"}]}, ONE[1]]},
    "ShareGPT": {"conversations": [{"from": "system", "value": "Be brief."}, *HUMAN]},
    "ShareGPT with a call": {"conversations": [
        HUMAN[0], {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "north"}}'},
        {"from": "observation", "value": "a gate"}, HUMAN[1]], "tools": TOOLS},
    "pair of LLaMA-Factory": {
        "conversations": HUMAN[:1], "chosen": HUMAN[1], "rejected": {"from": "gpt", "value": "Nobody."}},
    "conversation with a label": {"messages": TWO, "label": True},
    "Alpaca with history, as chat": {
        "instruction": "Every day?", "input": "", "output": "Yes.", "history": [["Who comes?", "The neighbours."]]},
    "ratings": {"prompt": ONE[:1], "completions": ["Nobody.", "The neighbours."], "scores": [1, 5]},
    "tree of messages": {"prompt": TREE},
    "Alpaca, as chat": {"system": "Be brief.", "instruction": "Who comes?", "input": "At noon.", "output": "Nobody."},
    "SHP, as chat": {"history": "Who comes?", "human_ref_A": "The neighbours.", "human_ref_B": "Nobody.", "labels": 1},
}  # fmt: skip


def line(tokenizer, case: str, row: dict) -> str:
    """What is scored in each completion, part by part, and what the report counts."""
    try:
        tokens, report = tokenize([row], tokenizer, apply_chat_template="as chat" in case)
    except DataError as error:
        said = re.search(r"1 with (.*)\. Mend them", str(error))
        return f"refused: {said[1] if said else error}"
    texts = trained_parts(tokens[0], tokenizer)
    texts.pop("prompt")
    scored = " / ".join(" ".join(f"[{text}]" for text, kept in parts if kept) for parts in texts.values())
    counts = [f"{getattr(report, name)} {said}" for name, said in COUNTS.items() if getattr(report, name)]
    return json.dumps(scored, ensure_ascii=False)[1:-1] + "".join(f"  ({count})" for count in counts)


def test_the_table_of_what_is_scored_is_as_it_was_read(tokenizers, generated):
    lines = ["What is scored: each part in [ ], the completions of a row with / between them. See test_scored.py.", ""]
    for case, row in CASES.items():
        lines += [case, *(f"  {name:<12}{line(tokenizer, case, row)}" for name, tokenizer in tokenizers.items()), ""]
    generated(FOLDER / "scored.txt", "\n".join(lines))


# For any conversation: the scored text is the assistant's words and what ends them.

# What a family writes into an answer beside the assistant's words and special tokens.
MARKUP = {"harmony": {"final", "analysis", "assistant"}}


def conversation(rng: random.Random) -> tuple[list[dict], list[list[str]], list[str]]:
    """A conversation, the words of each of its answers, and all other words; no word occurs twice."""
    count = iter(range(10_000))

    def words(mark):
        return [f"{mark}{next(count)}" + rng.choice(["", ".", "\N{LATIN SMALL LETTER E WITH ACUTE}", "?!"])
                for _ in range(rng.randint(1, 5))]  # fmt: skip

    turns, answers, others = [], [], []
    if rng.random() < 0.4:
        others += (said := words("s"))
        turns.append({"role": "system", "content": " ".join(said)})
    for _ in range(rng.randint(1, 4)):
        others += (said := words("u"))
        turns.append(user(rng.choice([" ", "\n"]).join(said)))
        said = words("a")
        text = rng.choice([" ", "\n\n"]).join(said)
        if rng.random() < 0.3:
            thoughts = words("t")
            said, text = [*thoughts, *said], f"<think>\n{' '.join(thoughts)}\n</think>\n\n{text}"
        answers.append(said)
        turns.append(assistant(rng.choice(["", " ", "\n"]) + text + rng.choice(["", " "])))
    return turns, answers, others


@pytest.mark.parametrize("name", FAMILIES)
def test_the_assistants_words_and_their_ends_are_scored_and_nothing_else(tokenizers, name):
    rng, tokenizer = random.Random(name), tokenizers[name]
    fmt = Format("messages", chat=True, sources={"messages": "messages"})
    kept = []
    for _ in range(100):
        turns, answers, others = conversation(rng)
        try:
            cut = to_example({"messages": turns}, fmt, tokenizer).counts["answers_cut"]
        except RowProblem:
            continue  # refused is not silent
        kept.append((turns, answers, others, cut))
    assert len(kept) >= 30
    tokens, report = tokenize([{"messages": turns} for turns, *_ in kept], tokenizer)
    assert report.answers_cut == sum(cut for *_, cut in kept)
    for row, (turns, answers, others, cut) in zip(tokens, kept, strict=True):
        parts = [text for text, scored in trained_parts(row, tokenizer)["completion"] if scored]
        text = "".join(parts)
        assert not [word for word in others if word in text.split()], (turns, parts)
        missing = [[word for word in said if word not in text] for said in answers]
        assert not missing[-1], (turns, parts)
        assert sum(map(bool, missing)) <= cut, (turns, parts)
        rest = text
        for word in sorted((word for said in answers for word in said), key=len, reverse=True):
            rest = rest.replace(word, " ", 1)
        for token in sorted({*tokenizer.get_added_vocab(), "<think>", "</think>"}, key=len, reverse=True):
            rest = rest.replace(token, " ")
        assert {*rest.split()} <= MARKUP.get(name, set()), (turns, parts)
        assert text.endswith(FAMILIES[name]["eos"])
