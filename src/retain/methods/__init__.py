"""Tuning methods: which parameters move."""

from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.methods.method import Method

__all__ = ["METHODS", "Full", "LoRA", "Method"]

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "lora": LoRA,
}
"""Every method by its name in a recipe."""
