"""Tuning methods: which parameters move."""

from retain.methods.adapter import Adapter
from retain.methods.columns import Columns
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.methods.method import Method
from retain.methods.prompt import Prompt

__all__ = ["METHODS", "Adapter", "Columns", "Full", "LoRA", "Method", "Prompt"]

METHODS: dict[str, type[Method]] = {
    "adapter": Adapter,
    "columns": Columns,
    "full": Full,
    "lora": LoRA,
    "prompt": Prompt,
}
"""Every method by its name in a recipe."""
