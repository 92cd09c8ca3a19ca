"""The only importer of `torch.distributed`: devices, precision, and sums over processes.

Launch with `torchrun --nproc-per-node N -m retain train recipe.yaml`. On one process every function is the identity.
Gradients are summed once a step, after the last micro-batch, so processes may hold different numbers of micro-batches.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retain.errors import ConfigError

__all__ = [
    "autocast",
    "barrier",
    "device",
    "gather_objects",
    "is_main",
    "rank",
    "resolve_precision",
    "start",
    "stop",
    "sum_gradients",
    "sum_number",
    "sum_tensors",
    "world_size",
]

PRECISIONS = ("auto", "bf16", "fp32")


def start() -> None:
    """Join the process group that `torchrun` announces in the environment; nothing otherwise."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Does this process write files and print?"""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes: its CUDA device, Apple's, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def resolve_precision(name: str) -> str:
    """`auto` as `bf16` where the hardware multiplies bf16 matrices, else `fp32`; others as they are.

    Raises:
        ConfigError: for another name; fp16 needs a gradient scaler, which hides what strategies measure.
    """
    if name not in PRECISIONS:
        raise ConfigError(
            f"train.precision: {name!r} is not a precision", problems=[f"allowed: {', '.join(PRECISIONS)}"],
            hint="bf16 replaces fp16: the same speed, without a gradient scaler",
        )  # fmt: skip
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast_cpu = torch.cpu.get_capabilities().get("avx512_bf16", False) or torch.cpu.get_capabilities().get(
        "amx_bf16", False
    )
    return "bf16" if fast_cpu else "fp32"


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Matrix products in bf16 over float32 master weights; nothing in fp32."""
    return torch.autocast(device().type, torch.bfloat16) if precision == "bf16" else nullcontext()


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sum_number(value: float) -> float:
    """Sum a number over the processes."""
    if world_size() == 1:
        return value
    total = torch.tensor(float(value), dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return float(total)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the processes; a parameter that this process did not use counts as zero."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def gather_objects(value: object) -> list[Any]:
    """Every process's value, in the order of their numbers, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()
