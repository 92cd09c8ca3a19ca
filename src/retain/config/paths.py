"""Paths in recipes: relative to the recipe's folder, and there, or the nearest name is said."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from retain.data.readers import READERS

__all__ = ["is_local", "located", "missing_file"]

PATH_KEYS = ("output_dir", "protect_base", "model.name", "tasks.train", "tasks.test", "tasks.validation")
KEYWORDS = {("protect_base", "self"), ("protect_base", "off"), ("output_dir", "")}
SPLIT = re.compile(r"(.+)(:\w+(?:\[[^\]]*\])?)")


def cut(text: str, root: Path) -> tuple[str, str]:
    """The name of a saved data set and its `:split`, where it has one."""
    match = SPLIT.fullmatch(text)
    return (match[1], match[2]) if match and not (root / text).exists() else (text, "")


def is_local(text: str, root: Path) -> bool:
    """Does the text name a file or folder, rather than something on a hub?"""
    name, _ = cut(text, root)
    return (
        name.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or Path(name).suffix.lower() in (*READERS, ".arpa", ".gguf")
        or (root / name).exists()
    )


def located(keys: Sequence[str], value: Any, root: Path) -> Any:
    """The value, absolute where it is a relative path.

    Args:
        keys: where the value stands, from the root of the recipe; list positions as digits.
        value: no mapping or list, or one that holds no paths.
        root: what relative paths start from.
    """
    place = ".".join(key for key in keys if not key.isdigit())
    if not isinstance(value, str) or place not in PATH_KEYS or (place, value) in KEYWORDS:
        return value
    if place in ("output_dir", "protect_base") or is_local(value, root):
        name, split = cut(value, root)
        return f"{(root / Path(name).expanduser()).resolve()}{split}"
    return value


def missing_file(source: str) -> str:
    """`no file ...`, with the nearest name that is there; empty where the source exists."""
    path = Path(cut(source, Path())[0])
    if path.exists():
        return ""
    if not path.parent.is_dir():
        return f"no folder {str(path.parent)!r}"
    near = get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1, cutoff=0.5)
    return f"no file {str(path)!r}" + (f". Did you mean `{near[0]}`?" if near else "")
