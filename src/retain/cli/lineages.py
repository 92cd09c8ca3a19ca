"""`log`, `rollback`, `rollforward`, `branch`, `prune`, `fsck`, `discard`, `export`: what can be done with a lineage."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from retain.cli.console import out, print_json, say
from retain.errors import LineageError

if TYPE_CHECKING:
    from retain.lineage import Lineage

__all__ = ["add"]

Folder = Annotated[Path, typer.Argument(help="a lineage")]


def add(app: typer.Typer) -> None:
    """Give the application these commands."""
    for command in (rollback, rollforward, branch, prune, discard, fsck, export):
        app.command(command.__name__)(command)
    app.command("log")(show_line)


def opened(path: Path) -> "Lineage":
    """The lineage; torch is imported only now."""
    from retain.lineage import Lineage

    return Lineage.open(path)


def show_line(
    lineage: Folder, as_json: Annotated[bool, typer.Option("--json", help="as JSON on stdout")] = False
) -> None:
    """Show a lineage's stages: which is the head, what each scored on its own task, what is off the line."""
    found = opened(lineage)
    line = {stage.index for stage in found.log()}
    if as_json:
        print_json({"head": found.head, "stages": [asdict(s) | {"on_line": s.index in line} for s in found.stages]})
        return
    table = Table("", "stage", "name", "own score", "probes", "from", "committed", box=None, pad_edge=False)
    for stage in found.stages:
        scores = found.load_stage(stage.index).scores
        own, probes = scores.get(stage.name), scores.get("probes")
        table.add_row(
            "head" if stage.index == found.head else "" if stage.index in line else "off", str(stage.index), stage.name,
            f"{own.value:.3f} {own.metric}" if own else "", f"{probes.value:.3f}" if probes else "",
            str(stage.parent) if stage.parent >= 0 else "", stage.committed[:16].replace("T", " "),
        )  # fmt: skip
    say(f"{lineage}: base model {found.base.name}")
    out.print(table)
    if partial := found.partial():
        say(f"in progress: {partial.name[1:].removesuffix('.partial')} (`retain continue {lineage}` goes on)")


def rollback(lineage: Folder, stage: Annotated[int, typer.Argument(help="the stage to go back to")]) -> None:
    """Go back to an earlier stage. Nothing is deleted: `rollforward` undoes it."""
    found = opened(lineage)
    before = found.head
    found.rollback(stage)
    say(f"head is stage {stage}; `retain rollforward {lineage} {before}` undoes this, `retain prune` makes it final")


def rollforward(lineage: Folder, stage: Annotated[int, typer.Argument(help="a stage off the line")]) -> None:
    """Go to a stage that a rollback left behind."""
    opened(lineage).rollforward(stage)
    say(f"head is stage {stage}")


def branch(
    lineage: Folder,
    stage: Annotated[int, typer.Argument(help="the stage to start from")],
    new: Annotated[Path, typer.Argument(help="the new lineage's folder")],
) -> None:
    """Start a second lineage from a stage; unchanged files are shared."""
    made = opened(lineage).branch(stage, new)
    say(f"{made.path}: head is stage {made.head}")


def prune(lineage: Folder) -> None:
    """Delete the stages that are off the line."""
    freed = opened(lineage).prune()
    say(f"{freed / 2**20:.1f} MiB freed")


def discard(lineage: Folder) -> None:
    """Delete the stage in progress, so that the lineage is as its last commit left it."""
    found = opened(lineage)
    partial = found.partial()
    found.discard_partial()
    say(f"discarded {partial.name[1:].removesuffix('.partial')}" if partial else "no stage is in progress")


def fsck(lineage: Folder) -> None:
    """Read and hash everything, and say what is wrong."""
    problems = opened(lineage).verify()
    if problems:
        raise LineageError(
            f"{lineage} has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems=problems
        )
    say(f"{lineage} is sound")


def export(
    lineage: Folder,
    to: Annotated[Path, typer.Argument(help="a new folder")],
    stage: Annotated[int | None, typer.Option(help="which stage; the head where not given")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="a plain model, the adapter merged into its base")] = False,
) -> None:
    """Write a stage for other tools: PEFT's adapter or a `transformers` folder, with tokenizer and chat template."""
    from retain.cli.console import show_log
    from retain.export import export_stage

    show_log()
    export_stage(opened(lineage), to, stage=stage, merge=merge)
    say(f"{to}: loads with `{'peft' if (to / 'adapter_config.json').exists() else 'transformers'}`")
