"""`train`, `continue`, `demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from retain.cli.console import out, print_json, show_log, training_progress

__all__ = ["add"]

Overrides = Annotated[list[str] | None, typer.Argument(help="settings such as train.learning_rate=1e-4", metavar="[KEY=VALUE]...")]
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
    from retain.run import train as run

    show_log(quiet=as_json)
    loaded = load_config(recipe, overrides or ())
    for note in loaded.notes:
        out.print(note, style="dim")
    if not as_json:
        print_settings(loaded.sources, loaded.config)
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
    accept: Accept = False,
    as_json: Json = False,
) -> None:
    """Learn one more task on a lineage, or finish what was interrupted; the strategy's memory is intact."""
    from retain.data.tasks import TaskConfig
    from retain.run import extend as run

    show_log(quiet=as_json)
    new = ()
    if data is not None:
        local = Path(data).expanduser()
        train_source = str(local.resolve()) if local.exists() else data
        test_source = str(Path(test).expanduser().resolve()) if test and Path(test).expanduser().exists() else test
        new = (TaskConfig(name=name or local.stem, train=train_source, test=test_source, metric=metric),)
    with training_progress() as progress:
        grown = run(lineage, new, overrides=overrides or (), observers=[progress], accept=accept)
    finish(grown, as_json=as_json)


def demo(
    folder: Annotated[Path, typer.Option("--output-dir", help="where the two lineages and the report go")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """Show forgetting and its prevention on the embedded model: three made-up skills, learned twice."""
    from retain.demo import run_demo
    from retain.report import write_report
    from retain.report.tables import print_summary

    show_log(quiet=as_json)
    with training_progress() as progress:
        lineages = run_demo(folder, observers=[progress])
    records = [lineage.record() for lineage in lineages]
    path = write_report(records, folder / "report.html")
    if as_json:
        print_json([{"title": record.title, "scores": [dict(stage.scores) for stage in record.stages]} for record in records])
        return
    print_summary(out, records)
    out.print(f"report: {path}")


def print_settings(sources: Any, config: Any) -> None:
    """What was set, and where each setting that is not a default came from."""
    from rich.table import Table

    table = Table("setting", "value", "from", box=None, header_style="dim", pad_edge=False)
    for key, value, source in settings(config, sources):
        table.add_row(key, value, source)
    out.print(table)


def settings(config: Any, sources: Any) -> list[tuple[str, str, str]]:
    """(key, value, source) of every setting that somebody made."""
    from retain.config.run_config import to_tree

    rows: list[tuple[str, str, str]] = []
    for key, source in sources.items():
        if source == "default":
            continue
        value: Any = to_tree(config)
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        rows.append((key, str(value), source))
    return rows


def finish(lineage: Any, *, as_json: bool) -> None:
    """Print the tables and write the report."""
    from retain import distributed
    from retain.report import write_report
    from retain.report.tables import print_summary

    if not distributed.is_main():
        return
    record = lineage.record()
    path = write_report([record], lineage.path / "report.html")
    if as_json:
        print_json({"lineage": str(lineage.path), "report": str(path), "stages": [
            {"index": stage.index, "name": stage.name, "scores": {k: vars_of(v) for k, v in stage.scores.items()}}
            for stage in record.stages
        ]})  # fmt: skip
        return
    print_summary(out, [record])
    out.print(f"lineage: {lineage.path}\nreport:  {path}")


def vars_of(score: Any) -> dict[str, Any]:
    """A score's fields."""
    from dataclasses import asdict

    return asdict(score)
