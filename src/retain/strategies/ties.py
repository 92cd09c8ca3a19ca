"""TIES merging: each task is learned alone from the base model, and the changes are merged where they agree.

    change_t = theta_t - theta_base, all but its largest entries set to 0                          trim
    sign = sgn(sum over t of change_t)                                                             elect
    merged = mean over those t whose entry has that sign                                           disjoint mean
    theta = theta_base + scale * merged

Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708, section 4 and algorithm 1.
Differs: where the changes cancel exactly, the base model's value stays.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from retain.parameters import copied, known_rows, put_back
from retain.strategies.strategy import State, Strategy, TaskView

__all__ = ["TIES", "merged", "trimmed"]


@dataclass
class TIES(Strategy):
    """Train each task from the base model; after it, merge the changes of all tasks.

    Args:
        density: the share of each task's change that is kept, by size and over all weights together, in (0, 1].
        scale: lambda, what the merged change is multiplied by, above 0.

    Under LoRA the change is that of A and B. Memory: a copy of what moves, and for each task 8 bytes (float32 and its
    place as int32) for each entry kept: 1.6 bytes a trained weight at 0.2.
    """

    name: ClassVar[str] = "ties"
    reference: ClassVar[str] = "https://arxiv.org/abs/2306.01708"
    remembers: ClassVar[bool] = False  # nothing of the base model but its weights, which the first task finds
    stands_alone: ClassVar[bool] = True

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density: expected a share in (0, 1], got {self.density}")
        if not self.scale > 0:
            raise ValueError(f"scale: expected a number above 0, got {self.scale}")
        self.start: dict[str, Tensor] = {}  # the base model's weights
        self.changes: list[dict[str, tuple[Tensor, Tensor]]] = []  # of each task: places in the flat weight, entries

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Put the base model's weights back; rows that the model has grown since keep their values."""
        if not self.start:
            self.start = copied(model)
        put_back(model, self.start)
        return model

    @torch.no_grad()
    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Keep the task's change, trimmed, and give the model the merge of all."""
        if not self.start:  # the base model itself
            return
        now = {name: known_rows(model.get_parameter(name), start) for name, start in self.start.items()}
        change = trimmed({name: now[name] - start for name, start in self.start.items()}, density=self.density)
        self.changes.append({name: sparse(value) for name, value in change.items()})
        for name, start in self.start.items():
            whole = [dense(*changes[name], like=start) for changes in self.changes]
            now[name].copy_(start + self.scale * merged(torch.stack(whole)))

    def state_dict(self) -> State:
        """The base model's weights and the tasks' changes."""
        state: State = {"num": len(self.changes)}
        state |= {f"start/{name}": value for name, value in self.start.items()}
        for t, changes in enumerate(self.changes):
            for name, (places, entries) in changes.items():
                state |= {f"places/{t}/{name}": places, f"entries/{t}/{name}": entries}
        return state

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back, each to its parameter's device."""
        devices = {name: parameter.device for name, parameter in model.named_parameters()}

        def taken(prefix: str) -> dict[str, Tensor]:
            found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            return {name: value.to(devices.get(name, value.device)) for name, value in found.items()}

        self.start = taken("start/")
        self.changes = []
        for t in range(state["num"]):
            places, entries = taken(f"places/{t}/"), taken(f"entries/{t}/")
            self.changes.append({name: (places[name], entries[name]) for name in places})
        return model


def trimmed(change: dict[str, Tensor], *, density: float) -> dict[str, Tensor]:
    """The largest entries over all tensors together, the others set to 0; entries as large as the last one stay."""
    sizes = torch.cat([value.abs().flatten() for value in change.values()])
    num = max(1, round(density * len(sizes)))
    smallest = sizes.kthvalue(len(sizes) - num + 1).values
    return {name: torch.where(value.abs() >= smallest, value, 0) for name, value in change.items()}


def merged(changes: Tensor) -> Tensor:
    """The mean of the changes that have the elected sign, for each entry; 0 where there are none.

    Args:
        changes: (tasks, ...), trimmed.
    """
    agree = (changes.sign() == changes.sum(dim=0).sign()) & (changes != 0)  # (tasks, ...)
    return torch.where(agree, changes, 0).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def sparse(value: Tensor) -> tuple[Tensor, Tensor]:
    """The places in the flattened tensor that are not 0, int32, and their entries."""
    places = value.flatten().nonzero()[:, 0]
    return places.int(), value.flatten()[places]


def dense(places: Tensor, entries: Tensor, *, like: Tensor) -> Tensor:
    """What `sparse` was given."""
    return torch.zeros_like(like).flatten().index_copy_(0, places.long(), entries).view_as(like)
