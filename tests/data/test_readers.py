import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from retain.data.readers import READERS, read_rows
from retain.errors import DataError

ROWS = [{"prompt": "Hà Nội?", "completion": "yes"}, {"prompt": 'a\n"b",\tc', "completion": "no"}]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(folder: Path, ending: str) -> str:
    path = folder / f"rows{ending}"
    match ending:
        case ".jsonl" | ".ndjson":
            return write(path, lines(ROWS))
        case ".json":
            return write(path, json.dumps(ROWS))
        case ".csv":
            return write(path, 'prompt,completion\nHà Nội?,yes\n"a\n""b"",\tc",no\n')
        case ".tsv":
            return write(path, 'prompt\tcompletion\nHà Nội?\tyes\n"a\n""b"",\tc"\tno\n')
        case _:
            parquet.write_table(pa.Table.from_pylist(ROWS), path)
            return str(path)


@pytest.mark.parametrize("ending", READERS)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, ending: str):
    assert read_rows(written(tmp_path, ending)) == ROWS
    assert read_rows(f"rows{ending}", root=tmp_path) == ROWS


def test_json_spellings(tmp_path: Path):
    assert read_rows(write(tmp_path / "a.json", json.dumps({"data": ROWS, "version": 1}))) == ROWS
    assert read_rows(write(tmp_path / "b.json", lines(ROWS))) == ROWS
    assert read_rows(write(tmp_path / "c.JSONL", "\ufeff" + lines(ROWS) + "\n\n")) == ROWS
    with pytest.raises(DataError, match=r'\{"data": \[row, \.\.\.\]\}'):
        read_rows(write(tmp_path / "d.json", '{"rows": []}'))
    with pytest.raises(DataError, match="line 2: Expecting"):
        read_rows(write(tmp_path / "e.json", "[\n{,}]"))


def test_a_line_separator_of_unicode_does_not_end_a_json_line(tmp_path: Path):
    assert read_rows(write(tmp_path / "a.jsonl", '{"text": "a\u2028b"}\n')) == [{"text": "a\u2028b"}]


def test_broken_json_lines_are_named_with_their_text(tmp_path: Path):
    broken = [f'{{"prompt": {k}' for k in range(7)]
    path = write(tmp_path / "a.jsonl", lines(ROWS) + "\n".join(broken))
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.message == f"{path} has 7 lines that are not JSON"
    assert caught.value.problems[0].startswith("line 3: Expecting")
    assert caught.value.problems[0].endswith('{"prompt": 0')
    assert caught.value.problems[-1] == "... and 2 more"


def test_a_row_that_is_no_object(tmp_path: Path):
    with pytest.raises(DataError, match=r"row 2 is no object of columns\n  found \['a'\]"):
        read_rows(write(tmp_path / "a.jsonl", '{"text": "a"}\n["a"]\n'))


@pytest.mark.parametrize(("line", "found"), [("a", 1), ("a,b,c", 3), ("a,b,c,d", 4)])
def test_a_csv_row_of_another_width(tmp_path: Path, line: str, found: int):
    with pytest.raises(DataError, match=rf"row 2 \(to line 3\) has {found} values\n.*2 columns: prompt, completion"):
        read_rows(write(tmp_path / "a.csv", f"prompt,completion\nq,a\n{line}\n"))


def test_csv_quotes_and_long_fields(tmp_path: Path):
    assert read_rows(write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n")) == [{"text": "x" * 200_000}]
    with pytest.raises(DataError, match="the row after line 1 cannot be read: unexpected end"):
        read_rows(write(tmp_path / "b.csv", 'text\n"open\n'))


def test_files_that_hold_something_else(tmp_path: Path):
    for ending in (".jsonl", ".json", ".csv"):
        (tmp_path / f"a{ending}").write_bytes("text\nHà Nội".encode("utf-16"))
        with pytest.raises(DataError, match="is not UTF-8 text\n  byte 0"):
            read_rows(str(tmp_path / f"a{ending}"))
    with pytest.raises(DataError, match="is not a Parquet file"):
        read_rows(write(tmp_path / "a.parquet", "text"))
    with pytest.raises(DataError, match=r"files that end in '\.xlsx' cannot be read\n  allowed: \.jsonl"):
        read_rows(write(tmp_path / "a.xlsx", ""))


@pytest.mark.parametrize(
    ("ending", "text"), [(".jsonl", "\n"), (".json", "[]"), (".csv", "prompt,completion\n"), (".csv", "")]
)
def test_no_rows(tmp_path: Path, ending: str, text: str):
    with pytest.raises(DataError, match="has no rows"):
        read_rows(write(tmp_path / f"a{ending}", text))


def test_a_missing_file_is_told_with_its_neighbours(tmp_path: Path):
    write(tmp_path / "train.jsonl", lines(ROWS))
    write(tmp_path / "notes.txt", "")
    with pytest.raises(DataError) as caught:
        read_rows("trian.jsonl", root=tmp_path)
    assert caught.value.problems == (f"data files in {tmp_path}: train.jsonl",)
    assert caught.value.hint == "did you mean train.jsonl?"
    with pytest.raises(DataError, match=f"nor does the folder {tmp_path / 'no'}"):
        read_rows("no/train.jsonl", root=tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_rows("train", root=tmp_path)


def test_a_file_has_no_splits(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", lines(ROWS))
    for call in (lambda: read_rows(path, split="test"), lambda: read_rows(f"{path}:test")):
        with pytest.raises(DataError, match="a file has no splits, got split 'test'"):
            call()
    assert read_rows(write(tmp_path / "a:b.jsonl", lines(ROWS))) == ROWS


def labelled() -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    return datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 0, None, -1]}, features=features)


NAMED = [
    {"text": "a", "label": "good"},
    {"text": "b", "label": "bad"},
    {"text": "c", "label": None},
    {"text": "d", "label": None},
]


def test_saved_data_sets(tmp_path: Path):
    labelled().save_to_disk(str(tmp_path / "one"))
    assert read_rows("one", root=tmp_path) == NAMED
    with pytest.raises(DataError, match="has no splits"):
        read_rows("one:test", root=tmp_path)
    datasets.DatasetDict({"train": labelled(), "test": labelled().select([1])}).save_to_disk(str(tmp_path / "two"))
    assert read_rows("two", root=tmp_path) == NAMED
    assert read_rows("two:test", root=tmp_path) == read_rows("two", split="test", root=tmp_path) == NAMED[1:2]
    with pytest.raises(DataError, match="has no split 'dev'\n  allowed: train, test"):
        read_rows("two:dev", root=tmp_path)
    datasets.DatasetDict({"a": labelled(), "b": labelled()}).save_to_disk(str(tmp_path / "three"))
    with pytest.raises(DataError, match=r"which split\?\n  allowed: a, b"):
        read_rows("three", root=tmp_path)


def test_a_folder_of_something_else(tmp_path: Path):
    write(tmp_path / "train.jsonl", lines(ROWS))
    with pytest.raises(DataError, match=r"files in it that can be read: train\.jsonl"):
        read_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name/main:test", ("owner/name", "main", "test")),
        ("owner/name:train[:10%]", ("owner/name", None, "train[:10%]")),
    ],
)
def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None, str]):
    calls: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        return labelled()

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows(source) == NAMED
    assert calls == [asked]


def test_a_hub_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    def get_dataset_split_names(name: str, config: str | None) -> list[str]:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist")

    monkeypatch.setattr(datasets, "get_dataset_split_names", get_dataset_split_names)
    with pytest.raises(DataError, match="owner/name is neither a file here nor") as caught:
        read_rows("owner/name")
    assert "doesn't exist" in caught.value.problems[0]
