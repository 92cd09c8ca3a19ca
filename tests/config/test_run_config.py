from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from retain.config.run_config import Budget, ModelConfig, RunConfig, check_compatibility, dump_config, to_tree
from retain.data.tasks import TaskConfig
from retain.errors import CompatibilityError
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.models import FAMILIES
from retain.strategies.chain import Chain, links
from retain.strategies.ewc import EWC
from retain.strategies.replay import Replay
from retain.train_config import TrainConfig


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="smollm2-135m"),
        method=LoRA(r=4),
        strategy=Replay(),
        tasks=(TaskConfig(name="a", train="a.jsonl"),),
        output_dir=Path("runs/a"),
    )


def test_names(config: RunConfig):
    assert (config.method_name, config.strategy_name) == ("lora", "replay")
    chain = replace(config, strategy=Chain(Replay(), EWC()))
    assert chain.strategy_name == "replay + ewc"
    assert links(chain.strategy) == (Replay(), EWC())


def test_every_setting_is_written(config: RunConfig):
    tree = to_tree(config)
    assert tree["method"]["name"] == "lora"
    assert tree["method"]["r"] == 4
    assert tree["train"]["learning_rate"] == TrainConfig().learning_rate
    assert tree["budget"] == {"forgetting": None}
    assert [choice["name"] for choice in to_tree(replace(config, strategy=Chain(Replay(), EWC())))["strategy"]] == [
        "replay",
        "ewc",
    ]
    assert dump_config(config).startswith("title: ''\nmodel:\n  name: smollm2-135m\n")


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_budget_is_a_share(value: float):
    with pytest.raises(ValueError, match="forgetting: expected a share"):
        Budget(forgetting=value)


@dataclass(frozen=True)
class Counting:
    """Stands for a family without gradients whose rows see one another."""

    name = "ngram"
    isolates_documents = False
    needs_gradients = False
    generates = True


def test_choices_that_go_together(config: RunConfig):
    check_compatibility(config, FAMILIES["decoder"]())
    check_compatibility(replace(config, train=TrainConfig(packing="always")), FAMILIES["decoder"]())


def test_changes_that_are_no_products_have_no_importance_as_weights(config: RunConfig):
    """Before a model loads, also inside a chain; each half of the pair goes with others."""
    wrong = replace(config, method=LoRA(use_dora=True), strategy=Chain(Replay(), EWC(space="weights")))
    with pytest.raises(CompatibilityError) as caught:
        check_compatibility(wrong, FAMILIES["decoder"]())
    [problem] = caught.value.problems
    assert problem.startswith("$.strategy: ewc: ")
    assert "DoRA" in problem
    check_compatibility(replace(wrong, method=LoRA()), FAMILIES["decoder"]())
    check_compatibility(replace(wrong, strategy=EWC()), FAMILIES["decoder"]())


def test_every_pair_that_does_not_go_together_is_named(config: RunConfig):
    wrong = replace(config, strategy=EWC(), train=TrainConfig(packing="always"))
    with pytest.raises(CompatibilityError) as caught:
        check_compatibility(wrong, Counting())  # pyright: ignore[reportArgumentType]
    paths = [problem.split(":")[0] for problem in caught.value.problems]
    assert paths == ["$.method", "$.strategy", "$.train.packing"]
    assert "ewc" in caught.value.problems[1]
    check_compatibility(replace(config, method=Full()), FAMILIES["decoder"]())
