"""The command line: parse, call, print. Nothing here decides anything."""

import typer

from retain import distributed
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


def main() -> None:
    """The `retain` command."""
    with reporting_errors():
        distributed.start()
        try:
            app()
        finally:
            distributed.stop()
