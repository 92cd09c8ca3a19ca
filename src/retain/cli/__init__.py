"""The command line: parse, call, print. Nothing here decides anything."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import typer

from retain.cli import data, information, lineages, measuring, training
from retain.cli.console import reporting_errors
from retain.errors import ConfigError

__all__ = ["main"]

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # what typer raises for a wrong verb, option or argument

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


@contextmanager
def telling_usage() -> Generator[None]:
    """Turn a wrong verb, option or argument into our error."""
    try:
        yield
    except UsageError as error:
        shown: Any = error  # of typer's own copy of click, which has no public name
        if not (message := shown.format_message()):  # nothing was typed, and the help is printed
            raise SystemExit(2) from None
        command = shown.ctx.command_path if shown.ctx else "retain"
        raise ConfigError(message, hint=f"`{command} --help` shows what is allowed") from None


def main() -> None:
    """The `retain` command."""
    with reporting_errors(), processes(), telling_usage():
        raise SystemExit(app(prog_name="retain", standalone_mode=False))
