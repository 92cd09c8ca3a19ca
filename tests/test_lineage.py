import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from retain.errors import LineageError
from retain.lineage import CHECKPOINTS, EARLIER, BaseModel, Lineage, load_state, save_state
from retain.storage.stage import write_record
from retain.types import Answer, Example, Score, StageRecord

BASE = BaseModel("smollm2-135m", "main", "abc")
DIED = 9
CONFIG = "model: smollm2-135m\nmô-tả: Hà Nội\n"
MEMORY = {"fisher/w": torch.ones(3, dtype=torch.bfloat16), "memory": [Example("a", text="x")], "seen": 4}


def record_of(index: int, name: str) -> StageRecord:
    return StageRecord(
        index,
        name,
        {name: Score(index / 3, "exact_match", 1, 0.0, 1.0)},
        (Answer(name, "a", "q", "e", f"answer {index}", 1.0),),
        provenance={"method": "lora", "strategy": "replay" if index < 2 else "ewc", "notes": ["4 bits"]},
    )


def fill(partial: Path, index: int) -> None:
    """What training leaves in a stage in progress."""
    for name in ("weights", CHECKPOINTS):
        (partial / name).mkdir(exist_ok=True)
        (partial / name / "model.safetensors").write_bytes(b"weights %d" % index)


def add(lineage: Lineage, name: str, *, memory: bool = False) -> int:
    partial, index = lineage.begin(name), lineage.next_index
    fill(partial, index)
    if memory:
        save_state(MEMORY, partial / "memory")
    lineage.commit(partial, record_of(index, name))
    return index


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk; `Faults` looks at what is synced."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    """Stage 0 and two tasks."""
    lineage = Lineage.create(tmp_path / "my-model", base=BASE, config=CONFIG)
    for name in ("base", "banking", "legal"):
        add(lineage, name, memory=True)
    return lineage


def names(lineage: Lineage) -> list[str]:
    return [stage.name for stage in lineage.log()]


# Making and opening


def test_the_layout(lineage: Lineage):
    lineage.begin("next")
    found = {path.relative_to(lineage.path).as_posix() for path in lineage.path.rglob("*")}
    stage = {"weights", "weights/model.safetensors", "scores.json", "answers.jsonl", "history.jsonl", "stage.json"}
    memory = {"memory", "memory/state.json", "memory/tensors.safetensors", "memory/memory.jsonl"}
    folders = ["0000-base", "0001-banking", "0002-legal"]
    assert found == {
        "lineage.json", "config.yaml", "stages", "stages/.0003-next.partial",
        *(f"stages/{folder}" for folder in folders),
        *(f"stages/{folder}/{name}" for folder in folders for name in stage | memory),
    }  # fmt: skip


def test_a_new_lineage_is_empty(tmp_path: Path):
    made = Lineage.create(tmp_path / "deep" / "x", base=BASE, config=CONFIG)
    for lineage in (made, Lineage.open(made.path)):
        assert (lineage.base, lineage.config, lineage.head, lineage.next_index) == (BASE, CONFIG, -1, 0)
        assert (lineage.stages, lineage.log(), lineage.partial(), lineage.verify()) == ((), [], None, [])


def test_another_process_finds_the_same(lineage: Lineage):
    again = Lineage.open(lineage.path)
    assert again.stages == lineage.stages
    assert (again.head, again.next_index, names(again)) == (2, 3, ["base", "banking", "legal"])
    assert again.load_stage(1) == record_of(1, "banking")
    loaded = load_state(again.stage_folder(1) / "memory")
    assert (loaded["memory"], loaded["seen"]) == (MEMORY["memory"], 4)
    assert torch.equal(loaded["fisher/w"], torch.ones(3, dtype=torch.bfloat16))
    assert again.verify() == []


def test_opening_writes_nothing(lineage: Lineage):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in lineage.path.rglob("*")}

    (lineage.path / "lineage.json").write_text((lineage.path / "lineage.json").read_text())
    before = files()
    opened = Lineage.open(lineage.path)
    opened.verify()
    opened.record()
    assert files() == before


def test_a_lineage_is_not_made_over_another(lineage: Lineage, tmp_path: Path):
    with pytest.raises(LineageError, match="is a lineage already"):
        Lineage.create(lineage.path, base=BASE, config="other")
    assert lineage.config == CONFIG
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(LineageError, match="is not empty"):
        Lineage.create(tmp_path / "full", base=BASE, config=CONFIG)


def test_the_recipe_can_be_replaced(lineage: Lineage):
    lineage.save_config("model: x\n")
    assert Lineage.open(lineage.path).config == "model: x\n"


# Adding a stage


def test_a_stage_in_progress_is_found_again(lineage: Lineage):
    partial = lineage.begin("luật/thuế")
    (partial / "checkpoint").touch()
    again = Lineage.open(lineage.path)
    assert again.partial() == partial
    assert again.begin("luật/thuế") == partial
    assert (partial / "checkpoint").exists()
    with pytest.raises(LineageError, match=r"0003-luật-thuế-.* is in progress"):
        again.begin("other")
    again.discard_partial()
    assert again.partial() is None
    assert again.begin("other").name == ".0003-other.partial"


def test_discarding_nothing(lineage: Lineage):
    lineage.discard_partial()
    assert names(lineage) == ["base", "banking", "legal"]


def test_a_task_is_learned_once(lineage: Lineage):
    with pytest.raises(LineageError, match="'banking' is stage 1"):
        lineage.begin("banking")


def test_a_commit_tells_all_about_the_stage(lineage: Lineage):
    partial = lineage.begin("menus")
    fill(partial, 3)
    info = lineage.commit(partial, record_of(3, "menus"))
    assert (info.index, info.name, info.folder, info.parent) == (3, "menus", "0003-menus", 2)
    assert lineage.stages[-1] == info
    assert not partial.exists()
    assert not (lineage.stage_folder(3) / CHECKPOINTS).exists()


@pytest.mark.parametrize("record", [record_of(4, "menus"), record_of(3, "other")])
def test_a_record_of_another_stage_is_refused(lineage: Lineage, record: StageRecord):
    partial = lineage.begin("menus")
    with pytest.raises(AssertionError):
        lineage.commit(partial, record)
    with pytest.raises(AssertionError):
        lineage.commit(lineage.stage_folder(2), record_of(3, "menus"))
    assert Lineage.open(lineage.path).head == 2


def test_a_handle_sees_what_others_wrote_before_it_writes(lineage: Lineage):
    other = Lineage.open(lineage.path)
    add(other, "menus")
    assert lineage.head == 2
    add(lineage, "desk")
    assert names(Lineage.open(lineage.path)) == ["base", "banking", "legal", "menus", "desk"]


# Moving the head


def test_rollback_and_forward(lineage: Lineage):
    lineage.rollback(1)
    assert (names(lineage), lineage.head) == (["base", "banking"], 1)
    assert [stage.index for stage in lineage.stages] == [0, 1, 2]
    assert names(Lineage.open(lineage.path)) == ["base", "banking"]
    assert lineage.load_stage(2) == record_of(2, "legal")

    lineage.rollforward(2)
    assert names(Lineage.open(lineage.path)) == ["base", "banking", "legal"]

    lineage.rollback(1)
    assert add(lineage, "legal") == 3  # the same name is free again, the number is not
    assert lineage.stages[3].parent == 1
    assert [stage.index for stage in lineage.log()] == [0, 1, 3]
    lineage.rollforward(2)
    assert [stage.index for stage in lineage.log()] == [0, 1, 2]
    assert lineage.verify() == []


def test_the_head_moves_only_where_it_can(lineage: Lineage):
    lineage.rollback(1)
    with pytest.raises(LineageError, match=r"stage 2 of .* is off the line") as caught:
        lineage.rollback(2)
    assert caught.value.problems == ("the line is 0 (base), 1 (banking)",)
    with pytest.raises(LineageError, match="is on the line"):
        lineage.rollforward(0)
    with pytest.raises(LineageError, match="no stage 7"):
        lineage.rollback(7)
    lineage.begin("menus")
    with pytest.raises(LineageError, match="0003-menus of"):
        lineage.rollback(0)
    with pytest.raises(LineageError, match="is in progress"):
        lineage.rollforward(2)
    assert lineage.head == 1


def test_prune(lineage: Lineage):
    assert lineage.prune() == 0
    size = sum(path.stat().st_size for path in lineage.stage_folder(2).rglob("*") if path.is_file())
    lineage.rollback(1)
    assert lineage.prune() == size > 0
    assert sorted(path.name for path in (lineage.path / "stages").iterdir()) == ["0000-base", "0001-banking"]
    with pytest.raises(LineageError, match="no stage 2"):
        lineage.load_stage(2)
    assert Lineage.open(lineage.path).next_index == 3
    assert lineage.verify() == []


def test_a_branch_lives_by_itself(lineage: Lineage, tmp_path: Path):
    (lineage.begin("menus") / "x").touch()
    branch = lineage.branch(1, tmp_path / "branches" / "b")
    assert (names(branch), branch.head, branch.next_index) == (["base", "banking"], 1, 2)
    assert (branch.base, branch.config, branch.partial(), branch.verify()) == (BASE, CONFIG, None, [])
    weights = "weights/model.safetensors"
    assert (branch.stage_folder(1) / weights).samefile(lineage.stage_folder(1) / weights)

    add(branch, "other")
    shutil.rmtree(lineage.path)
    assert names(Lineage.open(branch.path)) == ["base", "banking", "other"]
    assert branch.verify() == []


def test_shared_files_free_no_space(lineage: Lineage, tmp_path: Path):
    lineage.branch(2, tmp_path / "b")
    lineage.rollback(1)
    assert lineage.prune() == 0


def test_a_branch_needs_an_empty_place(lineage: Lineage, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert names(lineage.branch(0, tmp_path / "empty")) == ["base"]
    with pytest.raises(LineageError, match="is not empty"):
        lineage.branch(1, tmp_path / "empty")
    with pytest.raises(LineageError, match="no stage 9"):
        lineage.branch(9, tmp_path / "c")


# Reading


def test_the_record_is_of_the_line(lineage: Lineage):
    record = lineage.record()
    assert (record.title, record.model) == ("my-model", "smollm2-135m")
    assert (record.method, record.strategy) == ("lora", "replay, then ewc")
    assert (record.tasks, record.notes) == (("banking", "legal"), ("4 bits",))
    assert record.stages == (record_of(0, "base"), record_of(1, "banking"), record_of(2, "legal"))
    lineage.save_config("title: 'Desk: both'\nmodel: x\n")
    assert lineage.record().title == "Desk: both", "the recipe's"
    lineage.rollback(1)
    assert (lineage.record().tasks, lineage.record().strategy) == (("banking",), "replay")


def test_what_earlier_stages_score_on_a_late_task_is_added_to_them(lineage: Lineage):
    late = Score(0.5, "exact_match", 1, 0.0, 1.0)
    answer = Answer("menus", "m", "q", "e", "?", 0.5)
    partial = lineage.begin("menus")
    (partial / EARLIER / "0001").mkdir(parents=True)
    write_record(partial / EARLIER / "0001", StageRecord(1, "banking", {"menus": late}, (answer,)))
    lineage.commit(partial, record_of(3, "menus"))
    known = record_of(1, "banking")
    assert lineage.record().stages[1] == replace(
        known, scores={**known.scores, "menus": late}, answers=(*known.answers, answer)
    )
    assert lineage.load_stage(1) == known
    lineage.rollback(2)
    assert lineage.record().stages[1] == known


def test_damage_is_never_read(lineage: Lineage):
    (lineage.stage_folder(1) / "answers.jsonl").write_text("")
    (lineage.stage_folder(2) / "weights" / "model.safetensors").write_bytes(b"weights X")
    with pytest.raises(LineageError, match=r"stage 1 of .* is damaged") as caught:
        lineage.load_stage(1)
    assert "roll back to before stage 1" in caught.value.hint
    assert lineage.load_stage(2) == record_of(2, "legal")
    with pytest.raises(LineageError, match=r"stage 2 of .* is damaged"):
        lineage.verified_folder(2)
    assert lineage.verified_folder(0) == lineage.path / "stages" / "0000-base"
    with pytest.raises(LineageError):
        lineage.record()


def test_verify_says_what_is_wrong_and_what_to_do(lineage: Lineage):
    lineage.begin("menus")
    assert lineage.verify() == []
    (lineage.stage_folder(0) / "scores.json").unlink()
    (lineage.stage_folder(1) / "extra").touch()
    (lineage.path / "stages" / "0001-banking-copy").mkdir()
    shutil.rmtree(lineage.stage_folder(2))
    stages, way_out = lineage.path / "stages", "Restore it from a backup, or roll back to before stage"
    assert Lineage.open(lineage.path).verify() == [
        f"{stages}/0000-base/scores.json: missing. Restore it from a backup",
        f"{stages}/0001-banking/extra: was not there at commit. {way_out} 1 and prune",
        f"{stages}/0002-legal: the folder is missing. {way_out} 2 and prune",
        f"{stages}/0001-banking-copy: no part of the lineage. Move it away, or delete it",
    ]
    lineage.discard_partial()
    lineage.rollback(0)  # the way out is open although folders are missing
    lineage.prune()
    assert Lineage.open(lineage.path).verify()[0].startswith(f"{stages}/0000-base/scores.json")


def test_a_strangers_lineage_deletes_nothing_outside(lineage: Lineage, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    text = (lineage.path / "lineage.json").read_text()
    (lineage.path / "lineage.json").write_text(text.replace('"pruned": []', '"pruned": ["../../precious"]'))
    with pytest.raises(LineageError), lineage.lock("x"):
        pass
    assert (tmp_path / "precious").exists()


# One writer


def test_one_writer(lineage: Lineage):
    other = Lineage.open(lineage.path)
    with lineage.lock("retain train desk.yaml") as note:
        assert note == ""
        for change in (
            lambda: other.begin("x"), lambda: other.rollback(0), other.prune, other.discard_partial,
            lambda: other.save_config(""),
        ):  # fmt: skip
            with pytest.raises(LineageError, match=r"`retain train desk\.yaml`"):
                change()
        assert names(other) == ["base", "banking", "legal"]  # reading needs no lock
        add(lineage, "menus")  # nor do the owner's own changes lock again
        with lineage.lock("inner"):
            pass
        with pytest.raises(LineageError):
            other.rollback(0)
    other.rollback(0)


# Crashes: every call that changes the disk fails in turn


class Faults:
    """Counts the calls that change the disk, makes the k-th one fail, and knows what a power cut would take.

    Modes:
        full: the call says that the disk is full, and the process goes on. Deleting is never refused.
        killed: the process is gone; what it wrote stays.
        power: the process is gone, and all that was not synced: new names are the old ones, contents are cut in half.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: str, at: int, folder: Path) -> None:
        self.mode, self.at, self.folder, self.count = mode, at, folder, 0
        # What was there before is on the disk, but not what others wrote for the stage in progress.
        before = [path for path in folder.parent.rglob("*") if ".partial" not in str(path)]
        self.synced = {identity(path) for path in before}
        self.undo: list[tuple[Path, Callable[[], Any]]] = []
        for name in ("mkdir", "link") if mode == "full" else ("mkdir", "link", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(os, "rename", self.renaming(os.rename))
        monkeypatch.setattr(os, "replace", self.renaming(os.replace))
        monkeypatch.setattr(os, "fsync", self.counted(self.sync))
        monkeypatch.setattr(Path, "open", self.opening(Path.open))

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            if self.mode == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.mode == "power":
                self.lose_power()
            os._exit(DIED)

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.step()
            return real(*args, **options)

        return call

    def renaming(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Path, target: Path) -> None:
            self.step()
            source, target = Path(source), Path(target)
            old = target.read_bytes() if target.is_file() else None
            real(source, target)

            def back() -> None:
                real(target, source)
                if old is not None:
                    target.write_bytes(old)
                    self.synced.add(identity(target))

            self.undo.append((target.parent, back))

        return call

    def sync(self, descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        if place.is_dir():
            self.undo = [(folder, back) for folder, back in self.undo if folder != place]
        else:
            self.synced.add(identity(place))

    def opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        step = self.step

        class Halting:
            """Writes in two halves; in between things happen."""

            def __init__(self, file: BinaryIO) -> None:
                self.file, self.flush, self.fileno = file, file.flush, file.fileno

            def write(self, data: bytes) -> None:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                step()
                self.file.write(data[len(data) // 2 :])

        @contextmanager
        def writing(path: Path, mode: str) -> Iterator[Halting]:
            with real(path, mode) as file:
                yield Halting(file)

        def call(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            return writing(path, mode) if mode == "wb" else real(path, mode, *args, **options)

        return call

    def lose_power(self) -> None:
        self.at = 0  # what follows is not the process's doing
        for folder, back in reversed(self.undo):
            if folder.exists():
                back()
        for path in self.folder.rglob("*"):
            if path.is_file() and identity(path) not in self.synced:
                os.truncate(path, 0 if path.name == "lineage.lock" else path.stat().st_size // 2)
                os.utime(path, (0, 0))  # until the machine is up again, minutes pass


def identity(path: Path) -> tuple[int, int, int]:
    return path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns


def crashes(folder: Path, mode: str, prepare: Callable[[], Any], act: Callable[[Any], Any]) -> Iterator[int]:
    """Run `act` again and again on a fresh folder, each time failing one call later, until at last nothing fails."""

    def attempt(given: Any, at: int) -> bool:
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch, mode, at, folder)
            with suppress(LineageError) if mode == "full" else nullcontext():
                act(given)
            if mode == "power":
                faults.lose_power()  # what was reported as done has to stay
            return faults.count >= at

    for at in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        given = prepare()
        if mode == "full":
            failed = attempt(given, at)
            assert not failed or list(folder.glob("lineage.[lo][oc]*")) == []
        else:
            if (child := os.fork()) == 0:
                os._exit(attempt(given, at))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code in (0, DIED)
            failed = code == DIED
        yield at
        if not failed:
            assert at > 5
            return
    raise AssertionError("it never ends")


MODES = pytest.mark.parametrize("mode", ["full", "power", pytest.param("killed", marks=pytest.mark.slow)])


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[[], Lineage]:
    """Makes a lineage of stage 0 and one task, anew at every call."""
    template, place = tmp_path / "template", tmp_path / "my-model"
    lineage = Lineage.create(template, base=BASE, config=CONFIG)
    add(lineage, "base")
    add(lineage, "banking")

    def prepare() -> Lineage:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place)
        return Lineage.open(place)

    return prepare


@MODES
def test_a_commit_happens_wholly_or_not_at_all(mode: str, prepared: Callable[[], Lineage], tmp_path: Path):
    folder, record = tmp_path / "my-model", record_of(2, "legal")
    outcomes: list[int] = []

    def prepare() -> tuple[Lineage, Path]:
        lineage = prepared()
        partial = lineage.begin("legal")
        fill(partial, 2)
        return lineage, partial

    for _ in crashes(folder, mode, prepare, lambda given: given[0].commit(given[1], record)):
        lineage = Lineage.open(folder)
        assert lineage.verify() == []
        outcomes.append(lineage.head)
        if lineage.head == 1:  # nothing happened: the stage in progress is still there, and the same command goes on
            partial = lineage.begin("legal")
            assert (partial / CHECKPOINTS / "model.safetensors").exists()
            fill(partial, 2)
            lineage.commit(partial, record)
        again = Lineage.open(folder)
        with again.lock("x"):
            pass
        assert (again.head, again.load_stage(2), again.partial(), again.verify()) == (2, record, None, [])
        assert (again.stage_folder(2) / "weights" / "model.safetensors").read_bytes() == b"weights 2"
        assert not (again.stage_folder(2) / CHECKPOINTS).exists()
        assert again.begin("one more").name.startswith(".0003-one-more-")
    assert set(outcomes) == {1, 2}
    assert outcomes[-1] == 2  # where nothing failed
    if mode != "full":  # there is one instant before which nothing has happened and after which all has
        assert sorted(outcomes) == outcomes


CHANGES: dict[str, Callable[[Lineage], Any]] = {
    "begin": lambda lineage: lineage.begin("menus"),
    "rollback": lambda lineage: lineage.rollback(0),
    "save_config": lambda lineage: lineage.save_config("new"),
}


@MODES
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_happens_wholly_or_not_at_all(
    name: str, mode: str, prepared: Callable[[], Lineage], tmp_path: Path
):
    def state(lineage: Lineage) -> tuple[Any, ...]:
        return lineage.head, lineage.stages, lineage.config, lineage.partial()

    before = state(prepared())
    CHANGES[name](done := Lineage.open(tmp_path / "my-model"))
    after = state(done)
    assert before != after
    for _ in crashes(tmp_path / "my-model", mode, prepared, CHANGES[name]):
        lineage = Lineage.open(tmp_path / "my-model")
        left = state(lineage)
        assert left in (before, after)
        assert lineage.verify() == []
        if left == before:
            CHANGES[name](lineage)
        assert state(Lineage.open(tmp_path / "my-model")) == after
    assert left == after  # where nothing failed


@pytest.mark.slow
@MODES
def test_pruning_and_discarding_go_on_after_a_crash(mode: str, prepared: Callable[[], Lineage], tmp_path: Path):
    def prepare() -> Lineage:
        lineage = prepared()
        lineage.rollback(0)
        fill(lineage.begin("menus"), 2)
        return lineage

    def act(lineage: Lineage) -> None:
        lineage.discard_partial()
        lineage.prune()

    for _ in crashes(tmp_path / "my-model", mode, prepare, act):
        lineage = Lineage.open(tmp_path / "my-model")
        assert lineage.verify() == []
        assert names(lineage) == ["base"]
        if partial := lineage.partial():  # discarded wholly or not at all
            assert (partial / "weights" / "model.safetensors").exists()
            assert (partial / CHECKPOINTS / "model.safetensors").exists()
        act(lineage)
        assert [path.name for path in (lineage.path / "stages").iterdir()] == ["0000-base"]
        assert Lineage.open(lineage.path).next_index == 2


@pytest.mark.slow
@MODES
def test_creating_can_be_repeated_after_a_crash(mode: str, tmp_path: Path):
    folder = tmp_path / "new"

    def create(_: None) -> Lineage:
        return Lineage.create(folder, base=BASE, config=CONFIG)

    for _ in crashes(folder, mode, folder.mkdir, create):
        with suppress(LineageError):
            create(None)
        lineage = Lineage.open(folder)
        assert (lineage.config, lineage.head) == (CONFIG, -1)
        assert add(lineage, "base") == 0


@pytest.mark.slow
@MODES
def test_a_branch_is_whole_or_not_there(
    mode: str, prepared: Callable[[], Lineage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lineage, place = prepared(), tmp_path / "branches"

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)  # files that are copied must be synced, linked ones are

    def branch(_: None) -> Lineage:
        return lineage.branch(1, place / "b")

    for _ in crashes(place, mode, place.mkdir, branch):
        if (place / "b").exists():
            assert Lineage.open(place / "b").verify() == []
        else:
            assert names(branch(None)) == ["base", "banking"]
        assert names(Lineage.open(place / "b")) == ["base", "banking"]
        assert lineage.verify() == []


def test_a_full_disk_is_the_users_to_mend(lineage: Lineage, monkeypatch: pytest.MonkeyPatch):
    partial = lineage.begin("menus")
    fill(partial, 3)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LineageError, match="disk full while writing to") as caught:
        lineage.commit(partial, record_of(3, "menus"))
    assert "free some space" in caught.value.hint
    assert list(lineage.path.rglob("*.tmp")) == []


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_lineage import BASE, CONFIG, Lineage, LineageError, add, names, record_of

def taken_over(lineage):
    # A lock that was cut short before it named its owner is taken over only when it is TORN_AFTER seconds old.
    for attempt in range(60):
        try:
            with lineage.lock("parent") as note:
                return note
        except LineageError:
            if attempt == 59:
                raise
            time.sleep(0.25)

os.fsync = lambda _: None  # a kill loses nothing that was written
folder, rng, notes, cut, kills, known = Path(sys.argv[1]), random.Random(0), 0, 0, 0, []
Lineage.create(folder, base=BASE, config=CONFIG)
while kills < 20 or min(len(known), notes, cut) < 3:
    if (child := os.fork()) == 0:
        lineage = Lineage.open(folder)
        with lineage.lock("child"):
            while True:
                add(lineage, f"task {lineage.next_index}")
    time.sleep(rng.uniform(0.0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    lineage = Lineage.open(folder)
    assert lineage.verify() == [], lineage.verify()
    assert names(lineage)[: len(known)] == known, "a committed stage is gone"
    for stage in lineage.stages[len(known):]:
        assert lineage.load_stage(stage.index) == record_of(stage.index, stage.name)
    known = names(lineage)
    cut += lineage.partial() is not None
    notes += taken_over(lineage).startswith("took over the lock of `child`")
assert known == [f"task {index}" for index in range(len(known))]
"""


@pytest.mark.slow
def test_killed_at_random_instants(tmp_path: Path):
    command = [sys.executable, "-c", KILLS, tmp_path / "killed", Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
