"""A strategy in a Trainer of `transformers` and of `trl`: the same places, the same gradients, nothing lost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from retain.errors import CompatibilityError, DataError
from retain.parameters import trainable
from retain.protection import protect
from retain.strategies.chain import Chain
from retain.strategies.ewc import EWC
from retain.strategies.joint import Joint
from retain.strategies.lamol import LAMOL
from retain.strategies.lwf import LwF
from retain.strategies.replay import Replay
from retain.strategies.sequential import Sequential
from retain.strategies.strategy import Strategy
from retain.types import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Build = Callable[..., nn.Module]


def pairs(words: Sequence[str], num: int = 8) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f" {words[i % len(words)]}"} for i in range(num)]


FIRST, SECOND = pairs(["red", "green blue"]), pairs(["yes", "no no no"])
BASE = pairs(["The quick brown fox", "jumps"], 6)
COMMON: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "report_to": "none", "save_strategy": "no", "use_cpu": True, "logging_steps": 1, "disable_tqdm": True,
    "seed": 3, "max_grad_norm": 0.5,
}  # fmt: skip


def tokenized(rows: Sequence[dict[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    made = []
    for row in rows:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        made.append({
            "input_ids": prompt + answer, "attention_mask": [1] * len(prompt + answer),
            "labels": [-100] * len(prompt) + answer,
        })  # fmt: skip
    return made


@dataclass
class Maker:
    """Makes a Trainer of one kind over some rows."""

    kind: str
    build: Build
    tokenizer: Any
    folder: Path

    def rows(self, rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        """As the kind's data set holds them."""
        if self.kind == "trainer":
            return tokenized(rows, self.tokenizer)
        return [
            {"input_ids": row["input_ids"], "completion_mask": [int(label >= 0) for label in row["labels"]]}
            for row in tokenized(rows, self.tokenizer)
        ]

    def prepared(self, rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        """As the Trainer has them, with what `trl` adds."""
        return list(self(rows).train_dataset)  # type: ignore[arg-type]

    def __call__(self, rows: Sequence[dict[str, str]], model: nn.Module | None = None, **options: Any) -> Trainer:
        model = self.build() if model is None else model
        settings = {**COMMON, "output_dir": str(self.folder / "out"), **options}
        if self.kind == "trainer":
            return Trainer(
                model, TrainingArguments(**settings), train_dataset=Dataset.from_list(self.rows(rows)),
                data_collator=DataCollatorForSeq2Seq(self.tokenizer), processing_class=self.tokenizer,
            )  # fmt: skip
        return SFTTrainer(
            model, SFTConfig(**settings, max_length=64, gradient_checkpointing=False, bf16=False),
            train_dataset=Dataset.from_list(self.rows(rows)), processing_class=self.tokenizer,
        )  # fmt: skip


@pytest.fixture(params=["trainer", "sft"])
def make(request: pytest.FixtureRequest, build_llama: Build, tokenizer: Any, tmp_path: Path) -> Maker:
    return Maker(request.param, build_llama, tokenizer, tmp_path)


def weights(trainer: Trainer) -> Tensor:
    model: Any = trainer.model
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainable(model).values()])


@dataclass
class Watcher(Strategy):
    """Writes down what it is shown."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    penalties: int = 0
    rates: list[float] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    starts: list[dict[str, Tensor]] = field(default_factory=list)
    ends: list[dict[str, Tensor]] = field(default_factory=list)
    scale: float = 0.0

    def edit_gradients(self, model: nn.Module) -> None:
        found = trainable(model)
        self.starts.append({name: p.detach().clone() for name, p in found.items()})
        self.gradients.append({name: p.grad.clone() for name, p in found.items() if p.grad is not None})

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        self.penalties += 1
        return None

    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        self.rates.append(learning_rate)
        self.ends.append({name: p.detach().clone() for name, p in trainable(model).items()})


class Doubling(Watcher):
    """A term that is the data's loss once more."""

    def loss_term(self, model: nn.Module, batch: Batch, outputs: Any) -> Tensor | None:
        self.batches.append(batch)
        return F.cross_entropy(outputs.logits().float(), batch.targets[batch.counted], reduction="sum")


def test_a_strategy_that_does_nothing_changes_nothing(make: Maker) -> None:
    plain = make(FIRST)
    plain.train()
    for strategy in (Sequential(), EWC(strength=0.0, num_samples=2), Replay(ratio=0.0)):
        trainer = make(FIRST)
        protect(trainer, strategy, base=make.prepared(BASE))
        trainer.train()
        assert torch.equal(weights(trainer), weights(plain)), strategy


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_it_sees_the_whole_steps_gradient_before_it_is_clipped(make: Maker, clip: float) -> None:
    watcher, double = Watcher(), Doubling()
    for strategy in (watcher, double):
        trainer = make(FIRST, max_grad_norm=clip)
        protection = protect(trainer, strategy, base="off")
        trainer.train()
        assert len(strategy.gradients) == strategy.penalties == len(strategy.rates) == 3, "once an optimizer step"
        assert strategy.rates[0] == pytest.approx(1e-2)
        for start, end in zip(strategy.starts, strategy.ends, strict=True):
            assert any(not torch.equal(start[name], end[name]) for name in start), "the optimizer moved in between"
    for name, gradient in watcher.gradients[0].items():
        torch.testing.assert_close(double.gradients[0][name], 2 * gradient, rtol=1e-4, atol=1e-6)
    # By hand: nats of the step's four rows over their targets.
    assert {example.id for batch in double.batches for example in batch.examples} == {
        example.id for example in protection.task.examples
    }
    model: Any = make.build()
    model.train()
    total, count = torch.zeros(()), 0
    for batch in double.batches[:2]:
        logits = model(**batch.inputs).logits[batch.counted]
        total = total + F.cross_entropy(logits, batch.targets[batch.counted], reduction="sum")
        count += int(batch.counted.sum())
    (total / count).backward()
    for name, gradient in watcher.gradients[0].items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: EWC(strength=1e3, num_samples=4),
        lambda: LwF(strength=1.0),
        lambda: Chain(Replay(ratio=0.5), EWC(strength=1e3, num_samples=4)),
    ],
    ids=["ewc", "lwf", "chain"],
)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_it_protects_the_first_task_in_the_second(
    make: Maker, strategy: Callable[[], Strategy], adapter: bool, tmp_path: Path
) -> None:
    def model() -> Any:
        base: Any = make.build()
        return get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")) if adapter else base

    learned = make(FIRST, model())
    protection = protect(learned, strategy(), task="first", base=make.prepared(BASE))
    learned.train()
    protection.consolidate(tmp_path / "memory")

    kept = {name: value.detach().clone() for name, value in trainable(protection.model).items()}
    ends = []
    for memory in (None, tmp_path / "memory"):
        again = model()
        again.load_state_dict(kept, strict=False)
        trainer = make(SECOND, again)
        if memory is not None:
            protect(trainer, strategy(), task="second", memory=memory)
        trainer.train()
        ends.append(weights(trainer))
    assert float((ends[0] - ends[1]).abs().max()) > 1e-4


def test_old_rows_come_back_in_the_next_trainer(make: Maker, tmp_path: Path) -> None:
    first = make(FIRST)
    protect(first, Replay(ratio=0.5), task="first", base="off").consolidate(tmp_path / "memory")
    second = make(SECOND)
    protect(second, Replay(ratio=0.5), task="second", memory=tmp_path / "memory")
    rows = [tuple(row["input_ids"]) for row in second.train_dataset]  # type: ignore[union-attr]
    ours = {tuple(row["input_ids"]) for row in make.rows(SECOND)}
    theirs = {tuple(row["input_ids"]) for row in make.rows(FIRST)}
    assert ours <= set(rows)
    assert theirs & set(rows)
    assert set(rows) <= ours | theirs
    assert set(second.train_dataset.column_names) == set(make.prepared(SECOND)[0])  # type: ignore[union-attr]
    second.train()


def test_the_base_writes_what_stands_for_it(make: Maker) -> None:
    trainer = make(FIRST)
    strategy = EWC(strength=1.0, num_samples=4)
    protect(trainer, strategy, base_rows=6)
    assert strategy.tasks == ["base"]
    trainer.train()


def test_a_resumed_training_is_the_same(make: Maker) -> None:
    """Its state is in the Trainer's checkpoints: SI's running path integral would be lost without."""
    from retain.strategies.si import SI

    def trained(resume: bool) -> tuple[Tensor, dict[str, Any]]:
        trainer = make(FIRST, save_strategy="steps", save_steps=2, max_steps=4)
        protection = protect(trainer, SI(strength=1.0), base="off")
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2" if resume else None)
        protection.consolidate()
        return weights(trainer), protection.strategy.state_dict()

    whole, state = trained(resume=False)
    again, other = trained(resume=True)
    assert torch.equal(whole, again)
    for name, value in state.items():
        assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


def test_what_cannot_be_protected_is_refused(make: Maker) -> None:
    with pytest.raises(CompatibilityError, match="cannot be protected") as caught:
        protect(make(FIRST), Joint())
    assert "'joint'" in str(caught.value.problems)
    with pytest.raises(CompatibilityError) as caught:
        protect(make(FIRST), Chain(Replay(), LAMOL()))
    assert "'lamol' reads and writes rows as text" in str(caught.value.problems)
    trained = make(FIRST)
    trained.train()
    with pytest.raises(CompatibilityError) as caught:
        protect(trained, Sequential())
    assert "before it trains" in str(caught.value.problems)
    frozen: Any = make.build()
    frozen.requires_grad_(False)
    with pytest.raises(CompatibilityError) as caught:
        protect(make(FIRST, frozen), Sequential())
    assert "nothing of the model is trainable" in str(caught.value.problems)


def test_rows_that_cannot_be_used_are_refused(make: Maker) -> None:
    with pytest.raises(DataError, match=r"has no .*labels"):
        protect(make(FIRST), EWC(), base=[{"input_ids": [1, 2]}])
    [row] = make.prepared(BASE[:1])
    with pytest.raises(DataError, match="cannot be kept"):
        protect(make(FIRST), EWC(), base=[row | {"labels": torch.zeros(2)}])


def test_texts_stand_for_the_base(make: Maker) -> None:
    trainer = make(FIRST)
    strategy = Replay(ratio=0.5)
    protect(trainer, strategy, base=["The quick brown fox jumps over the lazy dog."] * 2)
    ids = make.tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
    rows = [row for row in trainer.train_dataset if row["input_ids"] == ids]  # type: ignore[union-attr]
    assert rows
    assert all(row["labels"] == ids for row in rows)
    trainer.train()
