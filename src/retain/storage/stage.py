"""One stage's folder: its name, its record as files, and the manifest that seals it.

    weights/ memory/ ...   others put these here first
    scores.json            by suite
    answers.jsonl          one answer a line
    history.jsonl          one logged step a line
    stage.json             written last: which stage this is, its provenance, and size and hash of every other file

`checkpoints/` is the one thing that may lie there and is no part of the stage.
"""

import hashlib
import os
import re
import shutil
import unicodedata
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retain.errors import LineageError
from retain.storage.documents import read_json, read_lines, reading, write_json, write_lines
from retain.storage.files import differences, file_hash, manifest
from retain.types import Answer, Score, StageRecord, StepInfo

__all__ = [
    "CHECKPOINTS",
    "NONE",
    "RECORD_FILES",
    "StageInfo",
    "check_folder_name",
    "folder_name",
    "read_info",
    "read_record",
    "share_stage",
    "stage_problems",
    "write_record",
]

CHECKPOINTS = "checkpoints"
"""Where a stage in progress keeps its checkpoints; no part of the stage."""

RECORD_FILES = ("scores.json", "answers.jsonl", "history.jsonl")

NONE = -1
"""The parent of stage 0, and the head of a lineage without stages."""


@dataclass(frozen=True, slots=True)
class StageInfo:
    """What `lineage.json` knows of a committed stage.

    Args:
        index: its number, never used twice.
        name: `base`, or the task's name.
        folder: the folder's name below `stages/`.
        parent: the stage that it was trained from; -1 for the first.
        committed: when, in UTC, ISO 8601.
        digest: the SHA-256 of its `stage.json`, which holds the hashes of all the rest.
    """

    index: int
    name: str
    folder: str
    parent: int
    committed: str
    digest: str

    def __post_init__(self) -> None:
        check_folder_name(self.folder)
        if not NONE <= self.parent < self.index:
            raise ValueError(f"stage {self.index} cannot come from stage {self.parent}")


def check_folder_name(folder: str) -> None:
    """Refuse a path: folders are read and deleted by this name, and a lineage may come from a stranger."""
    if not re.fullmatch(r"\d{4,}-[^/\\]+", folder):
        raise ValueError(f"{folder!r} is no name of a stage's folder")


def folder_name(index: int, name: str) -> str:
    """`0002-legal`: safe for any file system; names that had to be changed get a hash, so that none collide."""
    safe = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name)).strip("-.")[:40]
    if not safe or safe != name:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        safe = f"{safe}-{digest}".lstrip("-")
    return f"{index:04d}-{safe}"


def write_record(folder: Path, record: StageRecord, *, parent: int = NONE) -> None:
    """Write a stage's record beside its weights and memory, and seal the folder."""
    for leftover in folder.glob(".*.tmp"):  # of an attempt that was cut short
        leftover.unlink()
    write_json(folder / "scores.json", {suite: asdict(score) for suite, score in record.scores.items()})
    write_lines(folder / "answers.jsonl", map(asdict, record.answers))
    write_lines(folder / "history.jsonl", map(asdict, record.history))
    content = {
        "index": record.index,
        "name": record.name,
        "parent": parent,
        "committed": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": record.provenance,
        "files": manifest(folder, skip=("stage.json", CHECKPOINTS)),
    }
    write_json(folder / "stage.json", content)


def read_record(folder: Path) -> StageRecord:
    """Read what `write_record` wrote.

    Raises:
        LineageError: if a file is missing or damaged.
    """
    stage = read_json(folder / "stage.json")
    scores, answers = read_json(folder / "scores.json"), read_lines(folder / "answers.jsonl")
    history = read_lines(folder / "history.jsonl")
    with reading(folder):
        return StageRecord(
            index=stage["index"],
            name=stage["name"],
            scores={suite: Score(**score) for suite, score in scores.items()},
            answers=tuple(Answer(**answer) for answer in answers),
            history=tuple(StepInfo(**info) for info in history),
            provenance=stage["provenance"],
        )


def read_info(folder: Path) -> StageInfo | None:
    """What a folder says of itself, or None where it is not a sealed stage with all of its files."""
    try:
        stage = read_json(folder / "stage.json")
        with reading(folder):
            facts: dict[str, Any] = {key: stage[key] for key in ("index", "name", "parent", "committed")}
            info = StageInfo(folder=folder.name, digest=file_hash(folder / "stage.json"), **facts)
            torn = differences(folder, stage["files"], skip=("stage.json", CHECKPOINTS), sizes_only=True)
    except LineageError:
        return None
    return None if torn or not folder.name.startswith(f"{info.index:04d}-") else info


def share_stage(folder: Path, target: Path) -> None:
    """The same stage at another place: hard links, or copies where the disk has none or the place is on another one."""
    for name in [*read_json(folder / "stage.json")["files"], "stage.json"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, target / name)
        except OSError:
            shutil.copy2(folder / name, target / name)


def stage_problems(folder: Path, info: StageInfo, *, only: Collection[str] | None = None) -> list[str]:
    """How a committed stage, or `only` some of its files, differs from what was committed, by hash."""
    if not folder.is_dir():
        return [f"{folder}: the folder is missing"]
    try:
        files = read_json(folder / "stage.json")["files"]
        if file_hash(folder / "stage.json") != info.digest:
            return [f"{folder / 'stage.json'}: the content has changed since commit"]
    except LineageError as error:
        return [f"{folder / 'stage.json'}: {', '.join(error.problems)}"]
    return differences(folder, files, skip=("stage.json", CHECKPOINTS), only=only)
