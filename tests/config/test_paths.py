from pathlib import Path

import pytest

from retain.config.paths import is_local, located, missing_file


@pytest.mark.parametrize(
    "text", ["rows.jsonl", "a/b.parquet", "./rows", "../x", "/abs/rows", "~/rows", "m.gguf", "there"]
)
def test_local(tmp_path: Path, text: str):
    (tmp_path / "there").mkdir()
    assert is_local(text, tmp_path)


@pytest.mark.parametrize("text", ["ag_news", "owner/name", "owner/name.v2", "smollm2-135m"])
def test_on_a_hub(tmp_path: Path, text: str):
    assert not is_local(text, tmp_path)


def test_paths_start_from_the_root_and_only_paths(tmp_path: Path):
    def at(place: str, value: object) -> object:
        return located(place.split("."), value, tmp_path / "recipes")

    assert at("tasks.0.train", "data/a.jsonl") == str(tmp_path / "recipes" / "data" / "a.jsonl")
    assert at("tasks.0.test", "owner/name") == "owner/name"
    assert at("tasks.0.test", "./saved:test") == f"{tmp_path}/recipes/saved:test"
    assert at("tasks.0.name", "a.jsonl") == "a.jsonl"
    assert at("tasks.0.columns", {"train": "b.jsonl"}) == {"train": "b.jsonl"}
    assert at("tasks.0.train", 3) == 3
    assert at("tasks.0.train", "/else/where.csv") == "/else/where.csv"
    assert at("output_dir", "../runs") == str(tmp_path / "runs")
    assert at("protect_base", "self") == "self"
    assert at("protect_base", "general") == str(tmp_path / "recipes" / "general")
    assert at("model.name", "smollm2-135m") == "smollm2-135m"
    assert at("model.name", "./mine") == str(tmp_path / "recipes" / "mine")


def test_a_missing_file_has_near_names(tmp_path: Path):
    (tmp_path / "train.jsonl").touch()
    assert missing_file(f"{tmp_path}/train.jsonl") == ""
    assert missing_file(f"{tmp_path}:train") == ""
    assert missing_file(f"{tmp_path}/trian.jsonl").endswith("trian.jsonl'. Did you mean `train.jsonl`?")
    assert missing_file(f"{tmp_path}/quite.other").endswith("quite.other'")
    assert missing_file(f"{tmp_path}/no/x.jsonl") == f"no folder {str(tmp_path / 'no')!r}"
