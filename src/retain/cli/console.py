"""What a person sees: progress and logs on stderr, data on stdout, errors in three parts."""

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from retain import distributed
from retain.errors import RetainError
from retain.types import StepInfo

__all__ = ["out", "print_json", "reporting_errors", "show_log", "training_progress"]

out = Console()
err = Console(stderr=True)


def show_log(*, quiet: bool = False) -> None:
    """Send our log to stderr, and keep the libraries' progress bars and warnings out of it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logger = logging.getLogger("retain")
    logger.handlers = [RichHandler(console=err, show_path=False, show_level=False, omit_repeated_times=False)]
    logger.setLevel(logging.WARNING if quiet or not distributed.is_main() else logging.INFO)


def print_json(value: Any) -> None:
    """A value as JSON on stdout, for scripts."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    sys.stdout.write(json.dumps(plain, ensure_ascii=False, indent=2, default=str) + "\n")


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn what goes wrong into a message and an exit code: 2 the user's, 3 the budget's, 130 Ctrl-C, 1 a bug of ours."""
    try:
        yield
    except RetainError as error:
        err.print(Text("error: ", style="bold red") + Text(error.message))
        for problem in error.problems:
            err.print(Text(f"  {problem}"))
        if error.hint:
            err.print(Text("hint: ", style="bold cyan") + Text(error.hint))
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        err.print("[bold]interrupted[/]: what was committed is safe, and the same command goes on from the last checkpoint")
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception:
        err.print(Text("a bug in retain; please report it with what follows", style="bold red"))
        err.print(Text(traceback.format_exc()))
        raise SystemExit(1) from None


@contextmanager
def training_progress() -> Iterator[Callable[[StepInfo], None]]:
    """A bar a task: steps, loss, tokens a second, time left. Yields the observer that moves it."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Progress(*columns, console=err, refresh_per_second=4, disable=not distributed.is_main()) as progress:
        bars: dict[str, Any] = {}

        def observe(info: StepInfo) -> None:
            if info.task not in bars:
                bars[info.task] = progress.add_task(info.task, total=info.num_steps, figures="")
            figures = f"loss {info.loss:.3f}  {info.num_tokens / max(info.seconds, 1e-9):,.0f} tokens/s"
            if info.penalty:
                figures += f"  penalty {info.penalty:.3g}"
            progress.update(bars[info.task], completed=info.step, figures=figures)

        yield observe
