from pathlib import Path

import pytest

from retain.config.load import SECTIONS, load_config, settings
from retain.config.run_config import dump_config
from retain.errors import ConfigError
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.strategies.chain import Chain
from retain.strategies.ewc import EWC
from retain.strategies.replay import Replay

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

RECIPE = """
model: smollm2-135m
method: {name: lora, r: 16, alpha: 32}
strategy: [{name: replay, ratio: 0.05}, {name: ewc, strength: 1.0}]
protect_base: self
tasks:
  - {name: desk, train: desk.train.jsonl, test: desk.test.jsonl, metric: accuracy}
  - {name: menus, train: menus.train.jsonl}
train: {learning_rate: 2.0e-4, num_train_epochs: 1, max_length: 512, seed: 0}
budget: {forgetting: 0.05}
output_dir: runs/desk
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("desk.train.jsonl", "desk.test.jsonl", "menus.train.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


@pytest.fixture
def recipe(folder: Path):
    def write(text: str = RECIPE) -> Path:
        path = folder / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.hint
    return list(caught.value.problems)


def test_the_recipe_of_the_design(recipe, folder: Path):
    loaded = load_config(recipe(), ["train.learning_rate=1e-4", "strategy.0.ratio=0.1"])
    config = loaded.config
    assert config.model.name == "smollm2-135m"
    assert config.method == LoRA(r=16, alpha=32)
    assert isinstance(config.strategy, Chain)
    assert config.strategy.strategies == (Replay(ratio=0.1), EWC(strength=1.0))
    assert [task.name for task in config.tasks] == ["desk", "menus"]
    assert config.tasks[0].train == str(folder / "desk.train.jsonl")
    assert config.train.learning_rate == 1e-4
    assert config.budget.forgetting == 0.05
    assert config.output_dir == folder / "runs" / "desk"
    assert loaded.notes == ()
    assert loaded.sources["train.learning_rate"] == "flag"
    assert loaded.sources["strategy.0.ratio"] == "flag"
    assert loaded.sources["strategy.1.strength"] == "recipe"
    assert loaded.sources["train.weight_decay"] == "default"
    assert loaded.sources["tasks.0.train"] == "recipe"


def test_settings_have_a_value_and_a_source(recipe):
    loaded = load_config(recipe(), ["train.seed=3"])
    found = settings(loaded.config, loaded.sources)
    assert found["train.seed"] == {"value": 3, "source": "flag"}
    assert found["strategy.1.strength"] == {"value": 1.0, "source": "recipe"}
    assert found["tasks.1.metric"] == {"value": "auto", "source": "default"}
    assert settings(loaded.config, {})["train.seed"] == {"value": 3, "source": "given"}


def test_defaults_protect(folder: Path):
    loaded = load_config(
        None, ["model=m", "tasks.0.name=a", f"tasks.0.train={folder}/desk.train.jsonl", "output_dir=x"]
    )
    assert loaded.config.method == LoRA()
    assert loaded.config.strategy == Replay()
    assert loaded.config.protect_base == "self"
    assert loaded.sources["strategy.name"] == "default"


def test_what_is_dumped_loads_as_the_same_from_anywhere(recipe, tmp_path: Path):
    config = load_config(recipe()).config
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    again = load_config(elsewhere / "config.yaml").config
    assert dump_config(again) == dump_config(config)
    assert (again.method, again.tasks, again.train) == (config.method, config.tasks, config.train)
    assert again.output_dir == config.output_dir


def test_the_error_of_the_design(recipe):
    path = recipe(
        RECIPE.replace("{name: ewc, strength: 1.0}", "{name: ewc, strenght: 1.0}").replace("r: 16", "r: eight")
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).splitlines() == [
        "recipe.yaml has 2 problems",
        '  $.method.r: expected a whole number above 0, got "eight"',
        "  $.strategy[1].strenght: unknown key. Did you mean `strength`?",
        "hint: `retain list lora` shows every field with its default",
    ]


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("strategy.1.x=1", "retain list ewc"),
        ("strategy.0.name=x", "retain list strategies"),
        ("strategy.7.name=x", "retain list strategies"),
        ("method.x=1", "retain list lora"),
        ("method=x", "retain list methods"),
        ("train.x=1", "retain init"),
    ],
)
def test_the_way_out_fits_the_problem(recipe, override: str, way_out: str):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(), [override])
    assert f"`{way_out}`" in caught.value.hint


def test_every_problem_at_once(recipe):
    text = """
model: {name: m, famly: decoder}
method: {name: lorra}
strategy: [replay, {name: ewc, strength: -1}]
tasks:
  - {name: desk, train: desk.tarin.jsonl}
  - {name: desk, train: desk.train.jsonl, test: 3}
  - {name: desk, train: menus.train.jsonl}
  - {name: kl, train: menus.train.jsonl, metric: acuracy}
train: {learning_rate: fast, max_length: 0, warmup_ratio: 2, lerning_rate: 1}
budget: {forgetting: 5}
protect_base: general.jsonl
typo: 1
"""
    problems = problems_of(recipe(text))
    paths = {problem.split(":")[0] for problem in problems}
    assert paths == {
        "$.model.famly", "$.method.name", "$.strategy[1].strength", "$.tasks[0].train", "$.tasks[1].name",
        "$.tasks[1].test", "$.tasks[2].name", "$.tasks[3].name", "$.train.learning_rate", "$.train.max_length",
        "$.train.warmup_ratio", "$.train.lerning_rate", "$.budget.forgetting", "$.protect_base", "$.typo",
        "$.output_dir", "$.tasks[3].metric",
    }  # fmt: skip
    assert len(problems) == len(paths)
    assert any("Did you mean `desk.train.jsonl`?" in problem for problem in problems)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model=3", "$.model: got 3; expected a folder"),
        ("method=3", "$.method: expected the name of a method"),
        ("strategy=[]", "$.strategy: expected a strategy or a list of them"),
        ("strategy={ratio: 0.1}", "$.strategy.name: expected the name of a strategy, got null"),
        ("tasks=[]", "$.tasks: got []; expected a list of tasks"),
        ("tasks=[a]", '$.tasks[0]: expected a task with `name` and `train`, got "a"'),
        ("train=3", "$.train: expected keys with values, got 3"),
        ("title=3", "$.title: expected text, got 3"),
        ("protect_rows=many", '$.protect_rows: expected a whole number, got "many"'),
        ("protect_rows=0", "$.protect_rows: expected a whole number above 0, got 0"),
        (
            "model.cell=lstm",
            "$.model.cell: unknown key. Allowed: family, name, template, trust_remote_code, and with `family`",
        ),
        ("model.family=decodr", "$.model.family: no family `decodr`. Did you mean `decoder`?"),
        ("model.family=3", "$.model.family: expected the name of a family, got 3"),
    ],
)
def test_a_section_that_is_none(recipe, override: str, says: str):
    problems = problems_of(recipe(), override)
    assert len(problems) == 1
    assert problems[0].startswith(says)


def test_nothing_at_all_says_what_is_needed():
    assert {problem.split(":")[0] for problem in problems_of(None)} == {"$.model", "$.tasks", "$.output_dir"}


def test_a_recipe_of_another_tool(folder: Path):
    path = folder / "axolotl.yaml"
    path.write_text(
        "base_model: smollm2-135m\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
        "sequence_len: 256\nsample_packing: false\nmicro_batch_size: 2\ngradient_accumulation_steps: 4\n"
        "num_epochs: 3\nlearning_rate: 2e-4\nlr_scheduler: cosine\nbf16: true\noutput_dir: out\n"
        "tasks: [{name: a, path: desk.train.jsonl}]\n"
    )
    loaded = load_config(path)
    config = loaded.config
    assert config.method == LoRA(r=8, alpha=16, target_modules="all-linear")
    assert (config.train.max_length, config.train.packing, config.train.precision) == (256, "never", "bf16")
    assert (config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps) == (2, 4)
    assert (config.train.num_train_epochs, config.train.lr_scheduler_type) == (3.0, "cosine")
    assert len(loaded.notes) == 14
    assert loaded.sources["train.max_length"] == "recipe"


def test_files_need_not_exist_where_the_lineage_has_them(recipe, folder: Path):
    path = recipe()
    (folder / "desk.train.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"\$\.tasks\[0\]\.train: no file"):
        load_config(path)
    assert load_config(path, check_files=False).config.tasks[0].name == "desk"


def test_every_section_has_an_effect(recipe, folder: Path):
    """A setting that is accepted and ignored is the worst kind of error."""
    config = load_config(
        recipe(), ["protect_rows=7", "title=t", "protect_base=desk.train.jsonl"], check_files=False
    ).config
    assert (config.protect_rows, config.title, Path(config.protect_base).name) == (7, "t", "desk.train.jsonl")
    assert set(vars(config)) == SECTIONS


def test_the_method_alone(recipe):
    assert load_config(recipe(), ["method=full"]).config.method == Full()


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours_is_right(path: Path):
    loaded = load_config(path)
    assert loaded.notes == ()
    assert loaded.config.title
    for task in loaded.config.tasks:
        assert Path(task.train).is_file()
        assert task.test
