import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Retain = Callable[..., Any]


def test_check_shows_counts_and_three_rows(retain: Retain, tiny_model: Path, trained: Path) -> None:
    file = trained / "colour.train.jsonl"
    result = retain("data", "check", file, "--model", tiny_model, "--test", trained / "colour.test.jsonl")
    assert result.code == 0
    lines = {line[:24].strip(): line[26:] for line in result.out.splitlines()}
    assert lines["format"] == "prompt_completion"
    assert lines["rows"] == "10"
    assert "trained and untrained" in result.out
    assert result.out.count("<|im_start|>user\n") == 3
    assert result.out.index("colour 6") < result.out.index("red")


def test_check_as_json(retain: Retain, lineage: Path, trained: Path) -> None:
    result = retain("data", "check", trained / "animal.train.jsonl", "--model", lineage, "--max-length", 4, "--json")
    report = json.loads(result.out)
    assert report["rows"] == 10
    assert report["over_length"] == 10
    assert report["max_length"] == 4


def test_check_of_a_file_that_does_not_exist(retain: Retain, tiny_model: Path, tmp_path: Path) -> None:
    retain("data", "check", tmp_path / "no.jsonl", "--model", tiny_model).refused("no.jsonl")


def test_check_of_rows_in_no_known_format(retain: Retain, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"question": "?", "reply": "!"}) + "\n", encoding="utf-8")
    retain("data", "check", file, "--model", tiny_model).refused("question")


def test_check_with_a_model_that_does_not_exist(retain: Retain, trained: Path) -> None:
    retain("data", "check", trained / "animal.train.jsonl", "--model", "smollm2").refused("no model 'smollm2'")


def test_distance_needs_no_model(retain: Retain, trained: Path) -> None:
    files = [trained / "colour.train.jsonl", trained / "animal.train.jsonl"]
    result = retain("data", "distance", *files, "--json")
    [told] = json.loads(result.out)
    assert told["tasks"] == [str(file) for file in files]
    assert told["low"] <= told["nats"] <= told["high"]
    shown = retain("data", "distance", *files)
    assert shown.code == 0
    assert f"{told['nats']:.3f}" in shown.out
    retain("data", "distance", files[0]).refused("two files")
