import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retain.lineage import Lineage

Retain = Callable[..., Any]


def test_evaluate_a_stage_gives_what_the_run_scored(retain: Retain, lineage: Path, trained: Path) -> None:
    options = ["--data", trained / "colour.test.jsonl", "--no-probes", "--json"]
    for stage in (0, 1, 2):
        scores = json.loads(retain("evaluate", lineage, "--stage", stage, *options).out)
        recorded = Lineage.open(lineage).load_stage(stage).scores["colour"]
        assert scores["colour.test"]["value"] == recorded.value
        assert scores["colour.test"]["metric"] == "accuracy"
        assert scores["colour.test"]["margin"] == pytest.approx(recorded.margin, abs=0.05)  # bf16 where it is quick


def test_evaluate_a_model_as_a_table(retain: Retain, tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    file = trained / "colour.test.jsonl"
    result = retain("evaluate", tiny_model, "--data", file, "--no-probes", "--limit", 4, "--answers", answers)
    assert result.code == 0
    header, row = result.out.splitlines()
    assert header.split() == ["suite", "score", "95", "%", "metric", "rows", "margin"]
    assert row.split()[0] == "colour.test"
    assert "accuracy" in row
    given = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert len(given) == 4
    assert {line["expected"] for line in given} <= {"red", "green", "blue"}


def test_evaluate_something_that_is_not_there(
    retain: Retain, lineage: Path, tiny_model: Path, tmp_path: Path, trained: Path
) -> None:
    retain("evaluate", "smollm2-136m").refused("no model 'smollm2-136m'", "did you mean `smollm2-135m`?")
    retain("evaluate", tmp_path).refused("no config.json")
    retain("evaluate", tiny_model, "--data", tmp_path / "no.jsonl").refused("no.jsonl")
    retain("evaluate", lineage, "--stage", 7).refused("7")
    file = trained / "colour.test.jsonl"
    retain("evaluate", tiny_model, "--data", file, "--metric", "acuracy", "--no-probes").refused(
        "Did you mean `accuracy`?"
    )


def test_report(retain: Retain, lineage: Path, tmp_path: Path) -> None:
    result = retain("report", lineage)
    assert result.code == 0
    assert f"report: {lineage / 'report.html'}" in result.out
    assert "Score matrix" in result.out
    assert "<html" in (lineage / "report.html").read_text(encoding="utf-8")
    retain("report", lineage, "-o", tmp_path / "mine.html")
    assert (tmp_path / "mine.html").stat().st_size > 10_000


def test_compare(retain: Retain, lineage: Path, trained: Path, tmp_path: Path) -> None:
    result = retain("compare", lineage, trained / "out", "-o", tmp_path / "both.html")
    assert result.code == 0
    assert "A  " in result.out
    assert "B  " in result.out
    assert f"A  {lineage.name}" in result.out
    assert "B  out" in result.out, "their folders tell lineages of one recipe apart"
    assert (tmp_path / "both.html").exists()


def test_chat_answers_once(retain: Retain, lineage: Path) -> None:
    first = retain("chat", lineage, "-p", "colour 3", "--max-new-tokens", 5)
    assert first.code == 0
    assert first.err == ""
    assert first.out.strip()
    assert retain("chat", lineage, "-p", "colour 3", "--max-new-tokens", 5) == first


def test_chat_goes_on_until_an_empty_line(retain: Retain, lineage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retain import inference

    asked: list[list[str]] = []

    def answer(target: Any, messages: Any, **options: Any) -> str:
        asked.append([f"{message.role}: {message.content}" for message in messages])
        return f"[b]answer {len(asked)}[/b]"

    said = iter(["one", "two", ""])
    monkeypatch.setattr(inference, "answer", answer)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    result = retain("chat", lineage, "--system", "Be brief.")
    assert result.code == 0
    assert "[b]answer 1[/b]\n" in result.out
    assert asked[1] == ["system: Be brief.", "user: one", "assistant: [b]answer 1[/b]", "user: two"]


def test_columns_are_chosen_by_name_or_inferred(retain: Retain, trained: Path) -> None:
    """A recipe of adapters in columns, from the first command to an answer."""
    out = trained / "columns"
    overrides = ["method=adapter", "strategy=progressive", f"output_dir={out}", "train.num_train_epochs=8"]
    assert retain("train", trained / "recipe.yaml", *overrides, "--json").code == 0
    file = trained / "colour.test.jsonl"
    scores = json.loads(retain("evaluate", out, "--stage", 1, "--data", file, "--no-probes", "--json").out)
    assert {"colour.test", "inferred:colour.test"} == scores.keys()
    ask = ["--prompt", "colour 3", "--max-new-tokens", 3]
    first = retain("chat", out, "--stage", 1, "--task", "colour", *ask)
    last = retain("chat", out, "--task", "colour", *ask)
    assert first.code == last.code == 0
    assert first.out == last.out, "its column has not changed"
    assert retain("chat", out, *ask).out == last.out, "the prompt is the task's own"
    retain("chat", out, "--task", "colours", *ask).refused("no task `colours`", "colour, animal")
    assert retain("rollback", out, 1).code == 0
    assert retain("chat", out, *ask).out == first.out
