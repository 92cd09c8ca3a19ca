"""Tuning methods: which parameters move."""

from retain.methods.adapter import Adapter
from retain.methods.columns import Columns
from retain.methods.freeze import Freeze
from retain.methods.full import Full
from retain.methods.ia3 import IA3
from retain.methods.lora import LoRA
from retain.methods.method import Method
from retain.methods.oft import OFT
from retain.methods.p_tuning import Ptuning
from retain.methods.peft import Peft
from retain.methods.prefix import Prefix
from retain.methods.prompt import Prompt
from retain.methods.qlora import QLoRA

__all__ = [
    "IA3",
    "METHODS",
    "OFT",
    "Adapter",
    "Columns",
    "Freeze",
    "Full",
    "LoRA",
    "Method",
    "Peft",
    "Prefix",
    "Prompt",
    "Ptuning",
    "QLoRA",
]

METHODS: dict[str, type[Method]] = {
    "adapter": Adapter,
    "columns": Columns,
    "freeze": Freeze,
    "full": Full,
    "ia3": IA3,
    "lora": LoRA,
    "oft": OFT,
    "p_tuning": Ptuning,
    "peft": Peft,
    "prefix": Prefix,
    "prompt": Prompt,
    "qlora": QLoRA,
}
"""Every method by its name in a recipe."""
