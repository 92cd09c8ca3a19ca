import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from retain.cli.console import print_json, reporting_errors, say, show_log, training_progress
from retain.errors import BudgetExceeded, ConfigError
from retain.types import StepInfo

Captured = pytest.CaptureFixture[str]


def told(error: BaseException, capsys: Captured) -> tuple[object, str]:
    with pytest.raises(SystemExit) as stopped, reporting_errors():
        raise error
    out, err = capsys.readouterr()
    assert out == ""
    return stopped.value.code, err


def test_an_error_has_three_parts(capsys: Captured) -> None:
    long = "$.tasks[0].train: no file " + "x" * 100 + " with [red]markup[/red]"
    error = ConfigError("recipe.yaml has 1 problem", problems=[long], hint="mend it")
    assert told(error, capsys) == (2, f"error: recipe.yaml has 1 problem\n  {long}\nhint: mend it\n")


def test_the_budget_has_its_own_exit_code(capsys: Captured) -> None:
    assert told(BudgetExceeded("too much"), capsys) == (3, "error: too much\n")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(130)])
def test_an_interrupt(stop: BaseException, capsys: Captured) -> None:
    code, err = told(stop, capsys)
    assert code == 130
    assert err.startswith("error: interrupted\nhint: ")


def test_other_exits_pass(capsys: Captured) -> None:
    assert told(SystemExit(7), capsys) == (7, "")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied", "/far/away")],
)
def test_what_the_disk_refuses(error: OSError, capsys: Captured) -> None:
    code, err = told(error, capsys)
    assert code == 2
    assert err.startswith(f"error: {error.filename or 'the disk'}: {error.strerror}\nhint: ")


def test_a_bug_of_ours_shows_where(capsys: Captured) -> None:
    code, err = told(RuntimeError("oh"), capsys)
    assert code == 1
    assert err.startswith("a bug in retain")
    assert "test_console.py" in err


def test_nothing_to_tell(capsys: Captured) -> None:
    with reporting_errors():
        pass
    assert capsys.readouterr() == ("", "")


def test_lines_stay_whole(capsys: Captured) -> None:
    line = "/a/path/" + "x" * 300 + " [b]not markup[/b] 0.5"
    say(line)
    assert capsys.readouterr().out == line + "\n"


def test_json_is_data(capsys: Captured) -> None:
    @dataclass
    class Point:
        x: int
        name: str

    print_json(Point(1, "Hà Nội " * 40))
    assert json.loads(capsys.readouterr().out) == {"x": 1, "name": "Hà Nội " * 40}


def info(step: int) -> StepInfo:
    return StepInfo(
        task="banking", step=step, num_steps=4, epoch=0.0, loss=1.5, penalty=0.25, learning_rate=0.1,
        gradient_norm=1.0, num_tokens=500, num_targets=5, seconds=0.5,
    )  # fmt: skip


def test_progress_goes_to_stderr(capsys: Captured) -> None:
    with training_progress() as observe:
        for step in range(1, 5):
            observe(info(step))
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("banking", "4/4", "loss 1.500", "1,000 tokens/s", "penalty 0.25"):
        assert part in " ".join(err.split())


def test_the_log_goes_to_stderr(capsys: Captured) -> None:
    import logging

    show_log()
    logging.getLogger("retain").info("scoring [0, 1]")
    assert capsys.readouterr().err.rstrip().endswith("scoring [0, 1]")
    show_log(quiet=True)
    logging.getLogger("retain").info("scoring")
    logging.getLogger("retain").warning("look")
    out, err = capsys.readouterr()
    assert out == ""
    assert "look" in err
    assert "scoring" not in err


@pytest.mark.parametrize(("rank", "said"), [("0", "once"), ("1", "")])
def test_of_several_processes_the_first_speaks(rank: str, said: str) -> None:
    code = "from retain.cli.console import err, out, say\nsay('once')\nsay('once', to=err)\nout.print('')"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, "RANK": rank}
    )
    assert (done.stdout.strip(), done.stderr.strip()) == (said, said)
