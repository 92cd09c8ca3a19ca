"""The command line as a person uses it: arguments in, exit code, stdout and stderr out."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.utils import logging as transformers_logging

from retain.cli import main


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: Any
    out: str
    err: str

    def refused(self, *said: str, code: int = 2) -> None:
        """The command gave an error of three parts that says these things, and nothing else."""
        assert self.code == code, self.err
        assert "Traceback" not in self.out + self.err
        lines = self.err.splitlines()
        start = next(at for at, line in enumerate(lines) if line.startswith("error: "))
        assert [line for line in lines[start + 1 :] if not line.startswith(("  ", "hint: "))] == []
        assert lines[-1].startswith("hint: "), "the way out is missing"
        for part in said:
            assert part in "\n".join(lines[start:])


@pytest.fixture(autouse=True)
def same_log_as_before() -> Iterator[None]:
    logger = logging.getLogger("retain")
    handlers, level, verbosity = logger.handlers, logger.level, transformers_logging.get_verbosity()
    yield
    logger.handlers = handlers
    logger.setLevel(level)
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def retain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command in this process."""

    def run(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["retain", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lineage of two tasks with LoRA and replay; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    tasks = []
    for name, answers in (("colour", ["red", "green", "blue"]), ("animal", ["fox", "dog"])):
        rows = [
            {"prompt": f"{name} {i}", "completion": answers[i % len(answers)], "choices": answers} for i in range(16)
        ]
        for part, chosen in (("train", rows[6:]), ("test", rows[:6])):
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"{name}.{part}.jsonl").write_text(text, encoding="utf-8")
        tasks.append({"name": name, "train": f"{name}.train.jsonl", "test": f"{name}.test.jsonl"})
    recipe: dict[str, Any] = {
        "model": str(tiny_model),
        "method": {"name": "lora", "r": 4},
        "strategy": {"name": "replay"},
        "tasks": tasks,
        "train": {"learning_rate": 1e-2, "max_length": 64, "precision": "fp32"},
        "evaluation": {"max_probes": 11, "kl": False},
        "protect_base": "off",
        "output_dir": "out",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETAIN_CACHE", str(folder / "cache"))
        patch.setattr(sys, "argv", ["retain", "train", str(folder / "recipe.yaml"), "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    return folder


@pytest.fixture
def lineage(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(trained / "out", tmp_path / "lineage")
