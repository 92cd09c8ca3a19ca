"""A row of each conversation format as a list of messages.

A turn of the user that nothing answers, at the end of a conversation, is left out: there is nothing to learn from it.
"""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, cast

from retain.data.readers import Row
from retain.types import Message

__all__ = [
    "ROLES",
    "RowProblem",
    "as_text",
    "from_alpaca",
    "from_messages",
    "from_pair",
    "from_sharegpt",
    "from_text_label",
]

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Our role for every name that a role goes by."""


class RowProblem(Exception):
    """Why one row cannot be used; collected over all rows into one error."""


def as_text(value: Any, column: str) -> str:
    """A text, or a number as text.

    Raises:
        RowProblem: anything else, or text that is not Unicode.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise RowProblem(f"{column}: expected text, got {'nothing' if value is None else _shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(f"{column}: character {error.start} is half of a surrogate pair") from error
    return value


def from_messages(row: Row) -> list[Message]:
    """`messages`: a list of role and content, each with a `weight` where wanted."""
    return _turns(row.get("messages"), "messages")


def from_sharegpt(row: Row) -> list[Message]:
    """`conversations`: a list of from and value; `system` beside it where wanted."""
    return _with_system(row, _turns(row.get("conversations"), "conversations"))


def from_alpaca(row: Row) -> list[Message]:
    """`instruction`, then a blank line and `input` where there is one; `history` holds earlier pairs."""
    turns: list[Message] = []
    for pair in cast("list[Any]", row.get("history") or []):
        if not isinstance(pair, list | tuple) or len(cast("list[Any]", pair)) != 2:
            raise RowProblem(f"history: expected [question, answer], got {_shown(pair)}")
        turns += [Message("user", as_text(pair[0], "history")), Message("assistant", as_text(pair[1], "history"))]
    parts = [as_text(row.get("instruction"), "instruction"), as_text(row.get("input") or "", "input")]
    question = "\n\n".join(part for part in parts if part.strip())
    return _with_system(
        row, [*turns, Message("user", question), Message("assistant", as_text(row.get("output"), "output"))]
    )


def from_pair(row: Row) -> list[Message]:
    """`prompt` and `completion`, each a text or a list of messages; `system` beside them where wanted."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list):  # only the completion is trained, whatever the assistant said before
        given = _turns(prompt, "prompt", trim=False)
        turns = [replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in given]
    else:
        turns = [Message("user", as_text(prompt, "prompt"))]
    if isinstance(completion, list):
        return _with_system(row, [*turns, *_turns(completion, "completion")])
    return _with_system(row, [*turns, Message("assistant", as_text(completion, "completion"))])


def from_text_label(row: Row) -> list[Message]:
    """`text` is asked, `label` is the answer."""
    return [Message("user", as_text(row.get("text"), "text")), Message("assistant", as_text(row.get("label"), "label"))]


def _with_system(row: Row, turns: list[Message]) -> list[Message]:
    system = as_text(row.get("system") or "", "system")
    return [Message("system", system), *turns] if system.strip() else turns


def _turns(value: Any, column: str, *, trim: bool = True) -> list[Message]:
    """The messages of a list of dictionaries, spelled the OpenAI or the ShareGPT way."""
    if not isinstance(value, list) or not value:
        raise RowProblem(f"{column}: expected a list of messages, got {_shown(value)}")
    turns = [_message(item, f"{column}[{place}]") for place, item in enumerate(cast("list[Any]", value))]
    while trim and turns and turns[-1].role != "assistant":
        turns.pop()
    return turns


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise RowProblem(f"{place}: expected {{'role': ..., 'content': ...}}, got {_shown(item)}")
    given = cast("Row", item)
    name = given.get("role", given.get("from"))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        near = get_close_matches(str(name), ROLES, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise RowProblem(f"{place}: role {name!r} is unknown.{meant} Allowed: {', '.join(ROLES)}")
    content = given.get("content", given.get("value"))
    if content is None and (given.get("tool_calls") or given.get("function_call")):
        raise RowProblem(f"{place}: a tool call without text; tool calls are not trained")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in cast("list[Any]", content))
    return Message(role, as_text(content, f"{place}.content"), _weight(given.get("weight"), place))


def _part(part: Any, place: str) -> str:
    """The text of one part of a message that is given in parts."""
    if isinstance(part, dict) and (text := cast("Row", part).get("text")) is not None:
        return as_text(text, f"{place}.content")
    raise RowProblem(f"{place}: only parts of text can be trained, got {_shown(part)}")


def _weight(value: Any, place: str) -> float:
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RowProblem(f"{place}.weight: expected a number from 0 to 1, got {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
