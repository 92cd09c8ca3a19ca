"""A dataclass from what a user wrote: strict types, every problem at once, each with its path."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from retain.errors import UserError

__all__ = ["build", "checked", "expected", "plain", "said_by", "shown", "suggestion"]

T = TypeVar("T")

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path", NoneType: "null"}


def shown(value: Any) -> str:
    """A value as the user wrote it, cut at 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def suggestion(name: str, allowed: Iterable[str]) -> str:
    """`Did you mean ...?` where a name is near, else all that is allowed."""
    names = sorted(allowed)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean `{near[0]}`?" if near else f"Allowed: {', '.join(names) or 'none'}"


def expected(hint: Any) -> str:
    """A type in words: `int | None` is "a whole number or null"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(expected(argument) for argument in arguments)
    kind = origin or hint
    if kind in WORDS:
        return WORDS[kind]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "keys with values"
    if isinstance(kind, type) and issubclass(kind, Sequence):
        return f"a list of {expected(arguments[0])}" if arguments else "a list"
    return str(hint)


def checked(hint: Any, value: Any) -> Any:
    """The value as its type wants it: a list may become a tuple, text a path, a whole number a number; nothing else.

    Raises:
        ValueError: if it is none.
    """
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError) as error:
        raise ValueError(f"expected {expected(hint)}, got {shown(value)}") from error


def is_required(field: Field[Any]) -> bool:
    """Has the field no default?"""
    return field.default is MISSING and field.default_factory is MISSING


def in_its_own_words(cls: type, field: Field[Any], hint: Any) -> str:
    """What the class itself says that a number must be, found by giving it -1; else the type in words."""
    others = [other for other in fields(cls) if other is not field]
    if hint in (int, float, int | None, float | None) and not any(map(is_required, others)):
        try:
            cls(**{field.name: -1})
        except (ValueError, UserError) as error:
            for message in said_by(error):
                if words := re.match(rf"{field.name}: expected (.+), got", message):
                    return words[1]
    return expected(hint)


def said_by(error: Exception) -> Sequence[str]:
    """What is wrong, one line each."""
    return (error.problems or (error.message,)) if isinstance(error, UserError) else (str(error),)


def build(cls: type[T], given: Mapping[str, Any], path: str, problems: list[str]) -> T | None:
    """An instance with the given fields and defaults for the others.

    Types are checked strictly (see `checked`). What `__post_init__` refuses is reported under the field that its
    message begins with (`ratio: expected ...`), and the field's default stands in for it, so that further problems are
    found too.

    Args:
        cls: a dataclass.
        given: by field name.
        path: of the mapping in the recipe, like `$.train`.
        problems: receives one line a problem.

    Returns:
        the instance; None where no instance could be made.
    """
    known = {field.name: field for field in fields(cast("Any", cls)) if field.init}
    hints = get_type_hints(cls)
    problems += [f"{path}.{key}: unknown key. {suggestion(key, known)}" for key in given if key not in known]
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name not in given:
            if is_required(field):
                problems.append(f"{path}.{name}: missing; expected {expected(hints[name])}")
            continue
        try:
            values[name] = checked(hints[name], given[name])
        except ValueError:
            wanted = in_its_own_words(cls, field, hints[name])
            problems.append(f"{path}.{name}: expected {wanted}, got {shown(given[name])}")
    if any(is_required(field) and name not in values for name, field in known.items()):
        return None
    while True:
        try:
            return cls(**values)
        except (ValueError, UserError) as error:
            refused: set[str] = set()
            for message in said_by(error):
                name, _, rest = message.partition(": ")
                problems.append(f"{path}.{name}: {rest}" if name in known else f"{path}: {message}")
                refused.add(name)
            if not refused <= values.keys() or any(is_required(known[name]) for name in refused):
                return None
            values = {name: value for name, value in values.items() if name not in refused}


def plain(value: Any) -> Any:
    """A dataclass, or what one holds, as a recipe can write it."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
        case Mapping():
            items = cast("Mapping[Any, Any]", value)
            return {str(key): plain(item) for key, item in items.items()}
        case list() | tuple():
            return [plain(item) for item in cast("Sequence[Any]", value)]
        case _:
            return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.init}
