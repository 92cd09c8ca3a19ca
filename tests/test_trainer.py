"""The loop: what a step is, and that nothing about how it is computed changes what it does."""

import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.data.rendering import Renderer
from retain.errors import CompatibilityError, DivergedError
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.models.decoder import DecoderFamily
from retain.parameters import freeze, trainable
from retain.strategies.strategy import State, Strategy, TaskView
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import learning_rate, train_helper, train_task
from retain.types import Batch, Example, Message, StepInfo

WORDS = ("red", "green", "blue", "fox", "dog", "lazy", "brown")


def make_examples(num: int = 12) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"row-{i}",
            messages=(Message("user", "name " * (1 + i % 5)), Message("assistant", " ".join(WORDS[i % 3 : 2 + i % 6]))),
        )
        for i in range(num)
    )


def make_view(tokenizer: Any, examples: Sequence[Example] | None = None, **options: Any) -> BoundTask:
    settings: dict[str, Any] = {"max_length": 64, "max_tokens": 10_000, "packed": True, "precision": "fp32"} | options
    return BoundTask(
        name="toy",
        examples=examples if examples is not None else make_examples(),
        family=DecoderFamily(),
        renderer=Renderer(tokenizer),
        method=Full(),
        **settings,
    )


def make_config(**options: Any) -> TrainConfig:
    settings: dict[str, Any] = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "precision": "fp32"}
    return TrainConfig(**(settings | options))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(
    build_llama: Callable[..., nn.Module], view: BoundTask, config: TrainConfig, strategy: Strategy | None = None
) -> Tensor:
    model = build_llama().double()
    return weights(train_task(model, view, strategy=strategy or Strategy(), config=config).model)


@pytest.mark.parametrize(
    "changed",
    [{"max_tokens": 40}, {"packed": False}, {"packed": False, "max_tokens": 60}],
    ids=["more-micro-batches", "padded", "padded-micro-batches"],
)
def test_micro_batches_packing_and_padding_change_nothing(
    build_llama: Callable[..., nn.Module], tokenizer: Any, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Padded rows are grouped by length on purpose, so the steps are made the same here.
    monkeypatch.setattr("retain.trainer.schedule", lambda n, **_: [list(range(n))[i : i + 4] for i in range(0, n, 4)])
    reference = run(build_llama, make_view(tokenizer), make_config())
    torch.testing.assert_close(
        run(build_llama, make_view(tokenizer, **changed), make_config()), reference, rtol=0, atol=1e-7
    )


def test_accumulating_eight_times_one_row_is_one_time_eight(
    build_llama: Callable[..., nn.Module], tokenizer: Any
) -> None:
    one = make_config(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    eight = make_config(per_device_train_batch_size=8)
    got = run(build_llama, make_view(tokenizer, max_tokens=1), one)  # every row alone in its pass
    torch.testing.assert_close(got, run(build_llama, make_view(tokenizer), eight), rtol=0, atol=1e-7)


def test_a_step_is_adamw_on_the_mean_over_targets(build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
    view = make_view(tokenizer, make_examples(4))
    config = make_config(weight_decay=0.1, max_grad_norm=0.5, warmup_ratio=0.0, lr_scheduler_type="constant")
    got = run(build_llama, view, config)
    model = build_llama().double()
    rows, _ = view.rows(view.examples)
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(torch.tensor([row.inputs["input_ids"]])).logits[0]
        total = total + F.cross_entropy(logits, torch.tensor(row.targets), reduction="sum")
        count += row.num_targets
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2
    ).step()
    torch.testing.assert_close(got, weights(model), rtol=0, atol=1e-7)


@dataclass
class Recorder(Strategy):
    """Writes down the order of its places, and asserts what each is promised."""

    def __post_init__(self) -> None:
        self.calls: list[str] = []

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        self.calls.append("before_task")
        return model

    def loss_term(self, model: nn.Module, batch: Batch, outputs: Any) -> Tensor | None:
        self.calls.append("loss_term")
        assert outputs.logits().shape[0] == int(batch.counted.sum())
        return None

    def edit_gradients(self, model: nn.Module) -> None:
        self.calls.append("edit_gradients")
        self.gradient = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        self.calls.append("add_penalty")
        for name, parameter in trainable(model).items():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, self.gradient[name]), "clipped or changed before the penalty"
        return torch.tensor(0.25)

    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        self.calls.append("after_step")
        self.rate = learning_rate


def test_the_places_are_called_in_their_order(build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
    strategy = Recorder()
    view = make_view(tokenizer, make_examples(2), max_tokens=1)
    result = train_task(build_llama(), view, strategy=strategy, config=make_config(max_grad_norm=1e-3))
    assert strategy.calls == ["before_task", "loss_term", "loss_term", "edit_gradients", "add_penalty", "after_step"]
    assert result.history[0].penalty == 0.25
    assert strategy.rate == result.history[0].learning_rate


@dataclass
class Pull(Strategy):
    """A penalty with memory and random draws: what resuming has to bring back."""

    def __post_init__(self) -> None:
        self.seen = torch.zeros(())

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        for parameter in trainable(model).values():
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach(), alpha=float(self.seen) * 1e-2)
        return self.seen

    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        self.seen = self.seen + torch.rand(())

    def state_dict(self) -> State:
        return {"seen": self.seen}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        self.seen = state["seen"]
        return model


@pytest.mark.parametrize("lora", [False, True])
def test_an_interrupted_task_resumes_bit_for_bit(
    build_llama: Callable[..., nn.Module], tokenizer: Any, tmp_path: Path, lora: bool
) -> None:
    config = make_config(num_train_epochs=2.0, per_device_train_batch_size=2)

    def build() -> nn.Module:
        torch.manual_seed(5)
        return (LoRA(r=4, dropout=0.2) if lora else Full()).apply(build_llama(attention_dropout=0.3))

    whole = train_task(build(), make_view(tokenizer), strategy=Pull(), config=config)

    def interrupt(info: StepInfo) -> None:
        if info.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_task(
            build(), make_view(tokenizer), strategy=Pull(), config=config, folder=tmp_path, observers=[interrupt]
        )  # fmt: skip
    torch.manual_seed(99)
    again = train_task(build(), make_view(tokenizer), strategy=Pull(), config=config, folder=tmp_path)
    assert torch.equal(weights(again.model), weights(whole.model))
    assert [info.loss for info in again.history] == [info.loss for info in whole.history]


def test_divergence_stops_before_the_step(build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
    class Break(Strategy):
        def add_penalty(self, model: nn.Module) -> Tensor | None:
            return torch.tensor(math.nan)

    model = build_llama()
    before = weights(model)
    with pytest.raises(DivergedError, match="penalty nan"):
        train_task(model, make_view(tokenizer), strategy=Break(), config=make_config())
    assert torch.equal(weights(model), before)


def test_nothing_to_train_is_refused(build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
    with pytest.raises(CompatibilityError, match="frozen"):
        train_task(freeze(build_llama()), make_view(tokenizer), strategy=Strategy(), config=make_config())


def test_the_early_stop_keeps_the_best_weights(build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
    view = make_view(tokenizer)
    config = make_config(
        learning_rate=0.05, num_train_epochs=30.0, eval_steps=2, early_stopping_patience=2, lr_scheduler_type="constant"
    )  # fmt: skip
    validation = tuple(replace(e, messages=(e.messages[0], Message("assistant", "dog"))) for e in make_examples(4))
    result = train_task(build_llama(), view, strategy=Strategy(), config=config, validation=validation)
    losses = [info.validation_loss for info in result.history if info.validation_loss is not None]
    assert result.num_steps < 90
    assert "stopped early" in result.notes[-1]
    assert view.mean_loss(result.model, validation) == pytest.approx(min(losses), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
    reference = run(build_llama, make_view(tokenizer), make_config())
    got = run(build_llama, make_view(tokenizer), make_config(gradient_checkpointing=True))
    torch.testing.assert_close(got, reference, rtol=0, atol=1e-9)


def test_the_model_learns_and_stops_by_itself(build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
    example = Example("only", messages=(Message("user", "name"), Message("assistant", "lazy dog")))
    view = make_view(tokenizer, [example])
    config = make_config(max_steps=60, lr_scheduler_type="cosine")
    result = train_task(build_llama(), view, strategy=Strategy(), config=config)
    assert result.history[-1].loss < 0.05 < result.history[0].loss
    result.model.generation_config.eos_token_id = list(view.renderer.stop_ids)
    prompt = view.renderer.prompt_ids(example.prompt)
    assert view.family.generate(result.model, tokenizer, [prompt], max_new_tokens=30) == ["lazy dog"]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedules(kind: Any) -> None:
    config = make_config(learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type=kind)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:2] == pytest.approx([1 / 3, 2 / 3])
    assert rates[2] == 1.0
    assert rates[9] == pytest.approx(
        {"linear": 1 / 8, "cosine": 0.5 * (1 + math.cos(math.pi * 7 / 8)), "constant": 1.0}[kind]
    )


def test_a_helper_learns_without_protection_or_validation(
    build_llama: Callable[..., nn.Module], tokenizer: Any
) -> None:
    config = make_config(max_steps=2, eval_steps=1, early_stopping_patience=1, save_steps=1)
    helper = train_helper(build_llama().double(), make_view(tokenizer), config=config)
    assert torch.equal(weights(helper), run(build_llama, make_view(tokenizer), make_config(max_steps=2)))


def test_what_a_strategy_tells_is_in_the_result(tokenizer: Any, llama: nn.Module) -> None:
    class Telling(Strategy):
        @property
        def notes(self) -> Sequence[str]:
            return ["4 of 5 rows were written"]

    result = train_task(llama, make_view(tokenizer), strategy=Telling(), config=make_config(max_steps=1))
    assert result.notes == ("task toy: 4 of 5 rows were written",)
