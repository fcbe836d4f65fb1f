"""Trees of messages, as OpenAssistant publishes them: each message has replies, and replies to a question are ranked.

prompter "Name a colour."
    assistant "Red."        rank 0, the best one
        prompter "Another?"
            assistant "Blue."
    assistant "Well..."     rank 1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastalign.data.messages import RowProblem
from fastalign.data.ranked import best_and_worst

PAIR_RULE = "of the ranked answers to each question, the best one is chosen and the worst rejected"
CONVERSATION_RULE = "one conversation per tree, with the best reply at each turn"


def is_tree(root) -> bool:
    """Whether a cell holds a message with its replies."""
    return isinstance(root, dict) and isinstance(root.get("text"), str) and "replies" in root


def pairs(row: dict) -> list[dict]:
    """A pair for each question of a tree that has ranked answers, of different ranks."""
    found = []
    for turns, node in _walk(_root(row)):
        ranked = [(reply["text"], -float(reply["rank"])) for reply in _replies(node) if _is_ranked_answer(reply)]
        found += [
            {"prompt": turns, **{name: [_turn("assistant", text)] for name, text in pair.items()}}
            for pair in best_and_worst(ranked)
        ]
    return found


def conversation(row: dict) -> list[dict]:
    """The conversation that takes the best reply at each turn, up to its last answer."""
    node, turns = _root(row), []
    while node is not None:
        turns.append(_turn(node.get("role"), node["text"]))
        # Replies without a rank come behind the others, in the order in which they stand.
        node = min(_replies(node), key=_rank, default=None)
    while turns and turns[-1]["role"] not in ("assistant", "gpt", "bot"):
        turns.pop()
    return [{"messages": turns}] if turns else []


def join(rows: Iterable[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """The trees of an export that has one message per row, each with the number of its first message's row.

    Messages that belong to no tree come as rows of another kind: with "orphan", the id of a parent from which no way
    leads to a first message; or with "twice", an id that an earlier message has.
    """
    nodes: dict[str, tuple[int, dict]] = {}
    problems = []
    for number, row in rows:
        if row["message_id"] in nodes:
            problems.append((number, {"twice": row["message_id"]}))
        else:
            nodes[row["message_id"]] = (number, {**row, "replies": []})
    roots = []
    for number, node in nodes.values():
        parent = node["parent_id"]
        if parent is None or parent == "":
            roots.append((number, node))
        elif parent in nodes:
            nodes[parent][1]["replies"].append(node)
    reached = {node["message_id"] for _, root in roots for node in _all(root)}
    problems += [(n, {"orphan": node["parent_id"]}) for n, node in nodes.values() if node["message_id"] not in reached]
    return [(number, {"prompt": root}) for number, root in roots] + sorted(problems, key=lambda pair: pair[0])


def _all(root: dict) -> Iterator[dict]:
    open_nodes = [root]
    while open_nodes:
        node = open_nodes.pop()
        yield node
        open_nodes += node["replies"]


def _root(row: dict) -> dict:
    if "twice" in row:
        raise RowProblem("repeated message", f"an earlier message has the id {row['twice']!r}")
    if "orphan" in row:
        raise RowProblem("missing parent", f"its parent {row['orphan']!r} is not among the messages of a tree")
    if not is_tree(row["prompt"]):
        raise RowProblem("wrong type", f"a tree needs a message with 'text' and 'replies', found {row['prompt']!r:.60}")
    return row["prompt"]


def _walk(root: dict) -> Iterator[tuple[list[dict], dict]]:
    """(turns up to a message, the message) of each message of a tree."""
    open_nodes = [([_turn(root.get("role"), root["text"])], root)]
    while open_nodes:
        turns, node = open_nodes.pop(0)
        yield turns, node
        open_nodes += [([*turns, _turn(reply.get("role"), reply["text"])], reply) for reply in _replies(node)]


def _replies(node: dict) -> list[dict]:
    """The replies to a message, without those that were deleted or did not pass the review."""
    replies = [reply for reply in node.get("replies") or [] if isinstance(reply, dict) and reply.get("text")]
    return [reply for reply in replies if not reply.get("deleted") and reply.get("review_result") is not False]


def _is_ranked_answer(reply: dict) -> bool:
    return reply.get("role") != "prompter" and _rank(reply) != float("inf")


def _rank(reply: dict) -> float:
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, (int, float)) and rank == rank else float("inf")  # NaN is no rank


def _turn(role, text: str) -> dict:
    if not isinstance(role, str):
        raise RowProblem("wrong type", f"a message of a tree needs a 'role', found {role!r:.40}")
    return {"role": role, "content": text}
