"""`evaluate`, `report`, `compare`, `chat`: looking at what was learned and lost."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from retain.cli.console import err, out, print_json, say, show_log

__all__ = ["add"]

Target = Annotated[str, typer.Argument(help="a lineage, a model's folder, an offline model or a hub id")]
Stage = Annotated[int | None, typer.Option(help="which stage of a lineage; the head where not given")]


def add(app: typer.Typer) -> None:
    """Give the application these commands."""
    for command in (evaluate, report, compare, chat):
        app.command(command.__name__)(command)


def evaluate(
    target: Target,
    data: Annotated[str | None, typer.Option("--data", help="rows to score")] = None,
    metric: Annotated[str, typer.Option(help="how they are scored")] = "auto",
    stage: Stage = None,
    probes: Annotated[bool, typer.Option("--probes/--no-probes", help="ask the probes of general abilities")] = True,
    limit: Annotated[int | None, typer.Option(help="score at most so many rows")] = None,
    answers: Annotated[Path | None, typer.Option(help="write one JSON line an example here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="scores as JSON on stdout")] = False,
) -> None:
    """Score a lineage's stage, or any model, on a file and on the probes."""
    from dataclasses import asdict

    from retain.inference import load_for_answering, rows_to_score
    from retain.inference import score as score_model
    from retain.storage.documents import write_lines

    show_log(quiet=as_json)
    tasks = [] if data is None else [rows_to_score(data, metric=metric, limit=limit)]
    evaluation = score_model(load_for_answering(target, stage=stage), tasks, probes=probes)
    if answers is not None:
        write_lines(answers, [asdict(answer) for answer in evaluation.answers])
    if as_json:
        print_json({name: asdict(score) for name, score in evaluation.scores.items()})
        return
    table = Table("suite", "score", "95 %", "metric", "rows", "margin", box=None, header_style="bold", pad_edge=False)
    for name, score in evaluation.scores.items():
        margin = "" if score.margin is None else f"{score.margin:+.2f} nats"
        table.add_row(
            name, f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}", score.metric, str(score.num), margin
        )
    out.print(table)


def report(
    lineage: Annotated[Path, typer.Argument(help="a lineage")],
    to: Annotated[
        Path | None, typer.Option("--output", "-o", help="the HTML file; in the lineage's folder where not given")
    ] = None,
) -> None:
    """Show what was learned and lost: tables here, and one HTML file that works from a mail."""
    from retain.lineage import Lineage
    from retain.report import write_report
    from retain.report.tables import print_summary

    record = Lineage.open(lineage).record()
    path = write_report([record], to or lineage / "report.html")
    print_summary(out, [record])
    say(f"report: {path}")


def compare(
    lineages: Annotated[list[Path], typer.Argument(help="two or more lineages over the same tasks")],
    to: Annotated[Path, typer.Option("--output", "-o", help="the HTML file")] = Path("comparison.html"),
) -> None:
    """Put several lineages side by side: new skill against old skill kept."""
    from retain.lineage import Lineage
    from retain.report import write_report
    from retain.report.tables import print_summary

    # One recipe may have made several lineages: their folders tell them apart.
    records = [replace(Lineage.open(path).record(), title=path.resolve().name) for path in lineages]
    path = write_report(records, to)
    print_summary(out, records)
    say(f"report: {path}")


def chat(
    target: Target,
    stage: Stage = None,
    task: Annotated[str, typer.Option(help="whose column answers, where each task has one; else it is inferred")] = "",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="answer this and stop")] = None,
    system: Annotated[str | None, typer.Option(help="the system's turn")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 256,
) -> None:
    """Talk to a stage of a lineage, or to any model, through the renderer that it was trained with."""
    from retain.inference import answer, load_for_answering
    from retain.types import Message

    show_log(quiet=prompt is not None)
    model = load_for_answering(target, stage=stage)
    messages = [Message("system", system)] if system else []
    if prompt is None:
        err.print("an empty line or Ctrl-D ends", style="dim")
    while True:
        try:
            said = prompt if prompt is not None else out.input("[bold]you:[/] ")
        except EOFError:
            return
        if not said.strip():
            return
        messages.append(Message("user", said))
        text = answer(model, messages, task=task, temperature=temperature, max_new_tokens=max_new_tokens)
        messages.append(Message("assistant", text))
        out.print(text, soft_wrap=True)
        if prompt is not None:
            return
