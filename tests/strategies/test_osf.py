"""OSF: nothing leaks into the kept directions after any number of AdamW steps, and everything else learns."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from retain.errors import CompatibilityError
from retain.parameters import trainable
from retain.strategies.osf import OSF, matrices

IDS = torch.arange(40).reshape(4, 10) % 23


class FullMethod:
    """Everything moves."""

    name, can_detach, can_extend = "full", False, False


def gpt2(*, tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def steps(model: nn.Module, strategy: OSF, *, num: int = 10, project: bool = True, seed: int = 0) -> list[float]:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)
    ids = IDS.roll(seed, dims=1)
    losses: list[float] = []
    for _ in range(num):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        strategy.edit_gradients(model)
        optimizer.step()
        if project:
            strategy.after_step(model, 1e-2)
        losses.append(float(loss.detach()))
    return losses


def started(strategy: OSF, model: nn.Module, task: Any) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """W_0, U_h and V_h of each matrix, computed apart."""
    strategy.before_task(model, task)
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, weight in matrices(model).items():
        rank = round(strategy.rank_ratio * min(weight.shape))
        left, _, right = torch.linalg.svd(weight.detach().double())
        found[name] = (weight.detach().clone(), left[:, :rank], right[:rank].T)
    return found


def leak(model: nn.Module, kept: dict[str, tuple[Tensor, Tensor, Tensor]]) -> float:
    """The largest share of a change that lies in the kept directions, on either side."""
    shares: list[float] = []
    for name, (start, left, right) in kept.items():
        change = model.get_parameter(name).detach().double() - start.double()
        assert change.norm() > 0, f"{name} learns"
        shares += [float((left.T @ change).norm() / change.norm()), float((change @ right).norm() / change.norm())]
    return max(shares)


@pytest.fixture
def task(toy_task: Callable[..., Any]) -> Any:
    return toy_task(method=FullMethod())


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_nothing_leaks_after_adamw_with_weight_decay(task: Any, ratio: float) -> None:
    model, strategy = gpt2(), OSF(rank_ratio=ratio)
    strategy.after_task(model, task)
    kept = started(strategy, model, task)
    assert len(kept) == 8, "four transposed matrices in each of two blocks"
    losses = steps(model, strategy, num=20)
    assert leak(model, kept) <= 1e-5
    assert losses[-1] < losses[0]


def test_projecting_the_gradient_alone_leaks(task: Any) -> None:
    """What PEFT's OSF does: Adam puts more than a hundredth of the change where it must not be."""
    model, strategy = gpt2(), OSF()
    strategy.after_task(model, task)
    kept = started(strategy, model, task)
    steps(model, strategy, project=False)
    assert leak(model, kept) > 1e-2


def test_main_directions_keep_their_singular_values(task: Any) -> None:
    model, strategy = gpt2(), OSF()
    strategy.after_task(model, task)
    kept = started(strategy, model, task)
    steps(model, strategy)
    for name, (start, left, right) in kept.items():
        weight = model.get_parameter(name).detach().double()
        torch.testing.assert_close(weight @ right, start.double() @ right, rtol=0, atol=1e-6)
        torch.testing.assert_close(left.T @ weight, left.T @ start.double(), rtol=0, atol=1e-6)


def test_the_next_task_starts_where_the_last_one_ended(task: Any, toy_task: Callable[..., Any]) -> None:
    model, strategy = gpt2(), OSF()
    strategy.after_task(model, task)
    strategy.before_task(model, task)
    first = steps(model, strategy, num=15)
    strategy.after_task(model, task)
    ended = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = started(strategy, model, toy_task("second", method=FullMethod()))
    assert all(torch.equal(p, ended[name]) for name, p in model.named_parameters())
    again = steps(deepcopy(model), strategy, num=1)
    assert again[0] < first[0], "what was learned is there"
    steps(model, strategy, num=10, seed=3)
    assert leak(model, kept) <= 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_are_left_out(tied: bool) -> None:
    model = gpt2(tied=tied)
    assert not any("wte" in name or "wpe" in name or "lm_head" in name for name in matrices(model))
    more = matrices(model, embeddings=True).keys() - matrices(model).keys()
    assert more == {"transformer.wte.weight", "transformer.wpe.weight"} | (set() if tied else {"lm_head.weight"})


def test_without_anything_to_keep_it_is_plain(task: Any) -> None:
    plain = gpt2()
    steps(plain, OSF())
    for strategy, protect in ((OSF(), False), (OSF(rank_ratio=0.0), True)):
        model = gpt2()
        if protect:
            strategy.after_task(model, task)
        strategy.before_task(model, task)
        steps(model, strategy)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)


def test_memory_comes_back(task: Any) -> None:
    model, strategy, again = gpt2(), OSF(), OSF()
    strategy.after_task(model, task)
    again.restore(model, strategy.state_dict())
    other = gpt2()
    for one, network in ((strategy, model), (again, other)):
        one.before_task(network, task)
        steps(network, one, num=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_refusals(task: Any, toy_task: Callable[..., Any]) -> None:
    class Beside(FullMethod):
        name, can_detach = "lora", True

    assert OSF().supports(FullMethod()) is None
    with pytest.raises(CompatibilityError, match="new weights"):
        OSF().before_task(gpt2(), toy_task(method=Beside()))
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match="rank_ratio"):
            OSF(rank_ratio=ratio)
