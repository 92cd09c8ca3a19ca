"""The list of stages: what `lineage.json` says, and what a crash kept it from saying.

Every stage knows its parent. The line is the chain of parents from the head down to stage 0; other stages are off it.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from retain.errors import LineageError
from retain.storage.documents import read_json, reading, write_json
from retain.storage.stage import NONE, StageInfo, check_folder_name, read_info

__all__ = ["BaseModel", "Ledger", "listed", "read_ledger", "refuse_occupied", "write_ledger"]

FORMAT = 1
FILE = "lineage.json"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Which model a lineage starts from.

    Args:
        name: as `models.hub.resolve` takes it.
        revision: the hub's commit; empty where there is none.
        hash: of the weights.
    """

    name: str
    revision: str
    hash: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """What `lineage.json` says.

    Args:
        base: the model that the lineage starts from.
        stages: all that are committed, by number, on the line or off it.
        head: the stage that the next one is trained from; -1 before stage 0.
        pruned: the folders of stages that were deleted, or are about to be.
    """

    base: BaseModel
    stages: tuple[StageInfo, ...] = ()
    head: int = NONE
    pruned: tuple[str, ...] = ()

    def line(self, index: int) -> tuple[StageInfo, ...]:
        """Stage 0 to `index`, each the parent of the next."""
        known = {stage.index: stage for stage in self.stages}
        line: list[StageInfo] = []
        while index != NONE:
            line.append(known[index])
            index = known[index].parent
        return tuple(reversed(line))

    @property
    def next(self) -> int:
        """The number of the next stage: one that was never used, also by a stage that is pruned."""
        numbers = [int(folder.split("-")[0]) for folder in (*(stage.folder for stage in self.stages), *self.pruned)]
        return 1 + max(numbers, default=NONE)

    def stage(self, index: int) -> StageInfo:
        """A stage by its number.

        Raises:
            LineageError: if there is no such stage.
        """
        for stage in self.stages:
            if stage.index == index:
                return stage
        have = f"there is {listed(self.stages)}"
        raise LineageError(f"there is no stage {index}", problems=[have], hint="`retain log LINEAGE` lists the stages")

    def plus(self, stage: StageInfo) -> "Ledger":
        """With one more stage, the new head."""
        return replace(self, stages=(*self.stages, stage), head=stage.index)


def listed(stages: Collection[StageInfo]) -> str:
    """`0 (base), 1 (banking)`."""
    return ", ".join(f"{stage.index} ({stage.name})" for stage in stages) or "none yet"


def refuse_occupied(path: Path) -> None:
    """Refuse a folder where no lineage can start; what a start that was cut short left there does not count.

    Raises:
        LineageError: if the folder holds a lineage, or anything else.
    """
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith((".", "lineage."))}
    if (path / FILE).exists():
        hint = f"`retain continue {path} --data FILE` adds a task to it; or choose another folder"
        raise LineageError(f"{path} is a lineage already", hint=hint)
    if names not in (set(), {"stages"}, {"stages", "config.yaml"}) or any((path / "stages").glob("*")):
        found = f"it holds {', '.join(sorted(names)[:5])}"
        raise LineageError(f"{path} is not empty", problems=[found], hint="choose another folder")


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Replace a lineage's `lineage.json`, at once and durably."""
    lists = {"stages": [asdict(stage) for stage in ledger.stages], "pruned": list(ledger.pruned)}
    write_json(path / FILE, {"format": FORMAT, **asdict(ledger), **lists})


def read_ledger(path: Path) -> Ledger:
    """Read a lineage's `lineage.json`, and take in the stage that was committed just before a crash.

    Raises:
        LineageError: if there is no lineage, or a newer version wrote it, or it is damaged.
    """
    file = path / FILE
    if not file.is_file():
        damaged = any((path / "stages").glob("*"))
        raise LineageError(
            f"{path} {'has lost its lineage.json' if damaged else 'is not a lineage'}",
            problems=[f"there is no {file}"],
            hint="restore it from a backup" if damaged else "`retain train RECIPE` starts one",
        )
    content: dict[str, Any] = read_json(file)
    with reading(file):
        if content["format"] > FORMAT:
            raise LineageError(
                f"{path} was written by a newer retain",
                problems=[f"its format is {content['format']}; this version reads {FORMAT}"],
                hint="upgrade: pip install --upgrade retain",
            )
        stages = tuple(StageInfo(**stage) for stage in content["stages"])
        for folder in content["pruned"]:
            check_folder_name(folder)
        ledger = Ledger(BaseModel(**content["base"]), stages, content["head"], tuple(content["pruned"]))
        ledger.line(ledger.head)  # a stage that is named but not listed is an error here, not later
    return _with_unlisted(path, ledger)


def _with_unlisted(path: Path, ledger: Ledger) -> Ledger:
    """The ledger with the stages that were renamed into place but not yet listed."""
    found = [info for folder in (path / "stages").glob("[0-9]*") if (info := read_info(folder)) is not None]
    for info in sorted(found, key=lambda info: info.index):
        if info.index >= ledger.next and info.parent == ledger.head:
            ledger = ledger.plus(info)
    return ledger
