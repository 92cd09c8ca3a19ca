"""Tune language models and keep what they already knew.

    import retain

    lineage = retain.train(retain.load_config(Path("recipe.yaml")).config)
    retain.write_report([lineage.record()], Path("report.html"))

Every name here is loaded when it is first used, so that `import retain` and `retain --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retain.config import RunConfig, load_config
    from retain.data.tasks import TaskConfig
    from retain.errors import RetainError
    from retain.lineage import Lineage
    from retain.methods import METHODS, Full, LoRA, Method
    from retain.models import FAMILIES, Family
    from retain.report import render_html, write_report
    from retain.run import extend, train
    from retain.strategies import STRATEGIES, Strategy
    from retain.strategies.chain import Chain
    from retain.strategies.ewc import EWC
    from retain.strategies.joint import Joint
    from retain.strategies.replay import Replay
    from retain.strategies.sequential import Sequential
    from retain.train_config import TrainConfig
    from retain.trainer import train_task

__all__ = [
    "EWC",
    "FAMILIES",
    "METHODS",
    "STRATEGIES",
    "Chain",
    "Family",
    "Full",
    "Joint",
    "Lineage",
    "LoRA",
    "Method",
    "Replay",
    "RetainError",
    "RunConfig",
    "Sequential",
    "Strategy",
    "TaskConfig",
    "TrainConfig",
    "extend",
    "load_config",
    "render_html",
    "train",
    "train_task",
    "write_report",
]

HOMES = {
    "retain.config": ("RunConfig", "load_config"),
    "retain.data.tasks": ("TaskConfig",),
    "retain.errors": ("RetainError",),
    "retain.lineage": ("Lineage",),
    "retain.methods": ("METHODS", "Full", "LoRA", "Method"),
    "retain.models": ("FAMILIES", "Family"),
    "retain.report": ("render_html", "write_report"),
    "retain.run": ("extend", "train"),
    "retain.strategies": ("STRATEGIES", "Strategy"),
    "retain.strategies.chain": ("Chain",),
    "retain.strategies.ewc": ("EWC",),
    "retain.strategies.joint": ("Joint",),
    "retain.strategies.replay": ("Replay",),
    "retain.strategies.sequential": ("Sequential",),
    "retain.train_config": ("TrainConfig",),
    "retain.trainer": ("train_task",),
}


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'retain' has no attribute {name!r}")
