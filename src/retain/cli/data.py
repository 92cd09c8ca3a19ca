"""`data check` and `data distance`: what training will see of files, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from retain.cli.console import out, print_json, say, show_log

__all__ = ["app"]

app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at data before training on it."""


@app.command()
def check(
    file: Annotated[
        str, typer.Argument(help="training rows: JSONL, JSON, CSV, Parquet, a `datasets` folder or hub id")
    ],
    model: Annotated[
        str, typer.Option("--model", help="a model, a lineage or a recipe, whose tokenizer is used")
    ] = "smollm2-135m",
    test: Annotated[str | None, typer.Option(help="test rows, to look for overlap")] = None,
    format: Annotated[str, typer.Option(help="the rows' format; `retain list` shows them")] = "auto",
    max_length: Annotated[int, typer.Option(min=1, help="tokens that a row may have")] = 512,
    template: Annotated[str, typer.Option(help="auto, plain, or a file with a Jinja template")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="as JSON on stdout")] = False,
) -> None:
    """Count rows, lengths, duplicates, overlap and masked rows, and show three rows coloured by what is trained."""
    from retain.data.checking import check_data, preview
    from retain.data.readers import read_rows
    from retain.inference import load_renderer
    from retain.types import Encoded, Task

    show_log(quiet=as_json)
    for source in filter(None, (file, test)):
        read_rows(source)  # what is wrong with a file is told before a model is fetched
    text = Path(template).read_text(encoding="utf-8") if Path(template).is_file() else template
    family, renderer = load_renderer(model, text)

    def encode(task: Task) -> list[Encoded]:
        renderer.labels = family.labels_for(task)
        return [family.encode(example, renderer) for example in family.unfold(task.train)]

    report = check_data(
        file, renderer=renderer, encode=encode, vary=lambda row: family.vary(row, renderer, draw="0/0"),
        max_length=max_length, test=test, format=format,
    )  # fmt: skip
    if as_json:
        print_json(report.as_dict())
        return
    for name, value in report.lines():
        say(f"{name:>24}  {value}")
    out.print(Text.assemble("\nrows, ", ("trained", "bold green"), " and ", ("untrained", "dim"), ":\n"))
    for encoded in report.samples:
        row = Text()
        for piece, trained in preview(encoded, renderer):
            row.append(piece, style="bold green" if trained else "dim")
        out.print(row)
        out.print()


@app.command()
def distance(
    files: Annotated[list[str], typer.Argument(help="two or more files of rows, one a task")],
    seed: Annotated[int, typer.Option(help="of which rows are counted and which are held out")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON on stdout")] = False,
) -> None:
    """Say how far apart tasks are: what one's rows cost a small n-gram model of the other's, in nats a character.

    0 is the same kind of text. No model is needed.
    """
    from retain.data.formats import detect_format, to_examples
    from retain.data.readers import read_rows
    from retain.errors import ConfigError
    from retain.evaluation.task_distance import task_distances

    show_log(quiet=as_json)
    if len(set(files)) < 2:
        raise ConfigError("a distance is between two files or more", hint="retain data distance A.jsonl B.jsonl")
    tasks = {
        file: to_examples(rows, detect_format(rows, where=file), where=file)
        for file in files
        for rows in [read_rows(file)]
    }
    found = sorted(task_distances(tasks, seed=seed), key=lambda one: one.nats.mean)
    if as_json:
        print_json([one.as_dict() for one in found])
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for title in ("nats a character", "95 % confidence"):
        table.add_column(title, justify="right")
    table.add_column("between", overflow="fold")
    for one in found:
        ends = f"{one.nats.low:.3f} to {one.nats.high:.3f}"
        table.add_row(f"{one.nats.mean:.3f}", ends, f"{one.first} and {one.second}")
    out.print(table)
