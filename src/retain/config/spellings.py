"""The same setting by another tool's name: read as ours, and announced."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from retain.train_config import TrainConfig

__all__ = ["FLAT", "SPELLINGS", "VALUES", "converted", "renamed"]

SPELLINGS: dict[str, str] = {
    # model
    "base": "model",
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    # method
    "adapter": "method.name",
    "fine_tune_type": "method.name",
    "finetuning_type": "method.name",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.r",
    "lora_rank": "method.r",
    "lora_target": "method.target_modules",
    "lora_target_linear": "method.target_modules",
    "lora_target_modules": "method.target_modules",
    "peft_use_dora": "method.use_dora",
    "peft_use_rslora": "method.use_rslora",
    "rank": "method.r",
    "training_type": "method.name",
    "use_dora": "method.use_dora",
    "use_peft": "method.name",
    "use_rslora": "method.use_rslora",
    # strategy
    "buffer_size": "strategy.capacity",
    "mem_size": "strategy.capacity",
    # tasks
    "dataset": "tasks.train",
    "eval_file": "tasks.test",
    "format_type": "tasks.format",
    "path": "tasks.train",
    "test_file": "tasks.test",
    "train_file": "tasks.train",
    "validation_file": "tasks.validation",
    # train
    "batch_size": "train.per_device_train_batch_size",
    "bf16": "train.precision",
    "cutoff_len": "train.max_length",
    "epochs": "train.num_train_epochs",
    "grad_accumulation_steps": "train.gradient_accumulation_steps",
    "iters": "train.max_steps",
    "lr": "train.learning_rate",
    "lr_schedule": "train.lr_scheduler_type",
    "lr_scheduler": "train.lr_scheduler_type",
    "max_seq_length": "train.max_length",
    "micro_batch_size": "train.per_device_train_batch_size",
    "neat_packing": "train.packing",
    "num_epochs": "train.num_train_epochs",
    "sample_packing": "train.packing",
    "sequence_len": "train.max_length",
    # the rest
    "out_dir": "output_dir",
}
"""Other tools' keys, and where the same setting is in a recipe. Only those that mean the same."""

VALUES: dict[str, Mapping[Any, Any]] = {
    "method.name": {True: "lora", False: "full"},
    "method.target_modules": {True: "all-linear", "all": "all-linear"},
    "train.packing": {True: "always", False: "never"},
    "train.precision": {True: "bf16", False: "fp32"},
}
"""Other tools' values of a setting, and ours."""

FLAT = {field.name: f"train.{field.name}" for field in fields(TrainConfig)}
"""TRL puts these at the root: `learning_rate` is `train.learning_rate`."""


def renamed(keys: tuple[str, ...], sections: frozenset[str]) -> tuple[str, ...]:
    """Where a key belongs: `("lr",)` and `("train", "lr")` are `("train", "learning_rate")`; others stay as they are.

    Args:
        keys: from the root of the recipe; list positions as digits.
        sections: the recipe's own keys, which are never another tool's.
    """
    if keys[0] not in sections:
        target = SPELLINGS.get(keys[0], FLAT.get(keys[0], ""))
        return (*target.split("."), *keys[1:]) if target and not target.startswith("tasks.") else keys
    section, _, name = SPELLINGS.get(keys[-1], "").partition(".")
    return (*keys[:-1], name) if len(keys) > 1 and section == keys[0] and name else keys


def converted(keys: tuple[str, ...], value: Any) -> Any:
    """Our value of a setting: `train.packing: true` is `always`."""
    place = ".".join(key for key in keys if not key.isdigit())
    try:
        return VALUES.get(place, {}).get(value, value)
    except TypeError:  # a list or a mapping has no other spelling
        return value
