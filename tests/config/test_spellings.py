from dataclasses import fields
from typing import Any

import pytest

from retain.config.load import SECTIONS
from retain.config.spellings import SPELLINGS, VALUES, converted, renamed
from retain.data.tasks import TaskConfig
from retain.methods import METHODS
from retain.strategies import STRATEGIES
from retain.train_config import TrainConfig


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        ("base_model", "model"),
        ("model_name_or_path", "model"),
        ("lora_r", "method.r"),
        ("method.lora_rank", "method.r"),
        ("cutoff_len", "train.max_length"),
        ("train.sequence_len", "train.max_length"),
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("micro_batch_size", "train.per_device_train_batch_size"),
        ("tasks.0.train_file", "tasks.0.train"),
        ("finetuning_type", "method.name"),
        # These stay: our own, unknown, or of another section.
        ("train.learning_rate", "train.learning_rate"),
        ("model", "model"),
        ("nonsense", "nonsense"),
        ("strategy.lr", "strategy.lr"),
        ("train_file", "train_file"),
    ],
)
def test_where_a_key_belongs(keys: str, ours: str):
    assert ".".join(renamed(tuple(keys.split(".")), SECTIONS)) == ours


@pytest.mark.parametrize(
    ("keys", "value", "ours"),
    [
        ("train.packing", True, "always"),
        ("train.packing", "auto", "auto"),
        ("train.precision", False, "fp32"),
        ("method.target_modules", "all", "all-linear"),
        ("method.target_modules", ["q_proj"], ["q_proj"]),
        ("method.name", True, "lora"),
        ("train.seed", True, True),
    ],
)
def test_values(keys: str, value: Any, ours: Any):
    assert converted(tuple(keys.split(".")), value) == ours


def field_names(section: str) -> set[str]:
    classes: dict[str, list[type]] = {
        "method": list(METHODS.values()),
        "strategy": list(STRATEGIES.values()),
        "train": [TrainConfig],
        "tasks": [TaskConfig],
    }
    return {field.name for cls in classes.get(section, []) for field in fields(cls)} | {"name"}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_leads_to_a_setting_and_hides_none(spelling: str):
    section, _, name = SPELLINGS[spelling].partition(".")
    assert section in SECTIONS
    assert spelling not in SECTIONS
    assert not name or name in field_names(section)
    assert spelling == name or spelling not in field_names(section)


def test_values_are_of_settings():
    for place in VALUES:
        section, _, name = place.partition(".")
        assert name in field_names(section)
