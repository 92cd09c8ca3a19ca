"""Rows from a file, a saved data set or a hub data set, as dictionaries.

train.jsonl  train.json  train.csv  train.tsv  train.parquet     by their ending
saved/  saved:test                                               a folder of `datasets.save_to_disk`, and its split
owner/name  owner/name:test  owner/name/config:test              a data set of the hub, and its split
"""

import csv
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from retain.errors import DataError

__all__ = ["READERS", "Row", "read_rows"]

Row = dict[str, Any]

_NUM_SHOWN = 5  # problems that an error lists; the rest are counted
_SPLIT = re.compile(r"(?P<name>.+):(?P<split>\w+(\[[^\]]*\])?)")
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<config>[\w.-]+))?")


def read_rows(source: str, *, split: str | None = None, root: Path | None = None) -> list[Row]:
    """All rows of a source.

    Args:
        source: a path or the id of a hub data set; `:split` may follow a saved or hub data set.
        split: the split of a saved or hub data set; where neither names one, `train`, or the only one.
        root: the folder that a relative path starts from; the working directory where not given.

    Returns:
        One dictionary a row, at least one.

    Raises:
        DataError: the source is missing, empty, or not what its ending says.
    """
    name, named_split = _cut_split(source, root)
    split = split or named_split
    path = (root or Path()) / name
    if path.is_dir():
        rows = _read_saved(path, split)
    elif path.is_file() or path.suffix.lower() in READERS:
        rows = _read_file(path, split)
    elif (hub := _HUB.fullmatch(name)) and not name.startswith("."):
        rows = _read_hub(hub["name"], hub["config"], split)
    else:
        raise _missing(path)
    if not rows:
        raise DataError(f"{source} has no rows", hint="at least one row is needed")
    return rows


def _read_file(path: Path, split: str | None) -> list[Row]:
    if not path.is_file():
        raise _missing(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files that end in {path.suffix or 'nothing'!r} cannot be read",
            problems=[f"allowed: {', '.join(READERS)}, a folder of `datasets.save_to_disk`, a hub data set"],
        )
    if split is not None:
        raise DataError(f"{path}: a file has no splits, got split {split!r}", hint="name the split's own file")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text",
            problems=[f"byte {error.start}: {error.object[error.start : error.start + 8]!r}"],
            hint="save it as UTF-8",
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  # JSON may hold anything
            raise DataError(
                f"{path}: row {number} is no object of columns",
                problems=[f"found {_shown(row)}; allowed: {{'column': value, ...}}"],
            )
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    return _json_lines(path, path.read_text(encoding="utf-8-sig"))


def _json_lines(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: {error.msg} at character {error.colno}: {_shown(line)}")
    if problems:
        raise DataError(
            f"{path} has {len(problems)} {'lines that are' if len(problems) > 1 else 'line that is'} not JSON",
            problems=[*problems[:_NUM_SHOWN], *_and_more(len(problems))],
            hint="each line must be one JSON object, without line breaks inside",
        )
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under another name
            return _json_lines(path, text)
        line = text.split("\n")[error.lineno - 1] if text else ""
        raise DataError(
            f"{path} is not JSON", problems=[f"line {error.lineno}: {error.msg}: {_shown(line)}"]
        ) from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f"{path} holds {_shown(content)}", problems=['allowed: [row, ...] or {"data": [row, ...]}'])
    return content


def _read_csv(path: Path) -> list[Row]:
    return _separated(path, ",")


def _read_tsv(path: Path) -> list[Row]:
    return _separated(path, "\t")


def _separated(path: Path, delimiter: str) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
        rows: list[Row] = []
        try:
            for row in reader:
                if "" in row or None in row.values():
                    found = len([value for key, value in row.items() if key and value is not None])
                    found += len(row.get("") or [])
                    columns = list(reader.fieldnames or [])
                    raise DataError(
                        f"{path}: row {len(rows) + 1} (to line {reader.line_num}) has {found} values",
                        problems=[f"the header has {len(columns)} columns: {', '.join(columns)}"],
                        hint='put a value that holds the separator or a line break in "double quotes"',
                    )
                rows.append(dict(row))
        except csv.Error as error:
            raise DataError(f"{path}: the row after line {reader.line_num} cannot be read: {error}") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file", problems=[str(error)]) from error


READERS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
"""How a file is read, by its ending."""


def _read_saved(path: Path, split: str | None) -> list[Row]:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        names = sorted(child.name for child in path.iterdir() if child.suffix in READERS)
        raise DataError(
            f"{path} is a folder, but not one of `datasets.save_to_disk`",
            problems=[f"files in it that can be read: {', '.join(names) or 'none'}"],
        )
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        return _rows(loaded[_choose_split(str(path), [str(name) for name in loaded], split)])
    if split is not None:
        raise DataError(f"{path} has no splits, got split {split!r}")
    return _rows(loaded)


def _read_hub(name: str, config: str | None, split: str | None) -> list[Row]:
    import datasets

    try:
        splits = datasets.get_dataset_split_names(name, config)
        chosen = split if split and "[" in split else _choose_split(name, splits, split)
        return _rows(datasets.load_dataset(name, config, split=chosen))
    except (OSError, ValueError) as error:  # not found, no network, a configuration that must be named
        raise DataError(
            f"{name} is neither a file here nor a data set that the hub gives",
            problems=[f"{type(error).__name__}: {str(error).splitlines()[0]}"],
            hint="a path is relative to the recipe; a hub data set is owner/name, owner/name:split "
            "or owner/name/config:split",
        ) from error


def _rows(dataset: Any) -> list[Row]:
    """The rows of a `datasets.Dataset`, with the names of class labels instead of their numbers."""
    import datasets

    rows: list[Row] = dataset.to_list()
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                number = row[column]
                row[column] = None if number is None or number < 0 else feature.int2str(number)  # -1: not labelled
    return rows


def _choose_split(name: str, splits: Sequence[str], split: str | None) -> str:
    if split is None:
        if "train" in splits:
            return "train"
        if len(splits) == 1:
            return splits[0]
    elif split in splits:
        return split
    raise DataError(
        f"{name}: which split?" if split is None else f"{name} has no split {split!r}",
        problems=[f"allowed: {', '.join(splits)}"],
        hint=f"write `{name}:{splits[0]}`",
    )


def _cut_split(source: str, root: Path | None) -> tuple[str, str | None]:
    """`name:split` as its parts; a path that exists as it is has no split."""
    match = _SPLIT.fullmatch(source)
    if match is None or ((root or Path()) / source).exists():
        return source, None
    return match["name"], match["split"]


def _missing(path: Path) -> DataError:
    """The error for a file that is not there, with the names that are near."""
    folder = path.parent
    if not folder.is_dir():
        return DataError(
            f"{path} does not exist", problems=[f"nor does the folder {folder}"], hint="give the path of a file"
        )
    names = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
    near = get_close_matches(path.name, names, n=1, cutoff=0.5)
    readable = [name for name in names if Path(name).suffix in READERS]
    return DataError(
        f"{path} does not exist",
        problems=[f"data files in {folder}: {', '.join(readable[:10]) or 'none'}"],
        hint=f"did you mean {near[0]}?" if near else "give the path of a file",
    )


@contextmanager
def _long_fields() -> Generator[None]:
    """Lift `csv`'s limit of 128 kB a field, which texts exceed."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else value.strip()
    return text if len(text) <= 80 else text[:80] + "..."


def _and_more(count: int) -> list[str]:
    return [f"... and {count - _NUM_SHOWN} more"] if count > _NUM_SHOWN else []
