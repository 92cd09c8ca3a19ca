from pathlib import Path

import pytest

from retain.config.load import SECTIONS
from retain.config.tree import Tree, json_path, leaves, read_tree


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "shell").mkdir()
    monkeypatch.chdir(tmp_path / "shell")

    def run(text: str = "", *overrides: str) -> Tree:
        path = tmp_path / "recipes" / "r.yaml"
        path.write_text(text or "title: t\n", encoding="utf-8")
        return read_tree(path, overrides, SECTIONS)

    return run


def test_choices_by_name_alone(read):
    tree = read("model: m\nmethod: full\nstrategy: [ewc, {name: replay, ratio: 0.1}]\n")
    assert tree.values == {
        "model": {"name": "m"},
        "method": {"name": "full"},
        "strategy": [{"name": "ewc"}, {"name": "replay", "ratio": 0.1}],
    }
    assert tree.problems == []
    assert tree.notes == []


def test_other_spellings_are_understood_and_announced(read):
    tree = read("base_model: m\nlora_r: 8\nlearning_rate: 1e-4\ntrain: {cutoff_len: 64}\nsample_packing: true\n")
    assert tree.values == {
        "model": {"name": "m"},
        "method": {"r": 8},
        "train": {"learning_rate": 1e-4, "max_length": 64, "packing": "always"},
    }
    assert tree.notes == [
        "`base_model: m` is read as `model: m`",
        "`lora_r: 8` is read as `method.r: 8`",
        "`learning_rate: 0.0001` is read as `train.learning_rate: 0.0001`",
        "`train.cutoff_len: 64` is read as `train.max_length: 64`",
        "`sample_packing: true` is read as `train.packing: always`",
    ]


@pytest.mark.parametrize(
    "text", ["lora_r: 8\nmethod: {name: lora, alpha: 4}\n", "method: {name: lora, alpha: 4}\nlora_r: 8\n"]
)
def test_a_spelling_adds_to_its_section_wherever_it_stands(read, text: str):
    assert read(text).values == {"method": {"name": "lora", "alpha": 4, "r": 8}}


def test_one_setting_in_two_spellings_is_a_problem(read):
    tree = read("lr: 1\ntrain: {learning_rate: 2}\n", "train.seed=1", "seed=2")
    assert tree.problems == ["$.train.learning_rate: given twice", "$.train.seed: given twice"]


def test_flags_win_and_are_remembered(read):
    tree = read(
        "model: m\nstrategy: [replay, ewc]\ntrain: {seed: 1, max_length: 64}\n",
        "train.seed=2", "strategy.0.ratio=0.2", "lora_r=4", "budget.forgetting=0.1",
    )  # fmt: skip
    assert tree.problems == []
    assert tree.values["train"] == {"seed": 2, "max_length": 64}
    assert tree.values["strategy"] == [{"name": "replay", "ratio": 0.2}, {"name": "ewc"}]
    assert tree.values["method"] == {"r": 4}
    assert tree.origin(("train", "seed")) == "flag"
    assert tree.origin(("train", "max_length")) == "recipe"
    assert tree.origin(("train", "max_steps")) == "default"
    assert tree.origin(("strategy", "0", "ratio")) == "flag"
    assert tree.origin(("strategy", "0", "name")) == "recipe"
    assert tree.origin(("strategy", "1", "strength")) == "default"


def test_a_whole_choice_replaces_the_recipes(read):
    tree = read("method: {name: lora, r: 8}\nstrategy: [replay, ewc]\n", "method=full", "strategy=[ewc]")
    assert tree.values["method"] == {"name": "full"}
    assert tree.values["strategy"] == [{"name": "ewc"}]
    assert tree.origin(("method", "r")) == "default"
    assert tree.problems == []


def test_the_order_of_flags_does_not_matter(read):
    forward, back = (
        read("method: full\n", *flags) for flags in (("lora_r=8", "method=lora"), ("method=lora", "lora_r=8"))
    )
    assert forward.values["method"] == back.values["method"] == {"name": "lora", "r": 8}


def test_tasks_by_flags_alone(read):
    tree = read("", "tasks.0.name=a", "tasks.0.train=a.jsonl", "tasks.1.name=b")
    assert [task["name"] for task in tree.values["tasks"]] == ["a", "b"]
    assert tree.problems == []


def test_paths_start_from_the_recipe_or_from_the_shell(read, tmp_path: Path):
    tree = read("output_dir: runs\ntasks: [{name: a, train: a.jsonl}]\n", "tasks.0.test=b.jsonl")
    assert tree.values["output_dir"] == str(tmp_path / "recipes" / "runs")
    assert tree.values["tasks"][0]["train"] == str(tmp_path / "recipes" / "a.jsonl")
    assert tree.values["tasks"][0]["test"] == str(tmp_path / "shell" / "b.jsonl")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.seed", "'train.seed': expected key=value, like train.learning_rate=1e-4"),
        ("=3", "'=3': expected key=value, like train.learning_rate=1e-4"),
        ("train..seed=3", "'train..seed=3': expected key=value, like train.learning_rate=1e-4"),
        ("title=[a", "'title=[a': the value is not YAML: line 1, column 3:"),
        ("trian.seed=3", "$.trian.seed: unknown key. Did you mean `train`?"),
        ("leraning_rate=3", "$.leraning_rate: unknown key. Did you mean `learning_rate`?"),
        ("strategy.5.ratio=1", "$.strategy[5].ratio: there is no such place; $.strategy is a list of 2"),
        ("strategy.ratio=1", "$.strategy.ratio: there is no such place; $.strategy is a list of 2"),
        ("model.0.name=1", "$.model[0].name: there is no such place; $.model is no list"),
        ("title.x=1", "$.title.x: there is no such place; $.title is no list"),
    ],
)
def test_an_override_that_fits_nowhere(read, override: str, says: str):
    tree = read("title: t\nmodel: m\nstrategy: [replay, ewc]\n", override)
    assert len(tree.problems) == 1
    assert tree.problems[0].startswith(says)


def test_an_empty_section_is_none(read):
    assert read("train:\nmodel: m\n").values == {"model": {"name": "m"}}


def test_leaves_and_paths():
    tree = {"a": {"b": 1}, "c": [{"d": 2}, {"d": [3, 4]}], "e": [], "f": None}
    assert list(leaves(tree)) == [("a", "b"), ("c", "0", "d"), ("c", "1", "d"), ("e",), ("f",)]
    assert json_path(("tasks", "0", "train")) == "$.tasks[0].train"
