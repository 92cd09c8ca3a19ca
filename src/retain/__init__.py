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
    from retain.methods import METHODS, Adapter, Columns, Full, LoRA, Method, Prompt
    from retain.models import FAMILIES, Family
    from retain.protection import Protection, protect
    from retain.report import render_html, write_report
    from retain.run import extend, train
    from retain.strategies import STRATEGIES, Strategy
    from retain.strategies.agem import AGEM
    from retain.strategies.chain import Chain
    from retain.strategies.der import DER
    from retain.strategies.ewc import EWC
    from retain.strategies.freeze_layers import FreezeLayers
    from retain.strategies.interpolation import WiSEFT
    from retain.strategies.joint import Joint
    from retain.strategies.l2 import L2
    from retain.strategies.lamol import LAMOL
    from retain.strategies.lwf import LwF
    from retain.strategies.mas import MAS
    from retain.strategies.olora import OLoRA
    from retain.strategies.osf import OSF
    from retain.strategies.progressive import Progressive
    from retain.strategies.replay import Replay
    from retain.strategies.scholar import Scholar
    from retain.strategies.self_replay import SelfReplay
    from retain.strategies.sequential import Sequential
    from retain.strategies.si import SI
    from retain.strategies.single_task import SingleTask
    from retain.strategies.ssr import SSR
    from retain.strategies.ties import TIES
    from retain.train_config import TrainConfig
    from retain.trainer import train_task

__all__ = [
    "AGEM",
    "DER",
    "EWC",
    "FAMILIES",
    "L2",
    "LAMOL",
    "MAS",
    "METHODS",
    "OSF",
    "SI",
    "SSR",
    "STRATEGIES",
    "TIES",
    "Adapter",
    "Chain",
    "Columns",
    "Family",
    "FreezeLayers",
    "Full",
    "Joint",
    "Lineage",
    "LoRA",
    "LwF",
    "Method",
    "OLoRA",
    "Progressive",
    "Prompt",
    "Protection",
    "Replay",
    "RetainError",
    "RunConfig",
    "Scholar",
    "SelfReplay",
    "Sequential",
    "SingleTask",
    "Strategy",
    "TaskConfig",
    "TrainConfig",
    "WiSEFT",
    "extend",
    "load_config",
    "protect",
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
    "retain.methods": ("METHODS", "Adapter", "Columns", "Full", "LoRA", "Method", "Prompt"),
    "retain.models": ("FAMILIES", "Family"),
    "retain.protection": ("Protection", "protect"),
    "retain.report": ("render_html", "write_report"),
    "retain.run": ("extend", "train"),
    "retain.strategies": ("STRATEGIES", "Strategy"),
    "retain.strategies.agem": ("AGEM",),
    "retain.strategies.chain": ("Chain",),
    "retain.strategies.der": ("DER",),
    "retain.strategies.ewc": ("EWC",),
    "retain.strategies.freeze_layers": ("FreezeLayers",),
    "retain.strategies.interpolation": ("WiSEFT",),
    "retain.strategies.joint": ("Joint",),
    "retain.strategies.l2": ("L2",),
    "retain.strategies.lamol": ("LAMOL",),
    "retain.strategies.lwf": ("LwF",),
    "retain.strategies.mas": ("MAS",),
    "retain.strategies.olora": ("OLoRA",),
    "retain.strategies.osf": ("OSF",),
    "retain.strategies.progressive": ("Progressive",),
    "retain.strategies.replay": ("Replay",),
    "retain.strategies.scholar": ("Scholar",),
    "retain.strategies.self_replay": ("SelfReplay",),
    "retain.strategies.sequential": ("Sequential",),
    "retain.strategies.si": ("SI",),
    "retain.strategies.single_task": ("SingleTask",),
    "retain.strategies.ssr": ("SSR",),
    "retain.strategies.ties": ("TIES",),
    "retain.train_config": ("TrainConfig",),
    "retain.trainer": ("train_task",),
}


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'retain' has no attribute {name!r}")
