"""Recipes as text: YAML 1.2's scalars, read strictly, and written so that they read back the same."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from retain.errors import ConfigError

__all__ = ["read_recipe", "read_value", "write_recipe"]

# YAML 1.2's core schema. PyYAML's own is 1.1, where `off`, `yes` and `no` are booleans and 1e-4 is text.
SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
]


class RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader with the scalars above; collects keys that are given twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping; of a key that is given twice, the last."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                self.duplicates.append(f"line {line}: `{key.value}` is given twice, first on line {lines[key.value]}")
            lines.setdefault(str(key.value), line)
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """YAML's safe dumper; quotes what `RecipeLoader` would not read as text."""


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text; where it has Unicode's own line breaks, in double quotes, as YAML folds them in any others."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


RecipeDumper.add_representer(str, represent_text)
for kind in (RecipeLoader, RecipeDumper):
    kind.yaml_implicit_resolvers = {}
    for tag, pattern, first in SCALARS:
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)


def load(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML document, and what is wrong with it.

    Raises:
        yaml.YAMLError: if the text is not YAML.
    """
    loader = RecipeLoader(text)
    try:
        return loader.get_single_data(), loader.duplicates
    finally:
        loader.dispose()


def explain(error: yaml.YAMLError) -> str:
    """Where YAML stopped and why, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


def read_recipe(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of a recipe, and the keys that it gives twice.

    Raises:
        ConfigError: if it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = ", ".join(sorted(other.name for other in path.parent.glob("*.y*ml"))[:5])
        raise ConfigError(
            f"no recipe {str(path)!r}",
            problems=[f"{path.parent} has: {near}"] if near else [],
            hint="`retain init` writes a complete recipe to start from",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}", hint="give a text file in UTF-8") from error
    hint = "a recipe is lines of `key: value`; `retain init` writes one to start from"
    try:
        value, duplicates = load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not YAML", problems=[explain(error)], hint=hint) from error
    if not isinstance(value, dict):
        kind = "empty" if value is None else type(value).__name__
        raise ConfigError(f"{path.name} is not a recipe: expected keys with values, got {kind}", hint=hint)
    keys: dict[Any, Any] = value
    return {str(key): item for key, item in keys.items()}, duplicates


def read_value(text: str) -> Any:
    """The value of an override, read as a recipe would: `1e-4` is a number, `[a, b]` a list, `off` text.

    Raises:
        ValueError: if it is not YAML.
    """
    try:
        return load(text)[0]
    except yaml.YAMLError as error:
        raise ValueError(explain(error)) from error


def write_recipe(tree: dict[str, Any]) -> str:
    """YAML that `read_recipe` reads back as the same keys and values, in the same order."""
    return yaml.dump(tree, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)
