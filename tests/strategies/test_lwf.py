"""The distillation term against its closed form; its teacher against the model as it was."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.kernels import chunks
from retain.strategies.lwf import LwF
from retain.types import Batch

Toy = Callable[..., Any]


def network(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).double()


def shift(model: nn.Module, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def term_of(strategy: LwF, model: nn.Module, task: Any, batch: Batch) -> Tensor:
    term = strategy.loss_term(model, batch, task.forward(model, batch))
    assert term is not None
    return term


def value_of(strategy: LwF, model: nn.Module, task: Any, batch: Batch) -> float:
    return float(term_of(strategy, model, task, batch).detach())


def in_second_task(model: nn.Module, first: Any, second: Any, **options: Any) -> LwF:
    strategy = LwF(**options)
    strategy.after_task(strategy.before_task(model, first), first)
    strategy.before_task(model, second)
    return strategy


def test_nothing_while_the_model_is_the_teacher(toy_task: Toy) -> None:
    model, task = network(), toy_task(length=3)
    strategy = in_second_task(model, task, task)
    term = term_of(strategy, model, task, next(task.batches(task.examples)))
    term.backward()
    assert float(term.detach()) == 0
    for parameter in model.parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_in_closed_form(toy_task: Toy, temperature: float) -> None:
    """d term / d logits = strength * weight * T * (p_model - p_teacher): with T squared, and the teacher first."""
    model, task = network(), toy_task(length=2)
    task = replace(task, examples=[replace(row, weight=0.5) for row in task.examples])
    strategy = in_second_task(model, task, task, strength=3.0, temperature=temperature)
    batch = next(task.batches(task.examples))
    teacher = task.forward(model, batch).logits().detach()
    shift(model)
    outputs = task.forward(model, batch)
    outputs.at_targets.retain_grad()
    term = strategy.loss_term(model, batch, outputs)
    assert term is not None
    term.backward()
    p, q = ((x.detach() / temperature).softmax(-1) for x in (teacher, outputs.at_targets))
    torch.testing.assert_close(outputs.at_targets.grad, 3.0 * 0.5 * temperature * (q - p))
    torch.testing.assert_close(term.detach(), 1.5 * temperature**2 * (p * (p / q).log()).sum())


def test_the_students_gradients_survive_the_swap(toy_task: Toy) -> None:
    """The teacher's weights stand in the model between the student's forward and backward passes."""
    model, task = network(), toy_task(length=2)
    strategy = in_second_task(model, task, task)
    shift(model)
    batch = next(task.batches(task.examples))
    outputs = task.forward(model, batch)
    loss = task.loss(outputs, batch)
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    strategy.loss_term(model, batch, outputs)
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert torch.equal(one, other)


def test_summed_over_targets_whatever_the_batches_and_the_padding(toy_task: Toy) -> None:
    model, task = network(), toy_task(num=12, length=3)
    for row in task.examples[::2]:  # of different lengths
        task.inputs[row.id], task.targets[row.id] = task.inputs[row.id][:1], task.targets[row.id][:1]
    strategy = in_second_task(model, task, task)
    shift(model)
    terms: list[float] = []
    for size in (1, 5, 12):
        view = replace(task, batch_size=size)
        terms.append(sum(value_of(strategy, model, view, batch) for batch in view.batches(task.examples)))
    assert terms[0] > 0
    assert terms == pytest.approx([terms[0]] * 3)


def test_a_target_that_does_not_count_is_not_distilled(toy_task: Toy) -> None:
    model, task = network(), toy_task(num=4, length=3)
    strategy = in_second_task(model, task, task)
    shift(model)
    whole = value_of(strategy, model, task, next(task.batches(task.examples)))
    for row in task.examples:
        task.targets[row.id] = torch.cat([torch.full((2,), -100), task.targets[row.id][2:]])
    last = value_of(strategy, model, task, next(task.batches(task.examples)))
    assert 0 < last < whole


def test_previous_follows_the_tasks_and_base_stays(toy_task: Toy) -> None:
    task = toy_task()
    batch = next(task.batches(task.examples))
    terms: dict[str, list[float]] = {}
    for teacher in ("previous", "base"):
        model = network()
        strategy = in_second_task(model, task, task, teacher=teacher)
        shift(model)
        terms[teacher] = [value_of(strategy, model, task, batch)]
        strategy.after_task(model, task)
        strategy.before_task(model, task)
        terms[teacher].append(value_of(strategy, model, task, batch))
    assert terms["previous"][1] == 0
    assert terms["base"][0] == terms["base"][1] == terms["previous"][0] > 0


def test_nothing_before_anything_was_learned(toy_task: Toy) -> None:
    model, task = network(), toy_task()
    strategy = LwF(teacher="base")
    strategy.before_task(model, task)
    batch = next(task.batches(task.examples))
    assert strategy.loss_term(model, batch, task.forward(model, batch)) is None


def test_the_base_is_what_the_first_task_found(toy_task: Toy) -> None:
    """Without stage 0 the base model's weights are those before the first task."""
    model, task = network(), toy_task()
    strategy = LwF(teacher="base")
    strategy.before_task(model, task)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shift(model)
    strategy.after_task(model, task)
    assert strategy.earlier.keys() == base.keys()
    assert all(torch.equal(strategy.earlier[name], value) for name, value in base.items())


class Detachable:
    """The change is a bias that can be left out; letting go of it unfreezes everything, as PEFT does."""

    can_detach = True

    @contextmanager
    def detached(self, model: Any) -> Generator[nn.Module]:
        kept, model[1].bias.data = model[1].bias.data, torch.zeros_like(model[1].bias)
        try:
            yield model
        finally:
            model[1].bias.data = kept
            model.requires_grad_(True)


def test_a_method_that_detaches_is_its_own_teacher(toy_task: Toy) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4)).double()
    model[0].requires_grad_(False)
    task = replace(toy_task(), method=Detachable())
    strategy = in_second_task(model, task, task, teacher="base")
    assert strategy.earlier == {}
    batch = next(task.batches(task.examples))
    base = task.forward(model, batch).logits().detach()
    with torch.no_grad():
        model[1].bias += 1.0 * torch.arange(4)
    assert not model[0].weight.requires_grad
    term = term_of(strategy, model, task, batch)
    p, q = ((x / 2).softmax(-1) for x in (base, task.forward(model, batch).logits().detach()))
    torch.testing.assert_close(term.detach(), 4 * (p * (p / q).log()).sum())
    assert not model[0].weight.requires_grad
    term.backward()
    assert model[1].bias.grad is not None
    assert set(strategy.state_dict()) == {"tasks", "sizes"}


@pytest.mark.parametrize("rows", ["all", "task", "old"])
def test_rows_say_where_to_distil(toy_task: Toy, rows: Any) -> None:
    model, task = network(), toy_task(num=6, length=2)
    strategy = in_second_task(model, task, task, rows=rows)
    shift(model)
    sources = ["task", "replay", "generated"] * 2
    mixed = [replace(row, source=source) for row, source in zip(task.examples, sources, strict=True)]
    expected = 0.0
    for row in mixed:
        if rows == "all" or (rows == "task") == (row.source == "task"):
            everywhere = in_second_task(model, task, task)
            everywhere.earlier = strategy.earlier
            expected += value_of(everywhere, model, task, next(task.batches([row])))
    assert value_of(strategy, model, task, next(task.batches(mixed))) == pytest.approx(expected)
    if rows != "all":
        without = [row for row in mixed if (row.source == "task") != (rows == "task")]
        batch = next(task.batches(without))
        assert strategy.loss_term(model, batch, task.forward(model, batch)) is None


def test_the_teacher_has_no_dropout_and_leaves_the_random_state(toy_task: Toy) -> None:
    model, task = network(dropout=0.5).train(), toy_task()
    strategy = in_second_task(model, task, task)
    batch = next(task.batches(task.examples))
    outputs = task.forward(model, batch)
    state = torch.get_rng_state()
    first, second = strategy.loss_term(model, batch, outputs), strategy.loss_term(model, batch, outputs)
    assert first is not None
    assert second is not None
    assert float(first.detach()) == float(second.detach()) > 0  # the student's dropout alone
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_bf16_copies_of_the_teachers_weights_do_not_reach_the_student(toy_task: Toy) -> None:
    """Autocast keeps a weight's bf16 copy by its identity; the student's head must not get the teacher's, nor one
    that was made without gradients."""
    task = toy_task(length=2)
    model = network()
    strategy = in_second_task(model, task, task, strength=5.0)
    shift(model)
    batch = next(task.batches(task.examples))
    model.float()
    strategy.earlier = {name: value.float() for name, value in strategy.earlier.items()}
    batch = replace(batch, inputs={"x": batch.inputs["x"].float()}, weights=batch.weights.float())

    class Late:
        """Outputs whose head runs when they are asked, as a family's do."""

        classes = None

        def __init__(self, hidden: Tensor) -> None:
            self.hidden = hidden

        def head(self, hidden: Tensor) -> Tensor:
            return model[3](hidden)  # type: ignore[index]

        def logits(self) -> Tensor:
            return self.head(self.hidden)

    head: Any = model[3]  # type: ignore[index]
    gradients: list[Tensor] = []
    for precise in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            hidden = model[:3](batch.inputs["x"][batch.counted])  # type: ignore[index]
            term = strategy.loss_term(model, batch, Late(hidden))
        assert term is not None
        gradients.append(torch.autograd.grad(term, head.weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1, atol=0.02 * float(gradients[0].abs().max()))


class Whole:
    """Outputs whose head moves, as a full-tuned model's does."""

    classes = None

    def __init__(self, model: Any, batch: Batch) -> None:
        self.hidden, self.head = model[:3](batch.inputs["x"][batch.counted]), model[3]

    def logits(self) -> Tensor:
        return self.head(self.hidden)


@pytest.mark.parametrize("rows", ["all", "old"])
def test_chunks_change_nothing_where_the_head_moves(toy_task: Toy, rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's head is not the model's; no more than 16 rows of logits exist at once."""
    task = toy_task(length=3)
    model = network()
    strategy = in_second_task(model, task, task, strength=3.0, rows=rows)
    strategy.task = Heads(task)
    batch = next(task.batches([replace(row, source=["task", "replay"][i % 2]) for i, row in enumerate(task.examples)]))
    wanted = torch.tensor([rows == "all" or i % 2 == 1 for i in range(len(task.examples))])[batch.target_documents]
    old = Whole(model, batch).logits().detach()
    shift(model)
    new = Whole(model, batch).logits()
    p, q = (old / 2).softmax(-1), (new / 2).log_softmax(-1)
    expected = 3 * 4 * (p * (p.log() - q)).sum(-1)[wanted].sum()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    monkeypatch.setattr(chunks, "LOGITS_PER_CHUNK", 1)
    sizes: list[int] = []
    model[3].register_forward_hook(lambda *call: sizes.append(len(call[2])))  # type: ignore[index]
    term = strategy.loss_term(model, batch, Whole(model, batch))
    assert term is not None
    assert max(sizes) == 16
    torch.testing.assert_close(term, expected)
    torch.testing.assert_close(torch.autograd.grad(term, list(model.parameters())), gradients)


class Heads:
    """A task whose outputs wait for their head."""

    def __init__(self, task: Any) -> None:
        self.method = task.method

    def forward(self, model: nn.Module, batch: Batch) -> Whole:
        return Whole(model, batch)


def test_rows_that_the_model_has_grown_have_no_teacher_of_their_own(toy_task: Toy) -> None:
    model, task = network(), toy_task()
    strategy = in_second_task(model, task, task)
    head: Any = model[3]  # type: ignore[index]
    head.weight.data = torch.cat([head.weight.data, torch.zeros(1, 8, dtype=torch.float64)])
    head.bias.data = torch.cat([head.bias.data, torch.zeros(1, dtype=torch.float64)])
    batch = next(task.batches(task.examples))
    assert value_of(strategy, model, task, batch) == 0


@pytest.mark.parametrize("again", [False, True], ids=["one process", "restored"])
@pytest.mark.parametrize("rows", ["all", "old"])
def test_a_classifier_is_distilled_over_the_classes_that_the_teacher_knew(classes: Any, rows: Any, again: bool) -> None:
    """The head has grown from two classes to five: by hand over the first two, and the new rows are left alone."""
    world = classes()
    old, strategy = world.view("old"), LwF(strength=3.0, temperature=2.0, rows=rows)
    strategy.after_task(strategy.before_task(world.model, old), old)
    if again:
        state = strategy.state_dict()
        strategy = LwF(strength=3.0, temperature=2.0, rows=rows)
        strategy.restore(world.model, state)
    new = world.view("new")
    strategy.before_task(world.model, new)
    mixed = [row for pair in zip(old.examples, new.examples, strict=False) for row in pair]
    [batch] = new.batches(mixed)
    wanted = torch.tensor([rows == "all" or row.source == "replay" for row in batch.examples])
    before = new.forward(world.model, batch).logits().detach()
    assert before.shape[1] == 5
    world.shift()
    outputs = new.forward(world.model, batch)
    p, q = (before[wanted, :2] / 2).softmax(-1), (outputs.logits()[wanted, :2] / 2).log_softmax(-1)
    expected = 3 * 4 * (p * (p.log() - q)).sum()
    parameters = list(world.model.parameters())
    gradients = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
    term = strategy.loss_term(world.model, batch, outputs)
    assert term is not None
    torch.testing.assert_close(term, expected)
    assert float(expected.detach()) > 0
    term.backward()
    assert all(not rows.any() for rows in world.new_rows())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_yes_and_no_of_new_classes_are_not_distilled(classes: Any) -> None:
    world = classes("label_f1")
    old, strategy = world.view("old"), LwF()
    strategy.after_task(strategy.before_task(world.model, old), old)
    new = world.view("new")
    strategy.before_task(world.model, new)
    world.shift()
    [batch] = new.batches(new.examples)  # asks of the three new classes only
    assert strategy.loss_term(world.model, batch, new.forward(world.model, batch)) is None
    [batch] = new.batches([*new.examples, *old.examples])
    term = strategy.loss_term(world.model, batch, new.forward(world.model, batch))
    assert term is not None
    term.backward()
    assert all(not rows.any() for rows in world.new_rows())
    [alone] = new.batches(old.examples)
    torch.testing.assert_close(term, strategy.loss_term(world.model, alone, new.forward(world.model, alone)))


def test_classes_that_are_all_known_are_all_distilled(classes: Any) -> None:
    world = classes()
    old, strategy = world.view("old"), LwF(temperature=1.0)
    strategy.after_task(strategy.before_task(world.model, old), old)
    strategy.before_task(world.model, old)
    [batch] = old.batches(old.examples)
    p = old.forward(world.model, batch).logits().detach().softmax(-1)
    world.shift()
    q = old.forward(world.model, batch).logits().detach().log_softmax(-1)
    term = strategy.loss_term(world.model, batch, old.forward(world.model, batch))
    torch.testing.assert_close(term.detach(), (p * (p.log() - q)).sum())


def test_a_base_that_had_no_classes_teaches_none(classes: Any) -> None:
    world = classes()
    old, strategy = world.view("old"), LwF(teacher="base")
    strategy.after_task(strategy.before_task(world.model, old), old)
    new = world.view("new")
    strategy.before_task(world.model, new)
    [batch] = new.batches([*new.examples, *old.examples])
    assert strategy.loss_term(world.model, batch, new.forward(world.model, batch)) is None


def test_the_copy_goes_when_its_work_is_done(toy_task: Toy) -> None:
    model, task = network(), toy_task()
    strategy = in_second_task(model, task, task)
    assert len(strategy.state_dict()) == 2 + len(list(model.parameters()))
    strategy.after_task(model, task)
    assert strategy.state_dict().keys() == {"tasks", "sizes"}


def test_the_state_gives_the_same_term(toy_task: Toy) -> None:
    model, task = network(), toy_task()
    strategy = in_second_task(model, task, task)
    shift(model)
    batch = next(task.batches(task.examples))
    other = LwF()
    other.before_task(model, task)
    other.restore(model, strategy.state_dict())
    assert torch.equal(term_of(other, model, task, batch), term_of(strategy, model, task, batch))


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"temperature": 0.0}])
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        LwF(**options)
