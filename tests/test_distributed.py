"""One process here; several through `torch.multiprocessing` with gloo, against sums made by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from retain import distributed
from retain.errors import ConfigError


def test_alone_everything_is_the_identity() -> None:
    distributed.start()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    tensor, parameter = torch.tensor([1.0, 2.0]), nn.Parameter(torch.ones(2))
    distributed.sum_tensors([tensor])
    distributed.sum_gradients([parameter])
    assert tensor.tolist() == [1.0, 2.0]
    assert parameter.grad is None
    assert distributed.sum_number(2.5) == 2.5
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    distributed.barrier()
    distributed.stop()


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_a_precision_that_is_named_is_taken(name: str) -> None:
    assert distributed.resolve_precision(name) == name


@pytest.mark.parametrize(("flag", "expected"), [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512", "fp32")])
def test_auto_precision_is_what_the_hardware_multiplies(
    monkeypatch: pytest.MonkeyPatch, flag: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert distributed.resolve_precision("auto") == expected


def test_fp16_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="'fp16' is not a precision") as caught:
        distributed.resolve_precision("fp16")
    assert caught.value.problems == ("allowed: auto, bf16, fp32",)
    assert "bf16" in caught.value.hint


def test_autocast() -> None:
    a = torch.randn(4, 4)
    with distributed.autocast("bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with distributed.autocast("fp32"):
        assert (a @ a).dtype == torch.float32


def test_the_device_is_one_that_computes() -> None:
    assert torch.ones(2, device=distributed.device()).sum() == 2


def work(rank: int, folder: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(folder)}
    distributed.start()
    distributed.start()  # the second time does nothing
    tensor, number = torch.tensor([1.0, 10.0]) * (rank + 1), distributed.sum_number(0.5 + rank)
    distributed.sum_tensors([tensor])
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    used.grad = torch.full((2,), 2.0 + rank)
    if rank == 1:
        unused.grad = torch.full((2,), 7.0)
    distributed.sum_gradients([used, unused])
    assert used.grad is not None
    assert unused.grad is not None
    found: dict[str, Any] = {
        "rank": distributed.rank(),
        "world": distributed.world_size(),
        "main": distributed.is_main(),
        "tensor": tensor.tolist(),
        "number": number,
        "gradients": [used.grad.tolist(), unused.grad.tolist()],
        "objects": distributed.gather_objects([rank, "x"]),
    }
    distributed.barrier()
    distributed.stop()
    (Path(folder) / f"{rank}.txt").write_text(repr(found), encoding="utf-8")


def port(folder: str) -> str:
    return (Path(folder) / "port").read_text(encoding="utf-8")


def test_two_processes_sum(tmp_path: Path) -> None:
    import ast
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]), encoding="utf-8")
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in (0, 1):
        found = ast.literal_eval((tmp_path / f"{rank}.txt").read_text(encoding="utf-8"))
        assert found == {
            "rank": rank,
            "world": 2,
            "main": rank == 0,
            "tensor": [3.0, 30.0],
            "number": 2.0,
            "gradients": [[5.0, 5.0], [7.0, 7.0]],
            "objects": [[0, "x"], [1, "x"]],
        }
