"""`train`, `continue`, `demo`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from retain.cli.console import err, out, print_json, say, show_log, training_progress
from retain.errors import ConfigError

if TYPE_CHECKING:
    from retain.lineage import Lineage
    from retain.types import Record

__all__ = ["add"]

Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings such as train.learning_rate=1e-4", metavar="[KEY=VALUE]...")
]
Accept = Annotated[bool, typer.Option("--accept", help="commit also what is over the forgetting budget, on the record")]
Json = Annotated[bool, typer.Option("--json", help="print scores as JSON on stdout")]


def add(app: typer.Typer) -> None:
    """Give the application these commands."""
    app.command("train")(train)
    app.command("continue")(extend)
    app.command("demo")(demo)


def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe; `retain init` writes one")],
    overrides: Overrides = None,
    accept: Accept = False,
    as_json: Json = False,
) -> None:
    """Learn a recipe's tasks one after another, and show what each cost the others.

    The lineage is written to the recipe's output_dir. Interrupted, the same command goes on.
    """
    from retain.config import load_config
    from retain.config.run_config import to_tree
    from retain.run import train as run

    show_log(quiet=as_json)
    loaded = load_config(recipe, overrides or ())
    for note in loaded.notes:
        say(note, to=err)
    if not as_json:
        show_settings(to_tree(loaded.config), loaded.sources)
    with training_progress() as progress:
        lineage = run(loaded.config, observers=[progress], accept=accept, sources=loaded.sources)
    finish(lineage, as_json=as_json)


def extend(
    lineage: Annotated[Path, typer.Argument(help="a lineage")],
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option("--data", help="the new task's training rows")] = None,
    name: Annotated[str | None, typer.Option(help="the new task's name; the file's where not given")] = None,
    test: Annotated[str | None, typer.Option(help="the new task's test rows; a part of --data where not given")] = None,
    metric: Annotated[str, typer.Option(help="how it is scored; `retain list` shows the metrics")] = "auto",
    max_train_rows: Annotated[int | None, typer.Option(min=1, help="train on a sample of at most so many rows")] = None,
    max_test_rows: Annotated[int | None, typer.Option(min=1, help="score a sample of at most so many rows")] = None,
    accept: Accept = False,
    as_json: Json = False,
) -> None:
    """Learn one more task on a lineage, or finish what was interrupted; the strategy's memory is intact."""
    from retain.data.tasks import TaskConfig
    from retain.run import extend as run

    show_log(quiet=as_json)
    new = ()
    if data is None and (name or test or metric != "auto" or max_train_rows or max_test_rows):
        raise ConfigError(
            "--name, --test, --metric and --max-… describe a new task, and there is none",
            hint="give its rows: --data FILE",
        )
    if data is not None:
        local = Path(data).expanduser()
        train_source = str(local.resolve()) if local.exists() else data
        test_source = str(Path(test).expanduser().resolve()) if test and Path(test).expanduser().exists() else test
        task = TaskConfig(
            name=name or local.stem, train=train_source, test=test_source, metric=metric,
            max_train_rows=max_train_rows, max_test_rows=max_test_rows,
        )  # fmt: skip
        new = (task,)
    with training_progress() as progress:
        grown = run(lineage, new, overrides=overrides or (), observers=[progress], accept=accept)
    finish(grown, as_json=as_json)


def demo(
    folder: Annotated[Path, typer.Option("--output-dir", help="where the two lineages and the report go")] = Path(
        "runs/demo"
    ),
    as_json: Json = False,
) -> None:
    """Show forgetting and its prevention on the embedded model: three made-up skills, learned twice."""
    from retain import distributed
    from retain.demo import run_demo
    from retain.report import write_report
    from retain.report.tables import print_summary

    show_log(quiet=as_json)
    with training_progress() as progress:
        lineages = run_demo(folder, observers=[progress])
    if not distributed.is_main():
        return
    records = [lineage.record() for lineage in lineages]
    path = write_report(records, folder / "report.html")
    if as_json:
        print_json({lineage.path.name: stages(lineage.record()) for lineage in lineages})
        return
    print_summary(out, records)
    say(f"report: {path}")


def show_settings(tree: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """What was set and by whom, a line a section; the rest are defaults."""
    sections: dict[tuple[str, str], list[str]] = {}
    for key, source in sources.items():
        section, _, rest = key.partition(".")
        if source != "default" and (section != "tasks" or rest.endswith(".name")):
            value: Any = tree
            for part in key.split("."):
                value = value[int(part)] if isinstance(value, list) else value[part]
            said = str(value) if section == "tasks" or rest in ("", "name") else f"{rest}={value}"
            sections.setdefault((source, section), []).append(said)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for (source, section), settings in sorted(sections.items(), key=lambda entry: entry[0][0] == "flag"):
        table.add_row(source, section, Text(" ".join(settings), overflow="fold"))
    err.print(table, style="dim")


def finish(lineage: "Lineage", *, as_json: bool) -> None:
    """Print the tables and write the report."""
    from retain import distributed
    from retain.report import write_report
    from retain.report.tables import print_summary

    if not distributed.is_main():
        return
    record = lineage.record()
    path = write_report([record], lineage.path / "report.html")
    if as_json:
        print_json({"lineage": str(lineage.path), "report": str(path), "stages": stages(record)})
        return
    print_summary(out, [record])
    say(f"lineage: {lineage.path}\nreport:  {path}")


def stages(record: "Record") -> list[dict[str, Any]]:
    """Every stage's scores, as JSON can hold them."""
    return [
        {
            "index": stage.index,
            "name": stage.name,
            "scores": {suite: asdict(score) for suite, score in stage.scores.items()},
        }
        for stage in record.stages
    ]
