"""The penalty against its closed form; texts that are the old model's, and are read in turn."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain import distributed
from retain.data.rendering import Renderer
from retain.data.self_text import OPENINGS, REQUESTS
from retain.methods.full import Full
from retain.models.decoder import DecoderFamily
from retain.strategies.self_replay import SelfReplay
from retain.task_view import BoundTask
from retain.types import Example, Message, Sampling

Toy = Callable[..., Any]


def network(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).double()


def shift(model: nn.Module, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def of_base(model: nn.Module, base: Any, **options: Any) -> SelfReplay:
    strategy = SelfReplay(**options)
    strategy.after_task(model, base)
    strategy.before_task(model, base)
    return strategy


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_while_the_model_is_the_old_one(toy_task: Toy, dropout: float) -> None:
    """Also with dropout in training mode; and no next-token loss comes in, whose gradient would not vanish."""
    model, base = network(dropout=dropout).train(), toy_task("base", length=3)
    strategy = of_base(model, base)
    value = strategy.add_penalty(model)
    assert value is not None
    assert abs(value.item()) < 1e-6  # p is kept in float32
    assert float(gradients(model).abs().max()) < 1e-6


@pytest.mark.parametrize("target", ["kl", "tokens"])
def test_the_penalty_by_hand(toy_task: Toy, target: Any) -> None:
    model, base = network(), toy_task("base", length=3, num=6)
    strategy = of_base(model, base, target=target, coefficient=2.5, ratio=0.9)
    [batch] = base.batches(base.examples)
    old = base.forward(model, batch).logits().detach()
    shift(model)
    strategy.read = 2  # tokens of the step: 18 of the texts are wanted, all of them
    new = base.forward(model, batch).logits()
    if target == "kl":
        nats = (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1)
    else:
        nats = F.cross_entropy(new, batch.targets[batch.counted], reduction="none")
    expected = 2.5 * nats.mean()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(model.parameters()))])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # the data's, which stays
    value = strategy.add_penalty(model)
    assert value is not None
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model) - 1, wanted, rtol=1e-5, atol=1e-7)


def test_few_kept_tokens_bound_the_kl_from_below(toy_task: Toy) -> None:
    values: list[float] = []
    for top in (1, 2, 4):
        model, base = network(), toy_task("base", length=3)
        strategy = of_base(model, base, top=top)
        shift(model)
        value = strategy.add_penalty(model)
        assert value is not None
        values.append(value.item())
    assert 0 < values[0] < values[1] < values[2]


def test_the_parts_of_two_processes_are_the_whole(toy_task: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = network(), toy_task("base", length=3, num=6)
    strategy = of_base(model, base, ratio=0.9)
    shift(model)
    strategy.read = 2
    whole = strategy.add_penalty(model)
    assert whole is not None
    all_of_it = gradients(model)
    parts: list[Tensor] = []
    values: list[float] = []
    share = base.batches
    for rank in (0, 1):
        model.zero_grad()
        strategy.drawn, strategy.read = 0, 2
        monkeypatch.setattr(type(base), "batches", lambda self, rows, rank=rank, **_: share(list(rows)[rank::2]))
        # a sum over processes of a count that both share half of
        monkeypatch.setattr(distributed, "sum_number", lambda value: value * 2 if value == 9 else value)
        value = strategy.add_penalty(model)
        assert value is not None
        values.append(value.item())
        parts.append(gradients(model))
        monkeypatch.undo()
    torch.testing.assert_close(parts[0] + parts[1], all_of_it)
    assert sum(values) == pytest.approx(whole.item())


def test_what_is_frozen_gets_no_gradient(toy_task: Toy) -> None:
    model, base = network(), toy_task("base")
    strategy = of_base(model, base)
    shift(model)
    model[0].requires_grad_(False)
    strategy.add_penalty(model)
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None


@pytest.mark.parametrize("off", [{"ratio": 0.0}, {"coefficient": 0.0}])
def test_off_is_off(toy_task: Toy, off: dict[str, float]) -> None:
    model, base = network(), toy_task("base")
    strategy = of_base(model, base, **off)
    assert strategy.add_penalty(model) is None
    assert all(parameter.grad is None for parameter in model.parameters())


# Which texts are read


def drawn(strategy: SelfReplay, task: Any, tokens: int) -> list[str]:
    return [text.id for text in strategy._draw(task, tokens * strategy.ratio / (1 - strategy.ratio))]


def test_all_texts_come_once_before_any_comes_again(toy_task: Toy) -> None:
    model, base = network(), toy_task("base", length=3, num=10)
    strategy = of_base(model, base, ratio=0.5)
    turns = [[id for _ in range(5) for id in drawn(strategy, base, 6)] for _ in range(2)]
    assert all(Counter(turn) == Counter(text.id for text in base.examples) for turn in turns)
    assert turns[0] != turns[1]


def test_the_share_is_of_the_steps_tokens(toy_task: Toy) -> None:
    model, base = network(), toy_task("base", length=3, num=10)
    strategy = of_base(model, base, ratio=0.25)
    [batch] = base.batches(base.examples[:6])
    for _ in range(3):
        assert strategy.loss_term(model, batch, None) is None
    strategy.add_penalty(model)
    assert strategy.drawn == 6  # 54 tokens of the task, 18 of texts
    strategy.add_penalty(model)
    assert strategy.drawn == 7, "the count begins anew; at least one text a step"


def test_goes_on_where_it_was(toy_task: Toy) -> None:
    model, base = network(), toy_task("base", length=3, num=10)
    strategy, other = of_base(model, base, ratio=0.5), SelfReplay(ratio=0.5)
    drawn(strategy, base, 12)
    other.restore(model, strategy.state_dict())
    assert drawn(other, base, 30) == drawn(strategy, base, 30)
    for one, another in zip(strategy.kept, other.kept, strict=True):
        assert torch.equal(one, another)


# What is written


def make_view(toy_task: Toy, says: Callable[[int], str], examples: Sequence[Example], asked: list[Any]) -> Any:
    """A toy task whose model says what the test says; each text it wrote has two tokens."""
    base = toy_task("first", num=1)

    class View(type(base)):
        def generate(
            self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
        ) -> list[str]:
            asked.append((list(prompts), max_new_tokens, sampling))
            return [says(at) for at in range(len(prompts))]

        def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Any:
            for text in examples:
                self.inputs[text.id] = torch.zeros(2, 3, dtype=torch.float64)
                self.targets[text.id] = torch.zeros(2, dtype=torch.long)
            yield from super().batches(examples)

    return View("first", examples, base.inputs, base.targets, seed=5)


CHAT = Example(id="c", messages=(Message("user", "q"), Message("assistant", "a")))


@pytest.mark.parametrize("chat", [True, False])
def test_the_model_writes_its_own_texts(toy_task: Toy, chat: bool) -> None:
    asked: list[Any] = []
    view = make_view(toy_task, lambda at: f" and {at}", [CHAT if chat else Example(id="t", text="x")], asked)
    strategy = SelfReplay(num=8, max_new_tokens=3)
    strategy.after_task(network(), view)
    [(prompts, length, sampling)] = asked
    assert (length, sampling.temperature) == (3, 1.0)
    assert len(strategy.texts) == 8
    assert all(text.task == "first" and text.source == "generated" for text in strategy.texts)
    said = {prompt.text or prompt.prompt[0].content for prompt in prompts}
    assert said <= {*OPENINGS, *REQUESTS}, "nothing of the task's rows is given to the model, or kept"
    assert any(prompt.messages for prompt in prompts) == chat
    assert strategy.counts == [2] * 8
    assert strategy.notes == ("self_replay: 8 of 8 texts stand for first",)


def test_a_shortfall_is_told_and_known_texts_are_not_taken_twice(toy_task: Toy) -> None:
    asked: list[Any] = []
    strategy = SelfReplay(num=6)
    strategy.after_task(network(), make_view(toy_task, lambda at: "" if at else " x", [], asked))
    assert strategy.notes == ("self_replay: 1 of 6 texts stand for first",)
    strategy.after_task(network(), make_view(toy_task, lambda at: "", [], asked))
    assert len(strategy.texts) == 1
    assert strategy.notes[1] == "self_replay: 0 of 6 texts stand for first"


def test_a_model_that_writes_nothing_is_not_protected(toy_task: Toy) -> None:
    model = network()
    view = make_view(toy_task, lambda at: "", [], [])
    strategy = of_base(model, view)
    assert strategy.add_penalty(model) is None


def test_earlier_texts_keep_earlier_predictions(toy_task: Toy) -> None:
    model, base = network(), toy_task("base", length=3, num=4)
    strategy = of_base(model, base)
    first = [tensor.clone() for tensor in strategy.kept]
    shift(model)
    strategy.after_task(model, make_view(toy_task, lambda at: f" {at}", [], []))
    for before, now in zip(first, strategy.kept, strict=True):
        assert torch.equal(now[: len(before)], before)
        assert len(now) == len(before) + 2 * (len(strategy.texts) - 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("max_length", [64, 4])
def test_on_a_language_model(llama: nn.Module, tokenizer: Any, precision: str, max_length: int) -> None:
    """The same tokens meet the same predictions, also where a later task cuts texts shorter."""
    rows = [Example(id=str(i), text="quick brown fox " * (i + 1), task="base") for i in range(3)]

    def view(name: str, max_length: int) -> BoundTask:
        return BoundTask(
            name=name, examples=rows, family=DecoderFamily(), renderer=Renderer(tokenizer), method=Full(),
            max_length=max_length, max_tokens=1000, packed=True, precision=precision,
        )  # fmt: skip

    strategy = SelfReplay(ratio=0.9, coefficient=1.0)
    strategy.after_task(llama, view("base", 64))
    strategy.before_task(llama, view("first", max_length))
    strategy.read = 10
    value = strategy.add_penalty(llama)
    assert value is not None
    assert abs(value.item()) < 1e-6
    shift(llama, by=0.1)
    value = strategy.add_penalty(llama)
    assert value is not None
    assert value.item() > 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num": 0}, "num: expected a whole number above 0, got 0"),
        ({"top": 0}, "top: "),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"coefficient": -1.0}, "coefficient: expected a number of 0 or more, got -1.0"),
        ({"ratio": 1.0}, "ratio: expected a share in"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SelfReplay(**options)
