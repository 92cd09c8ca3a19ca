"""A strategy's memory on disk: named tensors, lists of examples, and what JSON can hold.

    state.json            what each name is, in order, and the plain values; written last
    tensors.safetensors   the tensors, each in its own type
    <name>.jsonl          a list of `Example`, one a line; `/` in the name becomes `%2F`

Nothing here can run code when it is read.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retain.storage.documents import encode, read_json, read_lines, reading, write_json, write_lines
from retain.storage.files import disk_errors
from retain.types import Example, Message

__all__ = ["load_state", "save_state"]


def save_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write a state; `load_state` gives back an equal one. What lay in the folder before is gone.

    Args:
        state: tensors, lists of `Example`, and what `storage.encode` takes, by name.
        folder: made where it is missing.

    Raises:
        LineageError: if the disk is full or may not be written.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    examples = {name: value for name, value in state.items() if _holds_examples(value)}
    values = {name: value for name, value in state.items() if name not in tensors and name not in examples}
    encode(values)  # refuses what JSON cannot hold before anything is written
    kinds = {name: "tensor" if name in tensors else "examples" if name in examples else "value" for name in state}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").unlink(missing_ok=True)  # first: a folder without it holds no state
        for pattern in ("*.jsonl", "*.safetensors", ".*"):
            for old in folder.glob(pattern):
                old.unlink()
        if tensors:
            save_file(_unshared(tensors), folder / "tensors.safetensors")
        for name, rows in examples.items():
            write_lines(_rows_file(folder, name), map(_row_of, rows))
        write_json(folder / "state.json", {"kinds": kinds, "values": values})


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote: equal, in the same order, tensors on the CPU.

    Raises:
        LineageError: if a part is missing or damaged.
    """
    index = folder / "state.json"
    with reading(index):
        content = read_json(index)
        kinds: dict[str, str] = dict(content["kinds"])
        state: dict[str, Any] = dict.fromkeys(kinds)
        state |= {name: content["values"][name] for name, kind in kinds.items() if kind == "value"}
    tensors = folder / "tensors.safetensors"
    with reading(tensors):
        wanted = [name for name, kind in kinds.items() if kind == "tensor"]
        found = load_file(tensors) if wanted else {}
        state.update({name: found[name] for name in wanted})
    for name, kind in kinds.items():
        if kind == "examples":
            with reading(_rows_file(folder, name)):
                state[name] = [_example_of(row) for row in read_lines(_rows_file(folder, name))]
    return state


def _rows_file(folder: Path, name: str) -> Path:
    return folder / f"{quote(name, safe='')}.jsonl"


def _holds_examples(value: object) -> bool:
    """Is it a list of `Example`? An empty list is plain JSON."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Example) for item in value)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor on the CPU, dense, in memory of its own: safetensors takes no views."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone(memory_format=torch.contiguous_format)
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def _row_of(example: Example) -> dict[str, Any]:
    """An example as one JSON object, its tuples as plain lists, so that any reader understands it."""
    row = asdict(example)
    return row | {name: list(row[name]) for name in ("messages", "choices", "references")}


def _example_of(row: Mapping[str, Any]) -> Example:
    """The example that `_row_of` was given."""
    plain = dict(row)
    messages = tuple(Message(**message) for message in plain.pop("messages"))
    choices, references = tuple(plain.pop("choices")), tuple(plain.pop("references"))
    return Example(messages=messages, choices=choices, references=references, **plain)
