"""Chat messages as people write them, brought into one form: a list of dicts with `role` and `content`.

JSON text of messages                          is parsed
{"from": "human", "value": "..."}              becomes {"role": "user", "content": "..."}
content as a list of text parts                becomes one string
a turn of "function_call", whose text is JSON  becomes {"role": "assistant", "tool_calls": [...]}
tool calls whose arguments are JSON text       get parsed arguments
"train", "weight", "loss_weight" of a turn     become "train": False where the turn is not scored
"""

from __future__ import annotations

import json
import re
from typing import Any

ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "observation": "tool", "function": "tool",
}  # fmt: skip
KNOWN_ROLES = ("user", "assistant", "system", "tool")
CALLS = ("function_call", "tool_call")  # speakers of turns whose text is one call of a tool, or a list of calls
WEIGHTS = ("train", "weight", "loss_weight")  # keys of a turn, or columns, that say how much it counts

_MESSAGES_HEAD = re.compile(r"""\s*\[\s*\{\s*(["'])(role|from|content|value)\1\s*:""")
_SPEAKER_KEY = re.compile(r"""["'](role|from)["']\s*:""")


class RowProblem(Exception):
    """A row that cannot be used.

    Attributes:
        kind: the kind of problem, which is counted over the data set.
        detail: what is wrong with this row.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def holds_messages(value) -> bool:
    """Whether a cell holds chat messages: as a list, as one message, or as the text of a list of messages."""
    if not isinstance(value, str):
        return isinstance(value, list) or (
            isinstance(value, dict) and ("role" in value or {"from", "value"} <= {*value})
        )
    if not _MESSAGES_HEAD.match(value):
        return False
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):  # damaged, or as Python prints a list: `read_messages` says so
        return bool(_SPEAKER_KEY.search(value))
    return all(isinstance(item, dict) and ("role" in item or "from" in item) for item in parsed)


def read_messages(value, role: str, column: str) -> list[dict]:
    """A cell as messages, checked. A plain string becomes one message of the given role.

    Arrow gives every message all keys that occur in the data set, null where a message lacks one. Nulls are removed,
    since a chat template may test only whether a key exists. Nulls inside JSON text stay: somebody wrote them.

    Args:
        value: the cell: a list of messages, one message, their JSON text, or a plain string.
        role: the role of a plain string.
        column: the column's name, for the error.

    Returns:
        The messages, each a dict of `role`, `content` and other keys that the row has.

    Raises:
        RowProblem: the cell holds no messages, or messages that cannot be rendered as text.
    """
    if isinstance(value, str) and holds_messages(value):
        value = _parse(value, column)
    if isinstance(value, str) and column != "messages":
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowProblem("wrong type", f"{column!r} must be a non-empty list of messages, found {value!r:.60}")
    return [_message(item, column) for item in value]


def _parse(text: str, column: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if re.match(r"\s*\[\s*\{\s*'", text):
            detail = f"{column!r} holds messages as Python prints them: write them as JSON, with json.dumps(messages)"
        else:
            detail = f"{column!r} begins like JSON text of messages, but is not valid JSON ({error!s:.60})"
        raise RowProblem("wrong type", detail) from error


def _message(value, column: str) -> dict:
    """One message in the form that chat templates take."""
    if isinstance(value, dict) and isinstance(value.get("from"), str) and value.get("role") is None:
        value = _from_sharegpt(value, column)
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise RowProblem("wrong type", f"{column!r} needs messages with 'role' and 'content', found {value!r:.80}")
    if not isinstance(value.get("content"), (str, list, type(None))):
        raise RowProblem("wrong type", f"{column!r} has a message whose content is {value['content']!r:.60}")
    message = {"content": "", **without_nulls(value)}
    message["role"] = _role(message["role"])
    message["content"] = _joined(message["content"])
    if message["role"] in CALLS:
        message |= {"role": "assistant", "content": "", "tool_calls": _written_calls(message["content"])}
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"])
    if not _is_scored(message):
        message["train"] = False
    return {key: item for key, item in message.items() if key not in WEIGHTS or (key == "train" and item is False)}


def _role(name: str) -> str:
    """The name that chat templates have for a role. A role that is not known here is left to the template."""
    lower = name.strip().lower()
    return ROLES.get(lower, lower if lower in (*KNOWN_ROLES, *CALLS) else name)


def _written_calls(text) -> list[dict]:
    """The calls of tools that the text of a turn holds as JSON: {"name": ..., "arguments": ...}, or a list of these."""
    calls = parse_json(text, "function_call") if isinstance(text, str) else text
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowProblem("wrong type", f"a function_call must be JSON with 'name' and 'arguments', found {text!r:.60}")
    return [{"type": "function", "function": call} for call in calls]


def _from_sharegpt(value: dict, column: str) -> dict:
    speaker = _role(value["from"])
    if speaker not in (*KNOWN_ROLES, *CALLS):
        raise RowProblem(
            "wrong type",
            f"{column!r} has the unknown speaker {value['from']!r}: the speakers are human, gpt, system, tool, "
            "observation and function_call",
        )
    rest = {key: item for key, item in value.items() if key not in ("from", "value", "role")}
    return {"role": speaker, "content": value.get("value"), **rest}


def _joined(content: str | list) -> str | list:
    """Parts of text as one string. Most templates take strings alone."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise RowProblem("not text", f"a message has a part of type {part.get('type')!r}: only text is trained on")
    return "".join(part["text"] for part in content)


def _tool_calls(calls) -> Any:
    """Tool calls with arguments as dicts: a template that turns them into JSON would escape JSON text twice."""
    calls = parse_json(calls, "tool_calls") if isinstance(calls, str) else calls
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                continue  # not JSON: text that the template shall write as it is
            function["arguments"] = parsed if isinstance(parsed, dict) else arguments
    return calls


def _is_scored(message: dict) -> bool:
    """Whether an answer counts: what its keys `train`, `weight` and `loss_weight` say, true without them."""
    found = {key: message[key] for key in WEIGHTS if key in message}
    for key, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowProblem("turn weight", f"{key!r} of a turn must be 0 or 1, found {value!r:.40}")
    if message["role"] != "assistant":
        if any(found.values()):
            raise RowProblem(
                "turn weight", f"a {message['role']} turn has {found}, but only assistant turns are scored"
            )
        return True  # it is not scored anyway
    return all(found.values())


def parse_json(text: str, name: str) -> Any:
    """The value in a cell of JSON text; `name` is the column's, for the error.

    Raises:
        RowProblem: the text is not valid JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowProblem("wrong type", f"{name!r} is not valid JSON ({error!s:.60})") from error


def read_json(row: dict, name: str, kind: type) -> Any:
    """A cell that holds a list or a dict, or its JSON text; None if it is empty.

    Args:
        row: the row.
        name: the column's name.
        kind: what the cell must hold, `list` or `dict`.

    Raises:
        RowProblem: the cell holds something else.
    """
    value = row.get(name)
    # Nulls of a dict come from Arrow, which gives all rows the same keys. Nulls of JSON text were written.
    value = parse_json(value, name) if isinstance(value, str) and value.strip() else without_nulls(value)
    if value and not isinstance(value, kind):
        raise RowProblem("wrong type", f"{name!r} must be a {kind.__name__}, found {type(value).__name__}")
    return value or None


def without_nulls(value) -> Any:
    """A nested value without the dict entries that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
