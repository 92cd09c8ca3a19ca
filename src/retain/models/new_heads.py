"""New heads of an encoder, which have nothing to keep: every method trains them whole, and saves them with its own.

PEFT's tuners name them in `modules_to_save`, so that `peft` and `transformers` alone load what was saved.
"""

from typing import Any

from peft import PeftConfig
from torch import nn

from retain.models.encoder_classes import new_modules
from retain.models.encoder_heads import beside

__all__ = ["let_heads_train", "trained_heads", "with_heads"]


def let_heads_train(model: nn.Module) -> nn.Module:
    """The model with its new heads trainable, as the last thing that a method does to a frozen one."""
    for name in new_modules(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def trained_heads(model: nn.Module) -> tuple[str, ...]:
    """How the names of their parameters begin."""
    return tuple(f"{name}." for name in new_modules(model))


def with_heads(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """A tuner's configuration that trains new heads whole, and no language model's head beside a classifier."""
    known: dict[str, Any] = vars(config)
    named = config.task_type in ("SEQ_CLS", "TOKEN_CLS")  # PEFT adds `classifier` to the list by itself
    heads = [name for name in new_modules(model) if not (named and name == "classifier")]
    if "modules_to_save" in known and heads:
        known["modules_to_save"] = list(dict.fromkeys([*(known["modules_to_save"] or ()), *heads]))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    whole = [name for name in layers if f"{name}.".startswith(trained_heads(model))]
    if "exclude_modules" in known and not known["exclude_modules"] and (others := [*beside(model), *whole]):
        known["exclude_modules"] = others
    return config
