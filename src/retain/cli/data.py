"""`data check`: what training will see of a file, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer
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
    model: Annotated[str, typer.Option("--model", help="whose tokenizer and chat template are used")] = "smollm2-135m",
    test: Annotated[str | None, typer.Option(help="test rows, to look for overlap")] = None,
    format: Annotated[str, typer.Option(help="the rows' format; `retain list` shows them")] = "auto",
    max_length: Annotated[int, typer.Option(min=1, help="tokens that a row may have")] = 512,
    template: Annotated[str, typer.Option(help="auto, plain, or a file with a Jinja template")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="as JSON on stdout")] = False,
) -> None:
    """Count rows, lengths, duplicates, overlap and masked rows, and show three rows coloured by what is trained."""
    from retain.data.checking import check_data, preview
    from retain.data.readers import read_rows
    from retain.data.rendering import Renderer
    from retain.inference import load_tokenizer

    show_log(quiet=as_json)
    for source in filter(None, (file, test)):
        read_rows(source)  # what is wrong with a file is told before a model is fetched
    family, tokenizer = load_tokenizer(model)
    text = Path(template).read_text(encoding="utf-8") if Path(template).is_file() else template
    renderer = Renderer(tokenizer, text)
    report = check_data(
        file, renderer=renderer, encode=lambda example: family.encode(example, renderer),
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
        for piece, trained in preview(encoded, tokenizer):
            row.append(piece, style="bold green" if trained else "dim")
        out.print(row)
        out.print()
