from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retain.config.recipe import read_recipe, read_value, write_recipe
from retain.errors import ConfigError


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("2.0e-4", 2e-4), ("1E5", 1e5), (".5", 0.5), ("-3.", -3.0), ("12", 12), ("-7", -7),
        ("1_000", 1000),
        ("off", "off"), ("yes", "yes"), ("no", "no"), ("on", "on"), ("true", True), ("False", False), ("null", None),
        ("007", "007"), ("12:30:45", "12:30:45"), ("2026-11-24", "2026-11-24"), ("0x10", "0x10"), ("e5", "e5"),
        (".inf", float("inf")), ("smollm2-135m", "smollm2-135m"), ("[a, 1e-2]", ["a", 0.01]), ("", None),
    ],
)  # fmt: skip
def test_scalars_are_read_as_they_are_meant(text: str, value: object):
    read = read_value(text)
    assert read == value
    assert type(read) is type(value)


def test_a_value_that_is_not_yaml_says_where():
    with pytest.raises(ValueError, match="line 1, column 3"):
        read_value("[a")


def test_keys_given_twice_are_all_reported_and_the_last_counts(recipe):
    tree, duplicates = read_recipe(recipe("model: a\ntrain: {seed: 1, seed: 2}\nmodel: b\n"))
    assert tree == {"model": "b", "train": {"seed": 2}}
    assert sorted(duplicates) == [
        "line 2: `seed` is given twice, first on line 2",
        "line 3: `model` is given twice, first on line 1",
    ]


def test_a_merged_key_is_no_duplicate(recipe):
    tree, duplicates = read_recipe(recipe("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"))
    assert tree["b"] == {"x": 1, "y": 3}
    assert duplicates == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: [a\n", "line 2, column 1"), ("- a\n", "got list"), ("", "got empty"), ("text\n", "got str"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(recipe, text: str, says: str):
    with pytest.raises(ConfigError, match=says):
        read_recipe(recipe(text))


def test_a_missing_recipe_names_those_that_are_there(recipe):
    there = recipe("model: a\n")
    with pytest.raises(ConfigError, match=r"has: recipe\.yaml"):
        read_recipe(there.with_name("receipt.yaml"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_recipe(path)


leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
words = st.sampled_from(
    ["off", "yes", "1e-4", "0123", "null", "~", "1_0", ".5", "12:30", "2026-01-01", "<<", "=", "- a", "a: b", "#", ""]
)
values = st.recursive(
    leaf | words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@given(st.dictionaries(st.text(min_size=1, max_size=8) | words, values, max_size=4))
def test_what_is_written_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(write_recipe(tree), encoding="utf-8")
    if tree:
        assert read_recipe(path) == (tree, [])
