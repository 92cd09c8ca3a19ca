import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retain.errors import LineageError
from retain.storage import state as module
from retain.storage.state import load_state, save_state
from retain.types import Example, Message

EXAMPLES = [
    Example(
        id="a1",
        messages=(Message("user", "Thủ đô?\u2028"), Message("assistant", "Hà Nội", 0.5)),
        choices=("Hà Nội", "Huế"),
        references=("Ha Noi",),
        weight=float("inf"),
        source="replay",
        task="địa lý",
    ),
    Example(id="a2", text="raw \ud83d text"),
]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        alike = left.dtype == right.dtype and left.shape == right.shape
        return alike and torch.equal(left.contiguous().flatten().view(torch.uint8), right.flatten().view(torch.uint8))
    return repr(left) == repr(right)


def test_exact_round_trip(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "values": {"seen": 3, "rate": float("nan"), "pair": (1, 2.0), "none": None, "by id": {7: "x"}},
        "0/fisher/layer.weight": torch.randn(3, 4).to(torch.bfloat16),
        "half": torch.randn(5).half(),
        "double": torch.tensor([1e-300, float("nan"), -0.0], dtype=torch.float64),
        "long": torch.tensor([2**62 + 1]),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "random": torch.get_rng_state(),
        "memory": EXAMPLES,
        "0/memory": EXAMPLES[:1],
        "../memory": EXAMPLES[1:],
        "nothing": [],
        "count": 2**70,
        "shared": base,
        "row of shared": base[1],
        "transposed": base.t(),
        "expanded": torch.ones(1, 2).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    save_state(state, tmp_path / "memory")
    loaded = load_state(tmp_path / "memory")
    assert list(loaded) == list(state)
    assert [name for name in state if not same(state[name], loaded[name])] == []
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_only_safetensors_and_json_are_written(tmp_path: Path):
    save_state({"a": torch.ones(1), "x/y": EXAMPLES, "z": 1}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tensors.safetensors", "x%2Fy.jsonl", "state.json"}
    assert torch.equal(load_file(tmp_path / "tensors.safetensors")["a"], torch.ones(1))


def test_an_empty_state(tmp_path: Path):
    save_state({}, tmp_path)
    assert load_state(tmp_path) == {}


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path):
    save_state({"a": torch.ones(1), "old": EXAMPLES}, tmp_path)
    (tmp_path / ".tmpAbC").write_text("left by a process that was killed")
    save_state({"new": EXAMPLES}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new.jsonl", "state.json"}
    assert load_state(tmp_path) == {"new": EXAMPLES}


@pytest.mark.parametrize("value", [object(), {"a": torch.ones(1)}, tuple(EXAMPLES), [EXAMPLES[0], 1], b"x"])
def test_other_types_are_refused_before_anything_is_written(value: Any, tmp_path: Path):
    save_state({"a": 1}, tmp_path)
    with pytest.raises(AssertionError, match="JSON cannot hold"):
        save_state({"a": torch.ones(1), "b": value}, tmp_path)
    assert load_state(tmp_path) == {"a": 1}


@pytest.mark.parametrize("lost", ["state.json", "tensors.safetensors", "m.jsonl"])
def test_a_lost_part_is_named(lost: str, tmp_path: Path):
    save_state({"a": torch.ones(1), "m": EXAMPLES, "v": 1}, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(LineageError) as caught:
        load_state(tmp_path)
    assert str(tmp_path / lost) in caught.value.message


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", "m.jsonl"])
def test_a_pickle_is_never_run(file: str, tmp_path: Path):
    save_state({"a": torch.ones(1), "m": EXAMPLES, "v": 1}, tmp_path)
    (tmp_path / file).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LineageError, match="cannot be read"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "[]"),
        ("state.json", '{"kinds": {"b": "tensor"}, "values": {}}'),
        ("state.json", '{"kinds": {"v": "value"}, "values": []}'),
        ("m.jsonl", '{"id": "a"}\n'),
        ("m.jsonl", "[]\n"),
    ],
)
def test_another_content_is_damage(file: str, content: str, tmp_path: Path):
    save_state({"a": torch.ones(1), "m": EXAMPLES, "v": 1}, tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(LineageError):
        load_state(tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(LineageError, match="disk full"):
        save_state({"a": torch.ones(1)}, tmp_path)
    with pytest.raises(LineageError):
        load_state(tmp_path)
