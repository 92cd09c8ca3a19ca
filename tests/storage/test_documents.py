import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retain.errors import LineageError
from retain.storage.documents import decode, encode, read_json, read_lines, write_json, write_lines

any_text = st.text(st.characters(exclude_categories=()))  # with lone surrogates, line separators, NUL
keys = st.one_of(any_text, st.sampled_from(["$float", "$tuple", "$dict", "$"]), st.integers(), st.booleans())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=20,
)


def strict(text: bytes) -> Any:
    """Parse as any other reader would: NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@given(values)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_files_give_back_what_they_were_given(tmp_path: Path, value: Any):
    write_json(tmp_path / "a.json", value)
    strict((tmp_path / "a.json").read_bytes())
    assert repr(read_json(tmp_path / "a.json")) == repr(value)  # repr tells 1 from 1.0 and True, 0.0 from -0.0, has NaN
    write_lines(tmp_path / "a.jsonl", [value, value])
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 2
    assert repr(read_lines(tmp_path / "a.jsonl")) == repr([value, value])


def test_the_spelling():
    assert encode(math.nan) == {"$float": "nan"}
    assert encode(-math.inf) == {"$float": "-inf"}
    assert encode((1, [2])) == {"$tuple": [1, [2]]}
    assert encode({3: "x"}) == {"$dict": [[3, "x"]]}
    assert encode({"$float": 1}) == {"$dict": [["$float", 1]]}
    assert encode({"a": 1.5}) == {"a": 1.5}
    assert decode({"$dict": [[{"$tuple": [1, 2]}, None]]}) == {(1, 2): None}


def test_a_person_can_read_it(tmp_path: Path):
    write_json(tmp_path / "a.json", {"thủ đô": "Hà Nội"})
    assert "Hà Nội" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [b"x", {1, 2}, object(), Path("x"), torch.tensor(1.0), 1j, [{"a": (b"",)}]])
def test_what_json_cannot_hold_is_refused(value: Any):
    with pytest.raises(AssertionError, match="JSON cannot hold"):
        encode(value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", pickle.dumps({"a": 1})])
def test_what_is_no_json_is_named(content: bytes, tmp_path: Path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(LineageError, match=r"a\.json cannot be read"):
        read_json(tmp_path / "a.json")


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(LineageError, match=r"b\.jsonl") as caught:
        read_lines(tmp_path / "b.jsonl")
    assert caught.value.problems == ("it is missing",)


def test_a_line_that_cannot_be_written_leaves_the_old_file(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [1])
    with pytest.raises(AssertionError):
        write_lines(tmp_path / "a.jsonl", [2, object()])
    assert read_lines(tmp_path / "a.jsonl") == [1]
