import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retain.errors import LineageError
from retain.storage.documents import read_json, write_json
from retain.storage.stage import (
    CHECKPOINTS,
    StageInfo,
    folder_name,
    read_info,
    read_record,
    share_stage,
    stage_problems,
    write_record,
)
from retain.types import Answer, Score, StageRecord, StepInfo

NAN, INF = math.nan, math.inf

RECORD = StageRecord(
    index=2,
    name="luật/pháp",
    scores={
        "luật/pháp": Score(0.1 + 0.2, "exact_match", 3, -0.0, 1.0, margin=None, chance=0.25),
        "probe:Hà Nội": Score(NAN, "perplexity", 0, -INF, INF, margin=NAN),
    },
    answers=(
        Answer("luật/pháp", "a\n1", 'Hỏi "gì"?\u2028\x00', "đúng", "\ud83d", 1.0, margin=-INF),
        Answer("luật/pháp", "a2", "", "", "", NAN),
    ),
    history=(
        StepInfo("t", 1, 2, 0.5, NAN, 0.0, 1e-4, INF, 10, 5, 0.1),
        StepInfo("t", 2, 2, 1.0, 1, 0, 0, 1, 1, 1, 1, 2.5),
    ),
    provenance={
        "seed": 0,
        "betas": (0.9, 0.999),
        "notes": ["ghi chú"],
        "from": {"r": {"value": NAN}},
        "by rank": {0: "a"},
    },
)


def sealed(folder: Path, record: StageRecord = RECORD) -> StageInfo:
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "model.safetensors").write_bytes(b"weights")
    write_record(folder, record, parent=1)
    info = read_info(folder)
    assert info is not None
    return info


def test_a_record_comes_back_exactly(tmp_path: Path):
    write_record(tmp_path, RECORD)
    assert repr(read_record(tmp_path)) == repr(RECORD)


def test_an_empty_record(tmp_path: Path):
    record = StageRecord(0, "base", {})
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


def test_the_seal_covers_everything_but_checkpoints(tmp_path: Path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(b"abc")
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / CHECKPOINTS / "b").write_bytes(b"abc")
    write_record(tmp_path, RECORD, parent=1)
    files = read_json(tmp_path / "stage.json")["files"]
    assert set(files) == {"weights/a", "scores.json", "answers.jsonl", "history.jsonl"}
    assert files["weights/a"]["sha256"].startswith("ba7816bf")  # FIPS 180-4: SHA-256 of "abc"


def test_what_a_folder_says_of_itself(tmp_path: Path):
    folder = tmp_path / "0002-x"
    info = sealed(folder)
    assert (info.index, info.name, info.folder, info.parent) == (2, "luật/pháp", "0002-x", 1)
    assert info.committed.endswith("+00:00")
    assert stage_problems(folder, info) == []


def test_a_folder_that_is_not_whole_says_nothing(tmp_path: Path):
    for number, lost in enumerate(["stage.json", "scores.json", "weights/model.safetensors"]):
        folder = tmp_path / str(number) / "0002-x"
        sealed(folder)
        (folder / lost).unlink()
        assert read_info(folder) is None
    cut = tmp_path / "cut" / "0002-x"
    sealed(cut)
    os.truncate(cut / "weights/model.safetensors", 3)
    assert read_info(cut) is None
    assert read_info(tmp_path / "nowhere") is None


def test_a_copy_under_another_number_is_no_stage(tmp_path: Path):
    sealed(tmp_path / "0002-x")
    (tmp_path / "0002-x").rename(tmp_path / "0003-x")
    assert read_info(tmp_path / "0003-x") is None


def test_problems_are_found_by_content(tmp_path: Path):
    folder = tmp_path / "0002-x"
    info = sealed(folder)
    weights = folder / "weights" / "model.safetensors"
    times = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert stage_problems(folder, info) == [f"{weights}: the content has changed since commit"]
    assert stage_problems(folder, info, only=("scores.json",)) == []


def test_the_seal_itself_is_sealed(tmp_path: Path):
    folder = tmp_path / "0002-x"
    info = sealed(folder)
    write_json(folder / "stage.json", read_json(folder / "stage.json") | {"provenance": {}})
    assert stage_problems(folder, info) == [f"{folder}/stage.json: the content has changed since commit"]
    (folder / "stage.json").write_text("{")
    assert "JSONDecodeError" in stage_problems(folder, info)[0]
    (folder / "stage.json").unlink()
    assert stage_problems(folder, info) == [f"{folder}/stage.json: it is missing"]
    assert stage_problems(tmp_path / "0009-x", info) == [f"{tmp_path}/0009-x: the folder is missing"]


def test_a_damaged_record_is_named(tmp_path: Path):
    write_record(tmp_path, RECORD)
    (tmp_path / "scores.json").write_text('{"a": {"value": 1}}')
    with pytest.raises(LineageError):
        read_record(tmp_path)


def test_sharing(tmp_path: Path):
    folder = tmp_path / "0002-x"
    info = sealed(folder)
    (folder / CHECKPOINTS).mkdir()
    share_stage(folder, tmp_path / "copy" / "0002-x")
    assert stage_problems(tmp_path / "copy" / "0002-x", info) == []
    assert not (tmp_path / "copy" / "0002-x" / CHECKPOINTS).exists()
    name = "weights/model.safetensors"
    assert (folder / name).samefile(tmp_path / "copy" / "0002-x" / name)


def test_sharing_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    folder = tmp_path / "0002-x"
    info = sealed(folder)
    monkeypatch.setattr(os, "link", refuse)
    share_stage(folder, tmp_path / "copy")
    assert stage_problems(tmp_path / "copy", info) == []
    assert not (folder / "stage.json").samefile(tmp_path / "copy" / "stage.json")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("banking", "0001-banking"), ("ngân-hàng_2.1", "0001-ngân-hàng_2.1"), ("税法", "0001-税法")],
)
def test_a_plain_name_is_kept(name: str, folder: str):
    assert folder_name(1, name) == folder


def test_numbers_may_grow():
    assert folder_name(12345, "a") == "12345-a"


@given(st.text(st.characters(exclude_categories=())))
def test_any_name_is_safe(name: str):
    folder = folder_name(7, name)
    assert len(f".{folder}.partial".encode()) <= 255
    assert not set(folder) & set('/\\\0\n:*?"<>| ')
    StageInfo(7, name, folder, 6, "", "")


def test_names_that_look_alike_stay_apart():
    names = ["a/b", "a b", "a-b", "a--b", "..", "", "/", "x" * 41, "x" * 42, "Hà", "Hà", "-a", "a"]
    assert len({folder_name(1, name) for name in names}) == len(set(names))


@pytest.mark.parametrize("folder", ["../../home", "0001-a/../../b", "/etc", "", ".", "0001-", "1-a", "0001-a\\b"])
def test_a_folder_is_never_a_path(folder: str):
    good = StageInfo(1, "a", "0001-a", 0, "", "")
    with pytest.raises(ValueError, match="no name of a stage's folder"):
        replace(good, folder=folder)


@pytest.mark.parametrize("parent", [-2, 1, 2])
def test_a_parent_comes_before(parent: int):
    with pytest.raises(ValueError, match="cannot come from"):
        StageInfo(1, "a", "0001-a", parent, "", "")
