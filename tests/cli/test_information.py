import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retain.cli.information import arguments, known, settings
from retain.config import load_config
from retain.errors import ConfigError
from retain.strategies.ewc import EWC

Retain = Callable[..., Any]


def test_list_shows_every_choice(retain: Retain) -> None:
    result = retain("list")
    assert result.code == 0
    assert result.err == ""
    for kind, entries in known().items():
        assert f"{kind}\n" in result.out
        for name in entries:
            assert f"  {name}" in result.out
    assert "Mix rows of old tasks into the new one." in result.out


def test_list_of_one_kind(retain: Retain) -> None:
    result = retain("list", "methods")
    assert "lora" in result.out
    assert "replay" not in result.out


def test_list_of_one_choice_shows_all_its_fields(retain: Retain) -> None:
    result = retain("list", "ewc")
    assert result.out.startswith("ewc (strategies): Protect the weights")
    text = " ".join(result.out.split())
    assert "strength float = 1.0 lambda, at least 0" in text
    assert "num_samples int = 200 examples of a task" in text
    assert "<class" not in text
    assert max(map(len, result.out.splitlines())) <= 80


def test_list_as_json(retain: Retain) -> None:
    listed = json.loads(retain("list", "--json").out)
    assert set(listed) == {"models", "families", "methods", "strategies", "metrics", "formats"}
    fields = {field["name"]: field for field in listed["methods"]["lora"]["fields"]}
    assert fields["r"] == {
        "name": "r", "type": "int", "required": False, "default": 16, "meaning": "the rank, above 0."
    }  # fmt: skip
    one = json.loads(retain("list", "replay", "--json").out)
    assert (one["kind"], one["name"]) == ("strategies", "replay")
    assert "ratio" in [field["name"] for field in one["fields"]]


def test_list_of_something_unknown(retain: Retain) -> None:
    retain("list", "ewx").refused("Did you mean `ewc`?", "strategies: agem, ")


def test_every_field_has_a_meaning() -> None:
    for entries in known().values():
        for value in entries.values():
            assert [field["name"] for field in settings(value) if not field["meaning"]] == []


def test_meanings_come_from_the_docstring() -> None:
    doc = """One line.

    Args:
        one, two: what both are,
            over two lines.
        three: another.

    Source: none: at all
    """
    both = "what both are, over two lines."
    assert arguments(doc) == {"one": both, "two": both, "three": "another."}
    assert arguments("One line.") == {}
    assert "Memory" not in "".join(arguments(EWC.__doc__ or "").values())


def test_init_writes_a_recipe_that_only_lacks_its_files(retain: Retain, tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.yaml"
    result = retain("init", path)
    assert result.code == 0
    assert str(path) in result.out
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(caught.value.problems) == 3
    assert all(": no file " in problem for problem in caught.value.problems)
    config = load_config(path, check_files=False).config
    assert [task.name for task in config.tasks] == ["first", "second"]
    assert config.budget.forgetting == 0.05
    retain("init", path).refused("exists already")


def test_doctor(retain: Retain) -> None:
    result = retain("doctor")
    assert result.code == 0
    for part in ("torch", "device", "precision", "model smollm2-135m"):
        assert part in result.out
    facts = json.loads(retain("doctor", "--json").out)
    assert facts["threads"] >= 1
    assert facts["model smollm2-135m"].startswith(("ready", "missing: pip install"))
