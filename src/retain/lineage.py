"""The lineage on disk: one model's life, stage after stage, each there whole or not at all.

    my-model/
      lineage.json                  the base model, the stages, the head
      config.yaml                   as resolved
      stages/0000-base/             committed: never changed again
      stages/0001-banking/
      stages/.0002-legal.partial/   in progress: whatever happens to it, the rest is untouched

The commit protocol. A crash, or a full disk, after a line leaves the state on its right:

    begin    mkdir .0002-legal.partial                                      stages 0-1
             others write weights/, memory/, checkpoints/ into it           stages 0-1, stage 2 resumes
    commit   write scores.json, answers.jsonl, history.jsonl                stages 0-1, stage 2 resumes
             write stage.json, with the hash of every file                  stages 0-1, stage 2 resumes
             fsync every file and folder in it                              stages 0-1, stage 2 resumes
             RENAME .0002-legal.partial to 0002-legal, fsync stages/        stages 0-2, `open` finds the new folder
             replace lineage.json                                           stages 0-2
             delete 0002-legal/checkpoints                                  stages 0-2

The rename is the commit: before it nothing has happened, after it all has. Every stage knows its parent, and the line
is the chain of parents from the head down to stage 0. `rollback` moves the head down the line and deletes nothing: the
stages above are off the line, `rollforward` returns to them, `prune` deletes them. A number is never used twice.
"""

import shutil
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import final

import yaml

from retain.errors import LineageError
from retain.storage.documents import reading
from retain.storage.files import disk_errors, sync, sync_tree, write_text
from retain.storage.ledger import BaseModel, Ledger, listed, read_ledger, refuse_occupied, write_ledger
from retain.storage.lock import exclusive
from retain.storage.stage import (
    CHECKPOINTS,
    RECORD_FILES,
    StageInfo,
    folder_name,
    read_info,
    read_record,
    share_stage,
    stage_problems,
    write_record,
)
from retain.storage.state import load_state, save_state
from retain.types import Record, StageRecord

__all__ = ["CHECKPOINTS", "EARLIER", "BaseModel", "Lineage", "StageInfo", "load_state", "save_state"]

EARLIER = "earlier"
"""In a stage's folder: what earlier stages score on its task, which the lineage did not know then; one record each."""


@final
class Lineage:
    """A handle on a lineage's folder. Reading needs no lock; every change takes it."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self.path = path
        self._ledger = ledger
        self._locked = False

    # Making, opening, locking

    @classmethod
    def create(cls, path: Path, *, base: BaseModel, config: str) -> "Lineage":
        """Start a lineage in a new or empty folder.

        Args:
            path: the folder; made where it is missing.
            base: the model that it starts from.
            config: the resolved recipe, YAML.

        Raises:
            LineageError: if the folder holds a lineage, or anything else.
        """
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            with exclusive(path, "create a lineage"):
                refuse_occupied(path)
                (path / "stages").mkdir(exist_ok=True)
                write_text(path / "config.yaml", config)
                write_ledger(path, Ledger(base))  # last: from here on it is a lineage
                sync(path.parent)
        return cls(path, Ledger(base))

    @classmethod
    def open(cls, path: Path) -> "Lineage":
        """Open a lineage. Nothing is written, not even where a crash is recovered from.

        Raises:
            LineageError: if there is none, or a newer version wrote it, or it is damaged.
        """
        return cls(path, read_ledger(path))

    @contextmanager
    def lock(self, owner: str) -> Generator[str]:
        """Be the only writer while inside. Within it, the handle's own changes lock no further.

        Args:
            owner: the command, for others who find the lineage locked.

        Yields:
            A note where a dead process's lock was taken over, else an empty text.

        Raises:
            LineageError: if another process writes; it is named.
        """
        if self._locked:
            yield ""
            return
        with exclusive(self.path, owner) as note:
            self._locked = True
            try:
                self._ledger = read_ledger(self.path)  # another process may have written since this one opened it
                self._sweep()
                yield note
            finally:
                self._locked = False

    @contextmanager
    def _changing(self, owner: str) -> Generator[None]:
        with self.lock(owner), disk_errors(self.path):
            yield

    def _write(self, ledger: Ledger) -> None:
        write_ledger(self.path, ledger)
        self._ledger = ledger

    def _sweep(self) -> None:
        """Delete what no longer counts, also what an earlier crash left of it."""
        stages = self.path / "stages"
        checkpoints = [stages / stage.folder / CHECKPOINTS for stage in self.stages]
        for folder in [*checkpoints, *(stages / name for name in self._ledger.pruned), *stages.glob(".*.trash")]:
            if folder.exists():
                shutil.rmtree(folder)

    # Looking

    @property
    def base(self) -> BaseModel:
        """The model that the lineage starts from."""
        return self._ledger.base

    @property
    def config(self) -> str:
        """The resolved recipe, YAML."""
        with reading(self.path / "config.yaml"):
            return (self.path / "config.yaml").read_text(encoding="utf-8")

    @property
    def title(self) -> str:
        """Of its report: the recipe's, else the folder's name."""
        recipe = yaml.safe_load(self.config)
        return (recipe.get("title") if isinstance(recipe, dict) else "") or self.path.resolve().name

    @property
    def stages(self) -> tuple[StageInfo, ...]:
        """Every committed stage by number, on the line or off it."""
        return self._ledger.stages

    @property
    def head(self) -> int:
        """The stage that the next one is trained from; -1 before stage 0 is committed."""
        return self._ledger.head

    @property
    def next_index(self) -> int:
        """The number of the stage in progress, or of the next one."""
        return self._ledger.next

    def log(self, index: int | None = None) -> list[StageInfo]:
        """The line: the stages from the base to the head, or to another stage, in order."""
        return list(self._ledger.line(self.head if index is None else index))

    def stage_folder(self, index: int) -> Path:
        """Where a committed stage lies.

        Raises:
            LineageError: if there is no such stage.
        """
        return self.path / "stages" / self._ledger.stage(index).folder

    def verified_folder(self, index: int, *, only: Collection[str] | None = None) -> Path:
        """Where a committed stage lies, after the hashes of all its files, or `only` some, were checked.

        Raises:
            LineageError: if there is no such stage, or it is not as it was committed.
        """
        folder = self.stage_folder(index)
        if problems := stage_problems(folder, self._ledger.stage(index), only=only):
            raise LineageError(f"stage {index} of {self.path} is damaged", problems=problems, hint=_way_out(index))
        return folder

    def load_stage(self, index: int) -> StageRecord:
        """A stage's scores, answers, history and provenance, after their hashes were checked.

        Raises:
            LineageError: if there is no such stage, or it is not as it was committed.
        """
        return read_record(self.verified_folder(index, only=RECORD_FILES))

    def record(self) -> Record:
        """The line as the report reads it.

        From each stage's provenance come `method` and `strategy` (how it is called) and `notes` (a list of sentences).

        Raises:
            LineageError: if a stage is not as it was committed.
        """
        line = {stage.index: self.load_stage(stage.index) for stage in self.log()}
        for index in tuple(line):
            stage = self.stage_folder(index)
            late_files = [path for path in (stage / EARLIER).rglob("*") if path.is_file()]
            if late_files:
                self.verified_folder(index, only=[path.relative_to(stage).as_posix() for path in late_files])
            for folder in sorted((stage / EARLIER).glob("*")):
                late = read_record(folder)  # what an earlier stage scores on a task that was new then
                known = line[late.index]
                scores, answers = {**known.scores, **late.scores}, (*known.answers, *late.answers)
                line[late.index] = replace(known, scores=scores, answers=answers)
        stages = tuple(line.values())

        def spoken(key: str) -> str:  # a lineage may go on with another strategy
            return ", then ".join(dict.fromkeys(s.provenance[key] for s in stages if s.provenance.get(key)))

        return Record(
            title=self.title,
            model=self.base.name,
            method=spoken("method"),
            strategy=spoken("strategy"),
            tasks=tuple(stage.name for stage in stages[1:]),
            stages=stages,
            notes=tuple(dict.fromkeys(note for stage in stages for note in stage.provenance.get("notes", ()))),
        )

    def verify(self) -> list[str]:
        """Hash everything; what is wrong and what to do, one line each. Empty where all is sound."""
        problems: list[str] = []
        for stage in self.stages:
            found = stage_problems(self.stage_folder(stage.index), stage)
            problems += [f"{problem}. {_way_out(stage.index)}" for problem in found]
        known = {stage.folder for stage in self.stages} | set(self._ledger.pruned)
        for entry in sorted((self.path / "stages").iterdir()):
            if entry.name not in known and entry.suffix != ".trash" and entry != self.partial():
                problems.append(f"{entry}: no part of the lineage. Move it away, or delete it")
        return problems

    # Adding a stage

    def partial(self) -> Path | None:
        """The stage in progress, if there is one."""
        return next((self.path / "stages").glob(f".{self.next_index:04d}-*.partial"), None)

    def begin(self, name: str) -> Path:
        """The folder of the stage in progress: made, or found again with what it holds.

        Args:
            name: `base`, or the task's name, new on the line.

        Raises:
            LineageError: if the line has a stage of this name, or another stage is in progress.
        """
        with self._changing(f"begin {name}"):
            if taken := [stage.index for stage in self.log() if stage.name == name]:
                raise LineageError(
                    f"task {name!r} is stage {taken[0]} of {self.path} already",
                    hint="give the new data a task name of its own, or roll back to before that stage",
                )
            folder = self.path / "stages" / f".{folder_name(self.next_index, name)}.partial"
            if self.partial() != folder:
                self._refuse_partial()
                folder.mkdir()
                sync(folder.parent)
        return folder

    def commit(self, partial: Path, record: StageRecord) -> StageInfo:
        """Make the stage in progress the head, as the drawing at the top says.

        Args:
            partial: what `begin` returned, with weights and memory in it.
            record: its index is `next_index`.

        Raises:
            LineageError: if the disk is full; the lineage is as before, or has the whole new stage.
        """
        with self._changing(f"commit {record.name}"):
            assert partial == self.partial(), f"{partial} is not the stage in progress"
            assert record.index == self.next_index, f"stage {self.next_index} cannot be committed as {record.index}"
            folder = partial.with_name(folder_name(record.index, record.name))
            assert partial.name == f".{folder.name}.partial", f"{partial} was not begun as {record.name!r}"
            write_record(partial, record, parent=self.head)
            sync_tree(partial)
            partial.rename(folder)  # the commit
            sync(folder.parent)
            info = read_info(folder)
            assert info is not None, f"{folder} changed while it was committed"
            self._write(self._ledger.plus(info))
            self._sweep()
        return info

    def discard_partial(self) -> None:
        """Delete the stage in progress, if there is one."""
        with self._changing("discard"):
            if partial := self.partial():
                partial.rename(partial.with_suffix(".trash"))  # never half a stage that looks resumable
                sync(partial.parent)
                self._sweep()

    def _refuse_partial(self) -> None:
        if partial := self.partial():
            raise LineageError(
                f"{partial.stem.removeprefix('.')} of {self.path} is in progress",
                hint=f"finish it with `retain continue {self.path}`, or discard it",
            )

    # Moving the head

    def rollback(self, index: int) -> None:
        """Move the head down the line to a stage. Nothing is deleted; `rollforward` undoes it.

        Raises:
            LineageError: if the stage is not on the line, or a stage is in progress.
        """
        self._move_head(index, on_line=True)

    def rollforward(self, index: int) -> None:
        """Move the head to a stage off the line.

        Raises:
            LineageError: if the stage is on the line, or a stage is in progress.
        """
        self._move_head(index, on_line=False)

    def _move_head(self, index: int, *, on_line: bool) -> None:
        with self._changing(f"move the head to {index}"):
            self._refuse_partial()  # it was trained from the present head
            if (self._ledger.stage(index) in self.log()) != on_line:
                raise LineageError(
                    f"stage {index} of {self.path} is {'off' if on_line else 'on'} the line",
                    problems=[f"the line is {listed(self.log())}"],
                    hint=f"a {'rollforward' if on_line else 'rollback'} goes there",
                )
            self._write(replace(self._ledger, head=index))

    def prune(self) -> int:
        """Delete the stages that are off the line; returns the bytes that this frees."""
        with self._changing("prune"):
            line = self.log()
            gone = [self.stage_folder(stage.index) for stage in self.stages if stage not in line]
            files = [path.stat() for folder in gone for path in folder.rglob("*") if path.is_file()]
            pruned = (*self._ledger.pruned, *(folder.name for folder in gone))
            self._write(replace(self._ledger, stages=tuple(line), pruned=pruned))
            self._sweep()
        return sum(file.st_size for file in files if file.st_nlink == 1)  # a branch keeps the files it shares

    def branch(self, index: int, new_path: Path) -> "Lineage":
        """A new lineage with the line up to a stage; it shares the files by hard links where the disk can.

        Raises:
            LineageError: if there is no such stage, or `new_path` holds something.
        """
        line = self._ledger.line(self._ledger.stage(index).index)
        if new_path.exists() and (not new_path.is_dir() or any(new_path.iterdir())):
            raise LineageError(f"{new_path} is not empty", hint="choose a new folder for the branch")
        building = new_path.with_name(f".{new_path.name}.branching")
        with disk_errors(new_path):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            for stage in line:
                share_stage(self.stage_folder(stage.index), building / "stages" / stage.folder)
            write_text(building / "config.yaml", self.config)
            write_ledger(building, Ledger(self.base, line, head=index))
            sync_tree(building)
            building.rename(new_path)  # whole, or not there
            sync(new_path.parent)
        return Lineage.open(new_path)

    def save_config(self, text: str) -> None:
        """Replace the resolved recipe."""
        with self._changing("save the recipe"):
            write_text(self.path / "config.yaml", text)


def _way_out(index: int) -> str:
    return "Restore it from a backup" + (f", or roll back to before stage {index} and prune" if index else "")
