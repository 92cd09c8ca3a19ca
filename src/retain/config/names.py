"""A choice by its name: an entry of a literal dict, or a class of the user's own, `my_pkg.mine:MyStrategy`."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from retain.config.fields import build, plain, shown, suggestion

__all__ = ["find", "make", "name_of", "named"]


def find(name: str, known: Mapping[str, type], protocol: type, path: str, problems: list[str]) -> type | None:
    """The class of that name; None, with a problem, where there is none or it has not the protocol's shape.

    Args:
        name: a key of `known`, or `module:Class`, which is imported.
        known: every class by its name in a recipe.
        protocol: what the class must have.
        path: of the name in the recipe.
        problems: receives one line a problem.
    """
    if ":" not in name:
        if name not in known:
            problems.append(f"{path}: no {protocol.__name__.lower()} `{name}`. {suggestion(name, known)}")
        return known.get(name)
    module_name, _, class_name = name.partition(":")
    try:
        found = vars(import_module(module_name)).get(class_name)
    except Exception as error:  # noqa: BLE001  a user's module may fail in any way; say how
        problems.append(f"{path}: `{module_name}` cannot be imported: {type(error).__name__}: {error}")
        return None
    if not isinstance(found, type):
        problems.append(f"{path}: `{module_name}` has no class `{class_name}`")
        return None
    unwritten: frozenset[str] = vars(found).get("__abstractmethods__", frozenset())
    missing = sorted(member for member in members(protocol) if member not in dir(found) or member in unwritten)
    if missing or not is_dataclass(found):
        lacks = f"lacks {', '.join(missing)}" if missing else "is not a dataclass"
        problems.append(f"{path}: `{name}` is no {protocol.__name__.lower()}: it {lacks}")
        return None
    return found


def members(protocol: type) -> set[str]:
    """What a class must have to be one of these."""
    return {name for name in {*vars(protocol), *vars(protocol).get("__annotations__", {})} if name[0] != "_"}


def make(given: Any, known: Mapping[str, type], protocol: type, path: str, problems: list[str]) -> Any:
    """The instance that `{name: ..., field: value, ...}` describes, or None, with a problem.

    Args:
        given: what the recipe says.
        known, protocol, path, problems: as in `find`.
    """
    kind = protocol.__name__.lower()
    if not isinstance(given, Mapping):
        problems.append(f"{path}: expected the name of a {kind}, or its name and fields, got {shown(given)}")
        return None
    options: dict[str, Any] = dict(given)  # pyright: ignore[reportUnknownArgumentType]
    name = options.pop("name", None)
    if not isinstance(name, str):
        problems.append(f"{path}.name: expected the name of a {kind}, got {shown(name)}. {suggestion('', known)}")
        return None
    found = find(name, known, protocol, f"{path}.name", problems)
    return None if found is None else build(found, options, path, problems)


def name_of(cls: type, known: Mapping[str, type]) -> str:
    """The name by which `find` finds the class."""
    names = [name for name, other in known.items() if other is cls]
    return names[0] if names else f"{cls.__module__}:{cls.__qualname__}"


def named(value: Any, known: Mapping[str, type]) -> dict[str, Any]:
    """A choice as a recipe says it: its name and every field."""
    return {"name": name_of(type(value), known), **plain(value)}
