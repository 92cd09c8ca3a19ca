"""The examples run as they stand, and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"protect_a_trainer.py", "two_tasks.py"}


@pytest.mark.slow
def test_two_tasks(tmp_path: Path) -> None:
    plain, replay, report = run("two_tasks.py", tmp_path).splitlines()
    now = [int(re.findall(r"(\d+)% now", line)[0]) for line in (plain, replay)]
    assert now[0] < now[1]
    assert Path(report.removeprefix("report: ")).exists()


def test_protect_a_trainer() -> None:
    said = run("protect_a_trainer.py").splitlines()
    plain, protected = [line for line in said if line.startswith("replay")]
    now = [float(re.findall(r"([\d.]+) now", line)[0]) for line in (plain, protected)]
    assert now[1] < now[0] / 2
