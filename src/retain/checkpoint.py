"""Stop in the middle of a task and go on, bit for bit.

    checkpoints/000002/        the newest whole one counts
      checkpoint.json          position, and size and hash of every other file; written last
      model/                   what training moves: trainable parameters, and buffers
      optimizer/               its state by parameter name, its groups' numbers
      strategy/                the strategy's memory
      random-0/                random states, one folder a process
    checkpoints/.000003.tmp/   being written; renamed when it is on the disk, and only then 000002 is deleted

On several processes the first one writes what all have in common. Every process must call both functions.
"""

import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain.distributed import gather_objects, is_main, rank, world_size
from retain.errors import LineageError
from retain.parameters import local, trainable
from retain.storage.documents import read_json, write_json
from retain.storage.files import differences, disk_errors, manifest, sync, sync_tree
from retain.storage.state import load_state, save_state
from retain.strategies.strategy import State

__all__ = ["Checkpoint", "load_checkpoint", "read_checkpoint", "save_checkpoint"]

INDEX = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds besides model, optimizer and random states, which are put back in place.

    Args:
        position: what `save_checkpoint` was given.
        strategy_state: what `Strategy.restore` takes.
    """

    position: Mapping[str, Any]
    strategy_state: State


def save_checkpoint(
    folder: Path, *, model: nn.Module, optimizer: Optimizer, position: Mapping[str, Any], strategy_state: State
) -> None:
    """Write a checkpoint; the previous one goes when this one is whole and on the disk.

    Args:
        folder: where checkpoints lie; made where it is missing.
        model: its frozen parameters are not written.
        optimizer: over parameters of the model.
        position: where training stands: any values that JSON can hold.
        strategy_state: `strategy.state_dict()`.

    Raises:
        LineageError: if the disk is full; the previous checkpoint stays.
    """
    random_states: list[State] = gather_objects(_random_state())
    if not is_main():
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        previous = _numbered(folder)
        number = 1 + max((int(path.name) for path in previous), default=0)
        building = folder / f".{number:06d}.tmp"
        for leftover in folder.glob(".*.tmp"):
            shutil.rmtree(leftover)
        try:
            save_state(_moving(model), building / "model")
            save_state(_optimizer_state(optimizer, model), building / "optimizer")
            save_state(strategy_state, building / "strategy")
            for process, state in enumerate(random_states):
                save_state(state, building / f"random-{process}")
            content = {"position": position, "processes": len(random_states), "files": manifest(building)}
            write_json(building / INDEX, content)
            sync_tree(building)
            building.rename(folder / f"{number:06d}")  # whole, or not there
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)  # on a full disk its space is needed
            raise
        sync(folder)
        for path in previous:
            shutil.rmtree(path)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint's position and strategy state; nothing is put back. None where there is none.

    For a strategy that must rebuild the model before an optimizer can be made for it.
    """
    found = _newest(folder)
    return None if found is None else Checkpoint(read_json(found / INDEX)["position"], load_state(found / "strategy"))


def load_checkpoint(folder: Path, *, model: nn.Module, optimizer: Optimizer) -> Checkpoint | None:
    """Put the newest whole checkpoint back: parameters and buffers in place, the optimizer's state, random states.

    Args:
        folder: where checkpoints lie; it may be missing.
        model: built as the saved one was, with the same parameters trainable.
        optimizer: made for it, with the same groups.

    Returns:
        The position and the strategy's state; None where there is no checkpoint.

    Raises:
        LineageError: if it is of another model, another optimizer or another number of processes.
    """
    found = _newest(folder)
    if found is None:
        return None
    content = read_json(found / INDEX)
    if content["processes"] != world_size():
        raise LineageError(
            f"the checkpoint in {folder} is of {content['processes']} processes, and these are {world_size()}",
            hint=f"go on with `torchrun --nproc-per-node {content['processes']}`, or discard the stage in progress",
        )
    _put_back(model, load_state(found / "model"), folder)
    _put_back_optimizer(optimizer, model, load_state(found / "optimizer"), folder)
    checkpoint = Checkpoint(content["position"], load_state(found / "strategy"))
    _set_random_state(load_state(found / f"random-{rank()}"))  # last: nothing above may draw from it afterwards
    return checkpoint


def _numbered(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("[0-9]*") if path.name.isdecimal()), key=lambda path: int(path.name))


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a torn one is passed over."""
    for path in reversed(_numbered(folder)):
        try:
            if not differences(path, read_json(path / INDEX)["files"], skip=(INDEX,)):
                return path
        except (LineageError, KeyError, TypeError):
            continue
    return None


# The model


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes. A buffer (running statistics) moves in the forward pass, also that of a frozen module."""
    moving: dict[str, Tensor] = {**trainable(model), **dict(model.named_buffers())}
    assert all(local(tensor) is tensor for tensor in moving.values()), "a sharded model is not written as one"
    return moving


def _put_back(model: nn.Module, saved: Mapping[str, Tensor], folder: Path) -> None:
    present = _moving(model)
    if problems := _misfits({name: _kind(t) for name, t in saved.items()}, {n: _kind(t) for n, t in present.items()}):
        raise _of_another("model", problems, folder)
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(saved[name])  # in place: tied weights stay tied, the optimizer keeps its references


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


# The optimizer


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The name of each parameter that the optimizer moves, in the order in which `state_dict` counts them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = cast(list[dict[str, list[nn.Parameter]]], optimizer.param_groups)
    return [names[parameter] for parameter in chain.from_iterable(group["params"] for group in groups)]


def _optimizer_state(optimizer: Optimizer, model: nn.Module) -> State:
    """`{"exp_avg/layer.weight": tensor, "step/layer.weight": tensor, ..., "groups": [...]}`."""
    names, packed = _names(optimizer, model), optimizer.state_dict()
    state: State = {
        f"{key}/{names[index]}": value for index, values in packed["state"].items() for key, value in values.items()
    }
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in packed["param_groups"]]
    return {**state, "groups": groups}


def _put_back_optimizer(optimizer: Optimizer, model: nn.Module, saved: State, folder: Path) -> None:
    names = _names(optimizer, model)
    indexes = {name: index for index, name in enumerate(names)}
    groups: list[dict[str, Any]] = saved.pop("groups")
    present: list[list[int]] = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    now = {names[index]: f"group {number}" for number, members in enumerate(present) for index in members}
    then = {name: f"group {number}" for number, group in enumerate(groups) for name in group["params"]}
    if problems := _misfits(then, now):
        raise _of_another("optimizer", problems, folder)

    state: dict[int, dict[str, Any]] = {}
    for full_name, value in saved.items():
        key, name = full_name.split("/", 1)
        state.setdefault(indexes[name], {})[key] = value
    groups = [{**group, "params": [indexes[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})

    # `load_state_dict` chooses the right device, but rounds what is wider than its parameter.
    parameters = dict(model.named_parameters())
    for index, values in state.items():
        loaded = optimizer.state[parameters[names[index]]]
        for key, value in values.items():
            if isinstance(value, Tensor):
                loaded[key] = value.to(loaded[key].device)


# Random states


def _random_state() -> State:
    """Of every generator that code in this process may draw from without naming one."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  libraries draw from the global one
    key = numpy_state["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        **{f"cuda/{device}": state for device, state in enumerate(cuda)},
    }


def _set_random_state(state: State) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device in range(torch.cuda.device_count()):
        if f"cuda/{device}" in state:
            torch.cuda.set_rng_state(state[f"cuda/{device}"], device)


# What does not fit


def _misfits(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Names whose kind differs between the checkpoint and what it shall be put back into."""
    pairs = {name: (saved.get(name, "missing"), present.get(name, "missing")) for name in sorted({*saved, *present})}
    return [f"{name}: {then} in the checkpoint, {now} now" for name, (then, now) in pairs.items() if then != now]


def _of_another(what: str, problems: list[str], folder: Path) -> LineageError:
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return LineageError(
        f"the checkpoint in {folder} is of another {what}",
        problems=[*problems[:5], *more],
        hint="go on with the recipe that it was written with, or discard the stage in progress",
    )
