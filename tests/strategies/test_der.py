"""The two terms against their formula; stored logits against the rows that they belong to, also where rows are cut."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.data.rendering import Renderer
from retain.kernels import chunks
from retain.methods.full import Full
from retain.models.decoder import DecoderFamily
from retain.parameters import num_bytes
from retain.strategies.der import DER
from retain.strategies.replay import Replay
from retain.task_view import BoundTask
from retain.types import Batch, Example, Message

Toy = Callable[..., Any]


def network(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).double()


def shift(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def filled(model: nn.Module, task: Any, **options: Any) -> DER:
    strategy = DER(**options)
    strategy.after_task(model, task)
    return strategy


def replayed(task: Any) -> Batch:
    return next(task.batches([replace(row, source="replay") for row in task.examples]))


def term_of(strategy: DER, model: nn.Module, task: Any, batch: Batch) -> Tensor:
    term = strategy.loss_term(model, batch, task.forward(model, batch))
    assert term is not None
    return term


@pytest.mark.parametrize("top_k", [1, 2, 4, 9])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_terms_are_those_of_the_paper(toy_task: Toy, top_k: int, beta: float) -> None:
    """The loop's own loss counts each replayed row once; with the term it counts beta times."""
    model, task = network(), toy_task(num=6, length=2)
    task = replace(task, examples=[replace(row, weight=0.5) for row in task.examples])
    strategy = filled(model, task, alpha=0.3, beta=beta, top_k=top_k)
    batch = replayed(task)
    old = task.forward(model, batch).logits().detach()
    shift(model)
    now = task.forward(model, batch).logits()
    largest = old.argsort(dim=1, descending=True)[:, :top_k]
    squares = ((now - old).gather(1, largest) ** 2).mean(dim=1)
    nats = F.cross_entropy(now, batch.targets[batch.counted], reduction="none")
    expected = 0.5 * (0.3 * squares + beta * nats).sum()
    total = task.loss(task.forward(model, batch), batch) + term_of(strategy, model, task, batch)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3)  # float16
    torch.testing.assert_close(
        torch.autograd.grad(total, list(model.parameters())), torch.autograd.grad(expected, list(model.parameters())),
        rtol=1e-2, atol=5e-3,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_chunks_change_nothing(toy_task: Toy, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the chunk's border is not that between the targets with stored logits and the others."""
    model, task = network(), toy_task(num=20, length=2)
    first = replace(task, targets={id: y[: 1 + i % 2] for i, (id, y) in enumerate(task.targets.items())})
    first = replace(first, inputs={id: x[: 1 + i % 2] for i, (id, x) in enumerate(task.inputs.items())})
    found: list[Any] = []
    for at_once in (2**25, 1):
        monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", at_once)
        model = network()
        strategy = filled(model, first, alpha=0.5, beta=beta, top_k=2)
        shift(model)
        term = term_of(strategy, model, task, replayed(task))
        found.append((list(strategy.logits.values()), term, torch.autograd.grad(term, list(model.parameters()))))
    torch.testing.assert_close(found[0], found[1])


def test_logits_are_those_of_the_time_of_storing(toy_task: Toy) -> None:
    """The model after a later task says nothing about rows that came in before it."""
    model, task, later = network(), toy_task("a", num=6), toy_task("b", num=6)
    strategy = filled(model, task)
    before = {id: (values.clone(), tokens.clone()) for id, (values, tokens) in strategy.logits.items()}
    shift(model)
    strategy.after_task(model, later)
    for id, (values, tokens) in before.items():
        assert torch.equal(strategy.logits[id][0], values)
        assert torch.equal(strategy.logits[id][1], tokens)
    assert len(strategy.logits) == 12


def test_logits_leave_with_their_rows(toy_task: Toy) -> None:
    model = network()
    strategy = filled(model, toy_task("a", num=30), capacity=10)
    strategy.after_task(model, toy_task("b", num=30))
    assert list(strategy.logits) == [row.id for row in strategy.memory.rows]
    assert {row.task for row in strategy.memory.rows} == {"a", "b"}


def test_new_rows_are_not_held_to_old_logits(toy_task: Toy) -> None:
    """Also where the new task has a row that the memory knows."""
    model, task = network(), toy_task(num=6)
    strategy = filled(model, task, alpha=1.0)
    shift(model)
    batch = next(task.batches(task.examples))
    assert strategy.loss_term(model, batch, task.forward(model, batch)) is None
    mixed = next(task.batches([*task.examples[:3], replace(task.examples[4], source="replay")]))
    alone = next(task.batches([replace(task.examples[4], source="replay")]))
    torch.testing.assert_close(term_of(strategy, model, task, mixed), term_of(strategy, model, task, alone))


def test_batches_and_padding_change_nothing(toy_task: Toy) -> None:
    model, task = network(), toy_task(num=12, length=3)
    for row in task.examples[::2]:
        task.inputs[row.id], task.targets[row.id] = task.inputs[row.id][:1], task.targets[row.id][:1]
    strategy = filled(model, task, beta=0.5)
    shift(model)
    rows = [replace(row, source="replay") for row in task.examples][::-1]
    sums: list[float] = []
    for size in (1, 5, 12):
        view = replace(task, batch_size=size)
        sums.append(sum(float(term_of(strategy, model, view, batch).detach()) for batch in view.batches(rows)))
    assert sums == pytest.approx([sums[0]] * 3)


@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 2), (2, 3)])
def test_rows_cut_at_another_length_still_line_up(toy_task: Toy, before: int, after: int) -> None:
    model, whole = network(), toy_task(num=5, length=3)

    def cut(length: int) -> Any:
        inputs = {id: x[:length] for id, x in whole.inputs.items()}
        return replace(whole, inputs=inputs, targets={id: y[:length] for id, y in whole.targets.items()})

    strategy = filled(model, cut(before), alpha=1.0)
    same = term_of(strategy, model, cut(after), replayed(cut(after)))
    assert float(same.detach()) < 1e-5  # float16 of the same model
    shift(model)
    both = min(before, after)
    expected = term_of(filled(network(), cut(both), alpha=1.0), model, cut(both), replayed(cut(both)))
    torch.testing.assert_close(term_of(strategy, model, cut(after), replayed(cut(after))), expected)


ROWS = [
    Example(f"{i}", (Message("user", "What?"), Message("assistant", "The quick brown fox " * (i + 1))), task="a")
    for i in range(4)
]


@pytest.mark.parametrize("more", [-3, 0, 2, 100])
@pytest.mark.parametrize("packed", [True, False])
def test_real_rows_line_up_with_their_logits(
    build_llama: Callable[..., nn.Module], tokenizer: Any, more: int, packed: bool
) -> None:
    """Stored at one length and met again at another, in another order and batch, the same model says the same."""
    model: Any = build_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # logits that differ from token to token
    view = BoundTask(
        name="a", examples=ROWS, family=DecoderFamily(), renderer=Renderer(tokenizer), method=Full(),
        max_length=1000, max_tokens=10_000, packed=True, precision="fp32",
    )  # fmt: skip
    middle = sorted(view.num_tokens(row) for row in ROWS)[2] - 2
    view = replace(view, max_length=middle)
    strategy = filled(model, view, alpha=1.0)
    counts = {id: len(values) for id, (values, _) in strategy.logits.items()}
    assert sorted(counts.values())[2] == sorted(counts.values())[3] > sorted(counts.values())[1]  # two were cut
    again = replace(view, max_length=middle + more, packed=packed)
    mixed = [replace(row, source=source) for row, source in zip(ROWS[::-1], ["replay", "task"] * 2, strict=True)]
    batches = list(again.batches(mixed))
    assert len(batches) == 1
    assert again.encode(ROWS[3]).num_tokens > middle
    outputs = again.forward(model, batches[0])
    term = float(term_of(strategy, model, again, batches[0]).detach())
    scale = float(outputs.logits().detach().abs().max())
    assert 0 < term / len(batches[0].target_documents) < (1e-3 * scale) ** 2


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_under_bf16_autocast(toy_task: Toy, beta: float) -> None:
    model, task = network(), toy_task(num=6, length=2)
    strategy = filled(model, task, alpha=1.0, beta=beta)
    shift(model)
    batch = replayed(task)
    expected = term_of(strategy, model, task, batch)
    model.float()
    batch = replace(batch, inputs={"x": batch.inputs["x"].float()})
    with torch.autocast("cpu", torch.bfloat16):
        term = term_of(strategy, model, task, batch)
    torch.testing.assert_close(term.double(), expected, rtol=0.03, atol=0.03)


def test_without_distance_it_is_replay(toy_task: Toy) -> None:
    model, old, new = network(), toy_task("a", num=30), toy_task("b", num=30)
    strategy, plain = filled(model, old, alpha=0.0, ratio=0.3), Replay(ratio=0.3)
    plain.after_task(model, old)
    new.inputs.update(old.inputs)
    new.targets.update(old.targets)
    assert strategy.mix_examples(new, 1) == plain.mix_examples(new, 1)
    batch = replayed(old)
    assert strategy.loss_term(model, batch, old.forward(model, batch)) is None


def test_the_cost_is_what_the_docstring_says(toy_task: Toy) -> None:
    strategy = filled(network(), toy_task(num=10, length=5), top_k=3)
    assert num_bytes(tensor for pair in strategy.logits.values() for tensor in pair) == 10 * 5 * 3 * 6


def test_storing_leaves_the_random_state_and_no_gradient(toy_task: Toy) -> None:
    model = network(dropout=0.5).train()
    state = torch.get_rng_state()
    one, other = filled(model, toy_task()), filled(model, toy_task())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one.logits[id][0], other.logits[id][0]) for id in one.logits)
    assert not any(values.requires_grad for values, _ in one.logits.values())


@pytest.mark.parametrize("empty", [True, False])
def test_the_state_gives_the_same_term(toy_task: Toy, empty: bool) -> None:
    model, task = network(), toy_task(length=2)
    strategy, other = DER() if empty else filled(model, task), DER()
    other.restore(model, strategy.state_dict())
    assert other.memory.rows == strategy.memory.rows
    shift(model)
    batch = replayed(task)
    if not empty:
        assert torch.equal(term_of(other, model, task, batch), term_of(strategy, model, task, batch))
    for one in (strategy, other):
        one.after_task(model, toy_task("later"))
    states = strategy.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value) if isinstance(value, Tensor) else states[1][name] == value


def test_another_top_k_goes_on_with_what_is_there(toy_task: Toy) -> None:
    model, task = network(), toy_task()
    for now in (1, 4):
        strategy = DER(top_k=now)
        strategy.restore(model, filled(model, task, top_k=2).state_dict())
        strategy.after_task(model, toy_task("later"))
        assert {values.shape[1] for values, _ in strategy.logits.values()} == {min(now, 2)}
        strategy.state_dict()


@pytest.mark.parametrize(
    "options", [{"alpha": -1.0}, {"beta": -1.0}, {"top_k": 0}, {"capacity": 0}, {"capacity_bytes": 0}, {"ratio": 1.0}]
)
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        DER(**options)


@pytest.mark.parametrize("heads", ["shared", "per_task"])
@pytest.mark.parametrize("metric", ["accuracy", "label_f1"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_stored_logits_are_those_of_their_classes_when_the_head_grows(
    classes: Any, metric: str, heads: str, beta: float
) -> None:
    """Old rows among new ones: each target is held to the logits of the classes that it was stored with."""
    world = classes(metric, heads)
    old, strategy = world.view("old"), DER(alpha=2.0, beta=beta)
    [batch] = old.batches(old.examples)
    before = old.forward(world.model, batch).logits().detach()  # (targets, 2)
    assert before.shape[1] == 2
    strategy.after_task(world.model, old)
    new = world.view("new")
    world.shift()
    mixed = [row for pair in zip(new.examples, old.examples, strict=False) for row in pair]
    [batch] = new.batches(mixed)
    outputs = new.forward(world.model, batch)
    wanted = torch.tensor([row.source == "replay" for row in batch.examples])[batch.target_documents]
    logits = outputs.logits()[wanted]
    squares = (logits[:, :2] - before).square().mean(dim=1)
    nats = F.cross_entropy(logits, batch.targets[batch.counted][wanted], reduction="none")
    expected = 2.0 * squares.sum() + (beta - 1) * nats.sum()
    term = strategy.loss_term(world.model, batch, outputs)
    assert term is not None
    torch.testing.assert_close(term, expected, rtol=1e-2, atol=1e-3)  # stored in half precision
    if beta == 1:
        term.backward()
        assert all(not rows.any() for rows in world.new_rows()), "a stored logit is none of a new class"
