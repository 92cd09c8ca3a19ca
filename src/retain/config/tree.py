"""What a recipe and the command line say together, before it is checked: one tree in our own spelling."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from retain.config.fields import shown, suggestion
from retain.config.paths import located
from retain.config.recipe import read_recipe, read_value
from retain.config.spellings import FLAT, SPELLINGS, converted, renamed

__all__ = ["Tree", "json_path", "leaves", "read_tree"]

CHOICES = ("model", "method", "strategy")
"""May be given by name alone: `ewc` is `{name: ewc}`."""

LISTS = ("strategy", "tasks")


def json_path(keys: Sequence[str]) -> str:
    """`$.tasks[0].train`."""
    return "$" + "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in keys)


def spelled(keys: Sequence[str], value: Any) -> str:
    """`train.packing: true`, as the user would write it."""
    return f"{'.'.join(keys)}: {value if isinstance(value, str) else shown(value)}"


def leaves(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of every leaf; a list without mappings in it is one."""
    match value:
        case dict():
            for key, item in cast("dict[str, Any]", value).items():
                yield from leaves(item, (*keys, key))
        case list() if any(isinstance(item, dict) for item in cast("list[Any]", value)):
            for at, item in enumerate(cast("list[Any]", value)):
                yield from leaves(item, (*keys, str(at)))
        case _:
            yield keys


@dataclass
class Tree:
    """Settings by section, where each came from, and what is to be said of them.

    Args:
        sections: the recipe's own keys.
        values: by section, in our spelling; choices as mappings with a `name`, paths absolute.
        origins: `flag` or `recipe` of every setting that was given, by its dotted key.
        notes: other tools' spellings that were understood.
        problems: what cannot be understood, one line each.
    """

    sections: frozenset[str]
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    origins: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])

    def put(self, keys: tuple[str, ...], value: Any, origin: str, root: Path) -> None:
        """Set a value and all that is below it.

        Args:
            keys: where, as the user spelled it; list positions as digits.
            value: what YAML gave.
            origin: `recipe`, whose settings add up, or `flag`, which replaces what was there.
            root: what relative paths start from.
        """
        if value is None and len(keys) == 1:
            return
        target = renamed(keys, self.sections)
        if target[0] not in self.sections:
            self.problems.append(f"{json_path(keys)}: unknown key. {self.suggest(keys[0])}")
            return
        ours = converted(target, value)
        if target != keys or ours is not value:
            self.notes.append(f"`{spelled(keys, value)}` is read as `{spelled(target, ours)}`")
        is_item = len(target) == 2 and target[0] in LISTS and target[1].isdigit()
        if isinstance(ours, str) and target[0] in CHOICES and (len(target) == 1 or is_item):
            ours = {"name": ours}
        if isinstance(ours, Mapping) and (len(target) == 1 or is_item):
            self.open(target, {}, origin)
            for key, item in cast("Mapping[Any, Any]", ours).items():
                self.put((*target, str(key)), item, origin, root)
        elif isinstance(ours, list) and len(target) == 1 and target[0] in LISTS:
            self.open(target, [], origin)
            for at, item in enumerate(cast("list[Any]", ours)):
                self.put((*target, str(at)), item, origin, root)
        else:
            self.assign(target, located(target, ours, root), origin)

    def suggest(self, key: str) -> str:
        """What the user may have meant by a key at the root."""
        near = suggestion(key, {*self.sections, *SPELLINGS, *FLAT})
        return near if near.startswith("Did") else suggestion(key, self.sections)

    def open(self, keys: tuple[str, ...], empty: Any, origin: str) -> None:
        """Make room for a mapping or list; a flag's replaces the old one."""
        if origin == "flag" or not self.has(keys):
            dotted = ".".join(keys)
            self.origins = {
                key: value for key, value in self.origins.items() if key != dotted and not key.startswith(f"{dotted}.")
            }
            self.assign(keys, empty, "")

    def has(self, keys: tuple[str, ...]) -> bool:
        """Is there a value at these keys?"""
        node: Any = self.values
        for key in keys:
            if isinstance(node, list) and key.isdigit() and int(key) < len(cast("list[Any]", node)):
                node = node[int(key)]
            elif isinstance(node, dict) and key in node:
                node = node[key]
            else:
                return False
        return True

    def assign(self, keys: tuple[str, ...], value: Any, origin: str) -> None:
        """Set one leaf, making what is above it; a leaf is set once by a recipe and once by flags."""
        dotted = ".".join(keys)
        if origin and self.origins.get(dotted) == origin:
            self.problems.append(f"{json_path(keys)}: given twice")
            return
        node: Any = self.values
        for depth, key in enumerate(keys):
            is_last = depth == len(keys) - 1
            fresh: Any = value if is_last else [] if keys[depth + 1].isdigit() else {}
            match node:
                case list() if key.isdigit() and int(key) <= len(cast("list[Any]", node)):
                    at = int(key)
                    node[at : at + 1] = [fresh if is_last or at == len(cast("list[Any]", node)) else node[at]]
                    node = node[at]
                case dict() if not key.isdigit():
                    if is_last or key not in node:
                        node[key] = fresh
                    node = node[key]
                case _:
                    above = json_path(keys[:depth])
                    kind = f"a list of {len(cast('list[Any]', node))}" if isinstance(node, list) else "no list"
                    self.problems.append(f"{json_path(keys)}: there is no such place; {above} is {kind}")
                    return
        if origin:
            self.origins[dotted] = origin

    def origin(self, keys: Sequence[str]) -> str:
        """Where a resolved setting came from: `flag`, `recipe` or `default`."""
        found = [self.origins.get(".".join(keys[:end])) for end in range(len(keys), 0, -1)]
        return next((origin for origin in found if origin), "default")


def read_tree(path: Path | None, overrides: Sequence[str], sections: frozenset[str]) -> Tree:
    """A recipe, and over it the command line's `key.key=value`.

    Relative paths start from the recipe's folder in a recipe, and from the working directory on the command line.

    Args:
        path: the recipe; None for flags alone.
        overrides: later than the recipe, so they win.
        sections: the recipe's own keys.

    Raises:
        ConfigError: if the recipe cannot be read at all; smaller problems are collected.
    """
    tree = Tree(sections)
    if path is not None:
        recipe, duplicates = read_recipe(path)
        tree.problems += duplicates
        for key, value in recipe.items():
            tree.put((key,), value, "recipe", path.parent.absolute())
    flags: list[tuple[tuple[str, ...], Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            tree.problems.append(f"{override!r}: expected key=value, like train.learning_rate=1e-4")
            continue
        try:
            flags.append((tuple(key.split(".")), read_value(text)))
        except ValueError as error:
            tree.problems.append(f"{override!r}: the value is not YAML: {error}")
    for keys, value in sorted(
        flags, key=lambda flag: len(renamed(flag[0], sections))
    ):  # `method=full`, then `method.r=8`
        tree.put(keys, value, "flag", Path.cwd())
    return tree
