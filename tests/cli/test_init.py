import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

COMMANDS = [
    "train", "continue", "demo", "evaluate", "report", "compare", "chat", "log", "rollback", "rollforward", "branch",
    "prune", "discard", "fsck", "export", "list", "init", "doctor", "data",
]  # fmt: skip


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['retain', '--help']\n"
        "from retain.cli import main\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'altair'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "Tune language models and keep what they already knew" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(retain: Callable[..., Any], command: str) -> None:
    assert command in retain("--help").out
    result = retain(command, "--help")
    assert result.code == 0
    assert "Usage: retain" in result.out


def test_a_command_that_does_not_exist(retain: Callable[..., Any]) -> None:
    retain("trian").refused("trian", "'train'", "`retain --help`")


def test_options_and_arguments_that_are_wrong(retain: Callable[..., Any]) -> None:
    retain("train", "--foo").refused("--foo", "`retain train --help`")
    retain("chat").refused("Missing argument", "`retain chat --help`")
    retain("rollback", "x", "last").refused("integer")
    for command in ((), ("data",)):
        result = retain(*command)
        assert result.code == 2
        assert "Usage: retain" in result.out + result.err
        assert "error" not in result.err


def test_python_m_retain() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retain", "log", "nowhere"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is not a lineage\n")
