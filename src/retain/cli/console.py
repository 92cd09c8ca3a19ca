"""What a person sees: progress and logs on stderr, data on stdout, errors in three parts."""

import errno
import json
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from retain.errors import RetainError

if TYPE_CHECKING:
    from retain.types import StepInfo

__all__ = ["err", "out", "print_json", "reporting_errors", "say", "show_log", "training_progress"]

# Of several processes that `torchrun` started, only the first speaks. What is printed is data, never markup.
SILENT = os.environ.get("RANK", "0") != "0"
out = Console(markup=False, highlight=False, quiet=SILENT)
err = Console(markup=False, highlight=False, quiet=SILENT, stderr=True)


INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT)


def show_log(*, quiet: bool = False) -> None:
    """Send our log to stderr, and keep the libraries' progress bars and warnings out of it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logger = logging.getLogger("retain")
    logger.handlers = [RichHandler(console=err, show_path=False, show_level=False, log_time_format="%H:%M:%S")]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def say(text: str, *, to: Console = out) -> None:
    """One line, whole however narrow the terminal is, so that paths can be copied."""
    to.print(text, soft_wrap=True)


def print_json(value: Any) -> None:
    """A value as JSON on stdout, for scripts."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    say(json.dumps(plain, ensure_ascii=False, indent=2, default=str))


def show_error(message: str, problems: Sequence[str] = (), hint: str = "") -> None:
    """The three parts on stderr."""
    err.print(Text("error: ", style="bold red") + Text(message), soft_wrap=True)
    for problem in problems:
        err.print(Text(f"  {problem}"), soft_wrap=True)
    if hint:
        err.print(Text("hint: ", style="bold cyan") + Text(hint), soft_wrap=True)


@contextmanager
def reporting_errors() -> Generator[None]:
    """Turn what goes wrong into a message and an exit code: 2 the user's, 3 the budget's, 130 Ctrl-C, 1 our bug."""
    try:
        yield
    except RetainError as error:
        show_error(error.message, error.problems, error.hint)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, SystemExit) as stopped:
        if isinstance(stopped, SystemExit) and stopped.code != INTERRUPTED:  # typer exits so on Ctrl-C
            raise
        show_error("interrupted", hint="what was committed is safe; the same command goes on from the last checkpoint")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception as error:  # noqa: BLE001  (the last place where an error can be told)
        if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
            show_error(
                f"{error.filename or 'the disk'}: {error.strerror}",
                hint="check the path, who may write there, and the free space",
            )
            raise SystemExit(2) from None
        told = Console(stderr=True, markup=False, highlight=False)  # every process tells its own bug
        told.print("a bug in retain; please report it with what follows", style="bold red")
        told.print(traceback.format_exc(), soft_wrap=True)
        raise SystemExit(1) from None


@contextmanager
def training_progress() -> Generator[Callable[["StepInfo"], None]]:
    """A bar a task: steps, loss, tokens a second, time left. Yields the observer that moves it."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=err, refresh_per_second=4, disable=SILENT) as progress:
        bars: dict[str, Any] = {}

        def observe(info: "StepInfo") -> None:
            if info.task not in bars:
                bars[info.task] = progress.add_task(info.task, total=info.num_steps, figures="")
            figures = f"loss {info.loss:.3f}  {info.num_tokens / max(info.seconds, 1e-9):,.0f} tokens/s"
            if info.penalty:
                figures += f"  penalty {info.penalty:.3g}"
            progress.update(bars[info.task], completed=info.step, figures=figures)

        yield observe
