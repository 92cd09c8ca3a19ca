import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from transformers import LlamaForCausalLM

from retain import checkpoint as module
from retain.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from retain.errors import LineageError
from retain.parameters import trainable
from retain.storage import state
from retain.types import Example


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Network(nn.Module):
    """Dropout, running statistics, a tied weight and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.dropout(torch.tanh(self.first(self.norm(self.frozen(x))))))


def network(seed: int = 0) -> Network:
    torch.manual_seed(0)
    frozen = nn.Linear(6, 8).state_dict()
    torch.manual_seed(seed)
    made = Network()
    made.frozen.load_state_dict(frozen)
    return made


def train(model: nn.Module, optimizer: Optimizer, num_steps: int) -> list[float]:
    """Steps whose data come from all three global generators."""
    losses: list[float] = []
    for _ in range(num_steps):
        inputs = torch.randn(5, 6) * random.random() + float(np.random.rand())  # noqa: NPY002
        loss = model(inputs).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def draws() -> list[float]:
    """One number of each global generator."""
    return [torch.rand(()).item(), random.random(), float(np.random.normal()), random.gauss(0, 1)]  # noqa: NPY002


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda parameters: AdamW(parameters, lr=0.01, fused=True),
    "adamw one by one": lambda parameters: AdamW(parameters, lr=0.01, foreach=False),
    "adam amsgrad": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True),
    "sgd": lambda parameters: SGD(parameters, lr=0.01),
    "sgd momentum": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_bit_for_bit(name: str, tmp_path: Path):
    def start(seed: int) -> tuple[Network, Optimizer]:
        model = network(seed)
        return model, OPTIMIZERS[name](trainable(model).values())

    model, optimizer = start(1)
    seed_all(7)
    losses = train(model, optimizer, 7)
    drawn = draws()

    stopped, its_optimizer = start(1)
    seed_all(7)
    before = train(stopped, its_optimizer, 3)
    its_optimizer.param_groups[0]["lr"] = 0.01  # a schedule's doing
    save_checkpoint(tmp_path, model=stopped, optimizer=its_optimizer, position={"step": 3}, strategy_state={})

    resumed, new_optimizer = start(2)  # another initialisation
    seed_all(99)
    found = load_checkpoint(tmp_path, model=resumed, optimizer=new_optimizer)
    assert found is not None
    assert found.position == {"step": 3}
    assert before + train(resumed, new_optimizer, 4) == losses
    assert same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert same(new_optimizer.state_dict(), optimizer.state_dict())
    assert resumed.second.weight is resumed.first.weight
    assert draws() == drawn


def llama_step(model: nn.Module, optimizer: Optimizer) -> float:
    ids = torch.randint(0, 300, (2, 12))
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_language_model_goes_on_bit_for_bit(
    method: str, fused: bool, tmp_path: Path, build_llama: Callable[..., LlamaForCausalLM]
):
    def start(seed: int) -> tuple[nn.Module, Optimizer]:
        base: nn.Module = build_llama(tied=True, attention_dropout=0.3)
        if method == "lora":
            torch.manual_seed(seed)
            base = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"))
        return base.train(), AdamW(trainable(base).values(), lr=1e-2, fused=fused)

    model, optimizer = start(1)
    torch.manual_seed(3)
    losses = [llama_step(model, optimizer) for _ in range(4)]

    model, optimizer = start(1)
    torch.manual_seed(3)
    again = [llama_step(model, optimizer) for _ in range(2)]
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, position={}, strategy_state={})

    model, optimizer = start(2)
    load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    assert again + [llama_step(model, optimizer) for _ in range(2)] == losses
    saved = load_file(tmp_path / "000001" / "model" / "tensors.safetensors")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert not frozen & set(saved)
    assert set(trainable(model)) <= set(saved)
    if method == "full":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_strategy_and_the_position_come_back(tmp_path: Path):
    model = network()
    optimizer = AdamW(model.parameters())
    position = {
        "step": 3,
        "epoch": 0.5,
        "best": float("-inf"),
        "task": "luật",
        "history": [{"loss": 1.0}],
        "betas": (0.9, 1),
    }
    kept = {"fisher/w": torch.ones(2, dtype=torch.bfloat16), "memory": [Example("a", text="x")], "seen": 9}
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, position=position, strategy_state=kept)
    drawn = torch.rand(3)
    read, loaded = read_checkpoint(tmp_path), load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    for found in (read, loaded):
        assert found is not None
        assert found.position == position
        assert same(found.strategy_state["fisher/w"], kept["fisher/w"])
        assert (found.strategy_state["memory"], found.strategy_state["seen"]) == (kept["memory"], 9)
    assert torch.equal(torch.rand(3), drawn)


def test_reading_puts_nothing_back(tmp_path: Path):
    model = network()
    optimizer = AdamW(model.parameters())
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, position={}, strategy_state={})
    train(model, optimizer, 1)
    weights, random_state = model.first.weight.clone(), torch.get_rng_state()
    read_checkpoint(tmp_path)
    assert torch.equal(model.first.weight, weights)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_where_there_is_none(tmp_path: Path):
    model = network()
    for folder in (tmp_path, tmp_path / "missing"):
        assert read_checkpoint(folder) is None
        assert load_checkpoint(folder, model=model, optimizer=AdamW(model.parameters())) is None


def save(folder: Path, step: int, model: nn.Module | None = None) -> None:
    model = model or network()
    position = {"step": step}
    save_checkpoint(folder, model=model, optimizer=AdamW(model.parameters()), position=position, strategy_state={})


def step_of(folder: Path) -> Any:
    found = read_checkpoint(folder)
    return found and found.position["step"]


def test_only_the_newest_stays(tmp_path: Path):
    for step in (10, 20, 30):
        save(tmp_path, step)
        assert step_of(tmp_path) == step
    assert [path.name for path in tmp_path.iterdir()] == ["000003"]


def test_a_torn_one_is_passed_over(tmp_path: Path):
    save(tmp_path, 10)
    (tmp_path / "000001").rename(tmp_path / "kept")
    save(tmp_path, 20)
    (tmp_path / "000001").rename(tmp_path / "000002")
    (tmp_path / "kept").rename(tmp_path / "000001")
    assert step_of(tmp_path) == 20
    tensors = tmp_path / "000002" / "model" / "tensors.safetensors"
    os.truncate(tensors, tensors.stat().st_size - 1)
    assert step_of(tmp_path) == 10
    (tmp_path / "000001" / "checkpoint.json").write_text("{")
    assert step_of(tmp_path) is None
    save(tmp_path, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["000003"]


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path):
    save(tmp_path, 10)
    (tmp_path / "000001").rename(tmp_path / ".000001.tmp")
    assert step_of(tmp_path) is None
    save(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]


def saves(folder: Path, step: int) -> bool:
    try:
        save(folder, step)
    except LineageError as error:
        return "disk full" not in error.message
    return True


def test_the_previous_one_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Up to the rename the old one counts, then the new one; a disk that is full anywhere takes neither."""
    seen: set[Any] = set()
    for at in range(1, 200):
        folder = tmp_path / str(at)
        save(folder, 10)
        count = 0

        def counted(real: Callable[..., Any], at: int = at) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                nonlocal count
                count += 1
                if count == at:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(*args)

            return call

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(state, "save_file", counted(state.save_file))
            if saves(folder, 20):
                break
        seen.add(step_of(folder))
        assert list(folder.glob(".*")) == []
        save(folder, 30)
        assert step_of(folder) == 30
    assert at > 10
    assert seen == {10, 20}


def test_another_model_is_refused_and_left_alone(tmp_path: Path):
    save(tmp_path, 10)
    other = network(5)
    other.first = nn.Linear(8, 9)
    weights = other.norm.weight.clone()
    with pytest.raises(LineageError, match="is of another model") as caught:
        load_checkpoint(tmp_path, model=other, optimizer=AdamW(other.parameters()))
    assert "first.bias: missing in the checkpoint, float32 (9,) now" in caught.value.problems
    assert "first.weight: float32 (8, 8) in the checkpoint, float32 (9, 8) now" in caught.value.problems
    assert torch.equal(other.norm.weight, weights)
    with pytest.raises(LineageError, match="is of another model"):
        load_checkpoint(tmp_path, model=network().bfloat16(), optimizer=AdamW(network().parameters()))


def test_another_optimizer_is_refused(tmp_path: Path):
    save(tmp_path, 10)
    model = network()
    groups = [{"params": [model.first.weight]}, {"params": list(model.norm.parameters())}]
    with pytest.raises(LineageError, match="is of another optimizer"):
        load_checkpoint(tmp_path, model=model, optimizer=AdamW(groups))


def test_parameters_are_found_by_name_not_by_order(tmp_path: Path):
    def groups(model: Network, *, turned: bool) -> list[dict[str, Any]]:
        norm = list(model.norm.parameters())
        return [{"params": norm[::-1] if turned else norm, "weight_decay": 0.0}, {"params": [model.first.weight]}]

    model = network()
    optimizer = AdamW(groups(model, turned=False))
    train(model, optimizer, 2)
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, position={}, strategy_state={})
    other = network(3)
    turned = AdamW(groups(other, turned=True), lr=1.0)
    load_checkpoint(tmp_path, model=other, optimizer=turned)
    for left, right in zip(trainable(model).values(), trainable(other).values(), strict=True):
        assert same(dict(optimizer.state[left]), dict(turned.state[right]))
    assert [group["weight_decay"] for group in turned.param_groups] == [0.0, 0.01]
    assert turned.param_groups[0]["lr"] == 1e-3


def test_a_state_wider_than_its_parameter_is_not_rounded(tmp_path: Path):
    model = nn.Linear(3, 3).bfloat16()
    optimizer = AdamW(model.parameters())
    for parameter in model.parameters():
        wide = torch.rand(parameter.shape)
        optimizer.state[parameter] = {"step": torch.tensor(2.0), "exp_avg": wide, "exp_avg_sq": wide + 1e-3}
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, position={}, strategy_state={})
    other = nn.Linear(3, 3).bfloat16()
    loaded = AdamW(other.parameters())
    load_checkpoint(tmp_path, model=other, optimizer=loaded)
    assert same(dict(loaded.state[other.weight]), dict(optimizer.state[model.weight]))


def test_the_number_of_processes_must_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 10)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    model = network()
    with pytest.raises(LineageError, match="is of 1 processes, and these are 2") as caught:
        load_checkpoint(tmp_path, model=model, optimizer=AdamW(model.parameters()))
    assert "--nproc-per-node 1" in caught.value.hint


def test_only_safetensors_and_json(tmp_path: Path):
    save(tmp_path, 10)
    files = {path.relative_to(tmp_path / "000001").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
    assert {name.split("/")[0] for name in files} == {"checkpoint.json", "model", "optimizer", "strategy", "random-0"}


PROCESSES = """
import sys
from pathlib import Path
import torch
from torch import nn
from retain import distributed
from retain.checkpoint import load_checkpoint, save_checkpoint

distributed.start()
torch.manual_seed(distributed.rank())
model = nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())
folder = Path(sys.argv[1])
save_checkpoint(folder, model=model, optimizer=optimizer, position={"step": 1}, strategy_state={})
drawn = torch.rand(4)
distributed.barrier()
checkpoint = load_checkpoint(folder, model=model, optimizer=optimizer)
assert checkpoint is not None and checkpoint.position == {"step": 1}
assert torch.equal(torch.rand(4), drawn), "each process goes on with its own random numbers"
weights = distributed.gather_objects(model.weight.detach())
assert torch.equal(weights[0], weights[1])
torch.manual_seed(0)
assert torch.equal(nn.Linear(2, 2).weight, model.weight), "the first process's weights count"
distributed.stop()
"""


@pytest.mark.slow
def test_several_processes(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*torchrun, script, tmp_path / "c"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "c" / "000001").glob("random-*")) == ["random-0", "random-1"]
