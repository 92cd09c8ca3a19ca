import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retain.errors import LineageError
from retain.storage.documents import write_json
from retain.storage.ledger import BaseModel, Ledger, listed, read_ledger, refuse_occupied, write_ledger
from retain.storage.stage import StageInfo, folder_name, read_info, write_record
from retain.types import StageRecord

BASE = BaseModel("smollm2-135m", "main", "abc")


def info(index: int, parent: int, name: str = "t") -> StageInfo:
    return StageInfo(index, name, folder_name(index, name), parent, "2025-01-31T12:00:00+00:00", "d")


# 0 - 1 - 2 - 3
#      \- 4 - 6        5 was pruned
TREE = Ledger(
    BASE, (info(0, -1), info(1, 0), info(2, 1), info(3, 2), info(4, 1), info(6, 4)), head=6, pruned=("0005-t",)
)  # fmt: skip


def put(path: Path, index: int, parent: int, *, folder: str | None = None) -> Path:
    place = path / "stages" / (folder or folder_name(index, "t"))
    place.mkdir(parents=True)
    write_record(place, StageRecord(index, "t", {}), parent=parent)
    return place


def test_the_line_is_the_chain_of_parents():
    assert [stage.index for stage in TREE.line(6)] == [0, 1, 4, 6]
    assert [stage.index for stage in TREE.line(3)] == [0, 1, 2, 3]
    assert TREE.line(-1) == ()


def test_a_number_is_never_used_twice():
    assert TREE.next == 7
    assert replace(TREE, pruned=("0009-t", "0005-t")).next == 10
    assert Ledger(BASE).next == 0


def test_one_more():
    more = TREE.plus(info(7, 6))
    assert (more.head, len(more.stages)) == (7, 7)


def test_a_stage_by_its_number():
    assert TREE.stage(4).parent == 1
    with pytest.raises(LineageError, match="no stage 5") as caught:
        TREE.stage(5)
    assert "0 (t), 1 (t), 2 (t)" in caught.value.problems[0]
    assert listed(()) == "none yet"


def test_round_trip(tmp_path: Path):
    (tmp_path / "stages").mkdir()
    write_ledger(tmp_path, TREE)
    assert read_ledger(tmp_path) == TREE


def test_a_person_can_read_it(tmp_path: Path):
    write_ledger(tmp_path, Ledger(BASE, (info(0, -1, "ngân hàng"),), head=0))
    content = json.loads((tmp_path / "lineage.json").read_text(encoding="utf-8"))
    assert content["format"] == 1
    assert content["base"] == {"name": "smollm2-135m", "revision": "main", "hash": "abc"}
    assert content["stages"][0]["name"] == "ngân hàng"
    assert content["head"] == 0


def test_what_is_no_lineage(tmp_path: Path):
    with pytest.raises(LineageError, match="is not a lineage") as caught:
        read_ledger(tmp_path / "nowhere")
    assert "retain train" in caught.value.hint
    put(tmp_path, 0, -1)
    with pytest.raises(LineageError, match=r"has lost its lineage\.json"):
        read_ledger(tmp_path)


def test_a_newer_version_is_told_apart(tmp_path: Path):
    write_json(tmp_path / "lineage.json", {"format": 2, "things": "unheard of"})
    with pytest.raises(LineageError, match="newer retain") as caught:
        read_ledger(tmp_path)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"head": 9},
        {"head": "x"},
        {"head": None},
        {"pruned": ["../../home"]},
        {"pruned": 3},
        {"base": {}},
        {"stages": [{"index": 0}]},
        {"stages": None},
        {"format": None},
    ],
)
def test_damage_is_named(change: dict[str, Any], tmp_path: Path):
    write_ledger(tmp_path, TREE)
    content = json.loads((tmp_path / "lineage.json").read_text())
    (tmp_path / "lineage.json").write_text(json.dumps(content | change))
    with pytest.raises(LineageError, match=r"lineage\.json cannot be read"):
        read_ledger(tmp_path)


@pytest.mark.parametrize("change", [{"folder": "../../home"}, {"parent": 2}, {"parent": 7}])
def test_a_damaged_stage_is_named(change: dict[str, Any], tmp_path: Path):
    write_ledger(tmp_path, TREE)
    content = json.loads((tmp_path / "lineage.json").read_text())
    content["stages"][2] |= change
    (tmp_path / "lineage.json").write_text(json.dumps(content))
    with pytest.raises(LineageError, match=r"lineage\.json cannot be read"):
        read_ledger(tmp_path)


def test_stages_that_a_crash_left_unlisted_are_taken_in(tmp_path: Path):
    zero = read_info(put(tmp_path, 0, -1))
    assert zero is not None
    write_ledger(tmp_path, Ledger(BASE))
    before = (tmp_path / "lineage.json").read_bytes()
    assert read_ledger(tmp_path) == Ledger(BASE, (zero,), head=0)
    put(tmp_path, 1, 0)
    put(tmp_path, 10, 1)  # after pruning, numbers have gaps; 10 comes after 2 and before it in the alphabet
    assert [stage.index for stage in read_ledger(tmp_path).line(10)] == [0, 1, 10]
    assert (tmp_path / "lineage.json").read_bytes() == before


def test_other_folders_are_not_taken_in(tmp_path: Path):
    zero, one = read_info(put(tmp_path, 0, -1)), read_info(put(tmp_path, 1, 0))
    assert zero is not None
    assert one is not None
    ledger = Ledger(BASE, (zero, one), head=1, pruned=("0002-t",))
    write_ledger(tmp_path, ledger)
    put(tmp_path, 2, 1)  # pruned, not yet deleted
    put(tmp_path, 1, 0, folder="0001-t-backup")
    put(tmp_path, 1, 0, folder="0004-copy")
    put(tmp_path, 5, 0)  # of another parent
    put(tmp_path, 3, 1, folder=".0003-t.partial")
    (put(tmp_path, 6, 1) / "scores.json").unlink()  # not whole
    (tmp_path / "stages" / "0007").write_text("a file")
    assert read_ledger(tmp_path) == ledger


def test_where_a_lineage_can_start(tmp_path: Path):
    refuse_occupied(tmp_path)
    (tmp_path / "lineage.lock").touch()
    (tmp_path / ".lineage.json.tmp").touch()
    (tmp_path / "stages").mkdir()
    (tmp_path / "config.yaml").touch()
    refuse_occupied(tmp_path)  # all of that a start that was cut short leaves

    write_ledger(tmp_path, Ledger(BASE))
    with pytest.raises(LineageError, match="is a lineage already"):
        refuse_occupied(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "stages/0000-base"])
def test_where_none_can_start(name: str, tmp_path: Path):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(LineageError, match="is not empty"):
        refuse_occupied(tmp_path)
