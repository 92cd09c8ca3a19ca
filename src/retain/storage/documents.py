"""JSON documents that give back exactly what was written, and nothing but data.

JSON has no NaN, no tuple, and only text as key. Such a value is written as an object with one key that begins with `$`:

    nan -> {"$float": "nan"}    (1, 2) -> {"$tuple": [1, 2]}    {3: "x"} -> {"$dict": [[3, "x"]]}

Any other JSON reader can read these files, too.
"""

import json
import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retain.errors import LineageError
from retain.storage.files import replacing

__all__ = ["decode", "encode", "read_json", "read_lines", "reading", "write_json", "write_lines"]


def encode(value: Any) -> Any:
    """The value as JSON can hold it; `decode` gives back an equal value of the same type."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item) for item in value]}
    assert isinstance(value, Mapping), f"JSON cannot hold a {type(value).__name__}: {value!r:.200}"
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: encode(item) for key, item in value.items()}
    return {"$dict": [[encode(key), encode(item)] for key, item in value.items()]}


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(decode(item) for item in items)
        case {"$dict": pairs}:
            return {decode(key): decode(item) for key, item in pairs}
        case _:
            return {key: decode(item) for key, item in value.items()}


def _to_bytes(value: Any, *, indent: int | None = None) -> bytes:
    """One JSON document in UTF-8, readable in any language."""
    plain = encode(value)
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=indent).encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8; as \uXXXX it is kept exactly
        return json.dumps(plain, allow_nan=False, indent=indent).encode()


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    with replacing(path) as file:
        file.write(_to_bytes(value, indent=2) + b"\n")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write one JSON document a line, all of them or none."""
    with replacing(path) as file:
        for value in values:
            file.write(_to_bytes(value) + b"\n")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Raises:
        LineageError: if the file is missing or is not JSON.
    """
    with reading(path):
        return decode(json.loads(path.read_bytes()))


def read_lines(path: Path) -> list[Any]:
    """Read what `write_lines` wrote.

    Raises:
        LineageError: if the file is missing or a line is not JSON.
    """
    with reading(path), path.open("rb") as file:
        return [decode(json.loads(line)) for line in file]


@contextmanager
def reading(path: Path) -> Generator[None]:
    """A file that is missing or is not what it should be becomes an error that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        hint = "`retain fsck LINEAGE` shows all that is damaged and what to do"
        raise LineageError(f"{path} cannot be read", problems=[reason], hint=hint) from error
