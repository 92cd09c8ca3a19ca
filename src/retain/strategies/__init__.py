"""What is done so that old abilities survive: one paper a file."""

from retain.strategies.agem import AGEM
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
from retain.strategies.strategy import Strategy
from retain.strategies.ties import TIES

__all__ = ["STRATEGIES", "Strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    "agem": AGEM,
    "der": DER,
    "ewc": EWC,
    "freeze_layers": FreezeLayers,
    "joint": Joint,
    "l2": L2,
    "lamol": LAMOL,
    "lwf": LwF,
    "mas": MAS,
    "olora": OLoRA,
    "osf": OSF,
    "progressive": Progressive,
    "replay": Replay,
    "scholar": Scholar,
    "self_replay": SelfReplay,
    "sequential": Sequential,
    "si": SI,
    "single_task": SingleTask,
    "ssr": SSR,
    "ties": TIES,
    "wise_ft": WiSEFT,
}
"""Every strategy by its name in a recipe. A list of them in a recipe is a `Chain`."""
