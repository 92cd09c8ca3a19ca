"""The command line: parse, call, print. Nothing here decides anything."""

import os
from collections.abc import Generator
from contextlib import contextmanager

import typer

from retain.cli import data, information, lineages, measuring, training
from retain.cli.console import reporting_errors

__all__ = ["main"]

app = typer.Typer(
    name="retain",
    help="Tune language models and keep what they already knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (training, measuring, lineages, information):
    part.add(app)
app.add_typer(data.app, name="data")


@contextmanager
def processes() -> Generator[None]:
    """Join the processes that `torchrun` started together; alone, torch is not even imported, so `--help` is quick."""
    if "RANK" not in os.environ:
        yield
        return
    from retain import distributed

    distributed.start()
    try:
        yield
    finally:
        distributed.stop()


def main() -> None:
    """The `retain` command."""
    with reporting_errors(), processes():
        app(prog_name="retain")
