import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

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


ROWS: dict[str, list[dict[str, Any]]] = {
    "label": [{"text": f"name {i} of it", "label": ["red", "green", "blue"][i % 3]} for i in range(12)],
    "labels": [{"text": f"name {i} of it", "labels": ["red", "wet"][: i % 3]} for i in range(12)],
    "tags": [{"tokens": ["An", "lives", f"in{i}"], "tags": ["B-who", "O", "O"]} for i in range(12)],
    "text": [{"text": f"the fox {i} jumps over the dog and all is well in the house"} for i in range(12)],
    "chat": [
        {
            "messages": [
                {"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "hello"},
                {"role": "user", "content": "and then?"}, {"role": "assistant", "content": f"bye {i}"},
            ]
        }
        for i in range(12)
    ],
}  # fmt: skip

FROM_NOTHING: dict[str, dict[str, Any]] = {
    "ngram": {"family": "ngram"},
    "recurrent": {"family": "recurrent", "cell": "gru"},
    "seq2seq": {"family": "seq2seq", "architecture": "t5"},
    "encoder": {"family": "encoder", "architecture": "bert"},
}


@pytest.fixture
def check(retain: Retain, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Checks rows with a model, or with the recipe of one that starts from nothing: the counts, and what is shown."""

    def run(rows: str, model: str) -> tuple[dict[str, Any], str]:
        file = tmp_path / f"{rows}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[rows]), encoding="utf-8")
        if model in FROM_NOTHING:
            recipe: dict[str, Any] = {
                "model": FROM_NOTHING[model], "method": "full", "strategy": "sequential", "output_dir": "out",
                "tasks": [{"name": "a", "train": file.name, "test_fraction": 0.0}],
            }  # fmt: skip
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
            model = str(tmp_path / "recipe.yaml")
        counted, shown = (retain("data", "check", file, "--model", model, *more) for more in (["--json"], []))
        assert counted.code == shown.code == 0, counted.err
        return json.loads(counted.out), shown.out

    return run


@pytest.mark.parametrize("model", FROM_NOTHING)
def test_check_of_raw_text_with_a_recipe_of_every_family(check: Any, model: str) -> None:
    report, shown = check("text", model)
    trained, read = report["completion_tokens"]["total"], report["prompt_tokens"]["total"]
    if model in ("ngram", "recurrent"):  # all but the first token
        assert read == len(ROWS["text"])
        assert shown.count("<|endoftext|>") == 3
    else:  # what is hidden
        assert 0 < trained < read
        assert ("<extra_id_0>" if model == "seq2seq" else "[MASK]") in shown
    assert report["masked"] == 0


@pytest.mark.parametrize("model", ["ngram", "recurrent", "seq2seq"])
def test_check_of_conversations_counts_every_answer(check: Any, model: str) -> None:
    report, shown = check("chat", model)
    assert report["rows"] == 12
    assert report["learned"] == (24 if model == "seq2seq" else 12)
    assert ("12, learned as 24 examples" in shown) == (model == "seq2seq")
    assert shown.count("hello<|endoftext|>") == (2 if model == "seq2seq" else 3)
    assert report["completion_tokens"]["total"] > 12 * 2 * 2, "each answer and its stop token"


@pytest.mark.parametrize("model", ["encoder", pytest.param("minilm-l6", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("rows", "trained", "answer"), [("label", 1, "green"), ("labels", 2, '["red"]'), ("tags", 3, "B-who O O")]
)
def test_check_of_labels_with_an_encoder(check: Any, model: str, rows: str, trained: int, answer: str) -> None:
    """One target a row; one for each label of the file; one for each word. What is trained is shown by its name."""
    report, shown = check(rows, model)
    counted = report["completion_tokens"]
    assert counted["least"] == counted["most"] == trained
    assert f"[SEP] {answer}\n" in shown
    assert report["prompt_tokens"]["least"] > 2


def test_check_of_answers_that_are_no_labels_with_an_encoder(retain: Retain, check: Any, tmp_path: Path) -> None:
    check("label", "encoder")
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS["chat"]), encoding="utf-8")
    retain("data", "check", file, "--model", tmp_path / "recipe.yaml").refused("these answers are none")
