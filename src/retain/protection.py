"""Protect a `transformers.Trainer`, or what derives from it (`trl.SFTTrainer`), with a strategy: one call.

    protection = protect(trainer, EWC(strength=1.0))       # the base writes what stands for its abilities
    trainer.train()
    protection.consolidate("memory")                       # what the next task must not lose

    protection = protect(next_trainer, EWC(strength=1.0), memory="memory")

In each optimizer step the strategy sees the data loss's gradients before they are clipped, adds its penalty once,
however many batches were accumulated, and looks at the weights after they moved. Its state goes into the Trainer's
checkpoints and comes back with them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retain import distributed
from retain.data.self_text import write_self_text
from retain.errors import CompatibilityError
from retain.parameters import trainable
from retain.storage.state import load_state, save_state
from retain.strategies.chain import links
from retain.strategies.strategy import Strategy, TaskMethod
from retain.trainer_task import TrainerMethod, TrainerTask, example_of
from retain.types import Example

__all__ = ["Protection", "protect"]

UNKNOWN = Example(id="")
"""A row of the Trainer's that was cut or packed, so that it is not found again."""

FOLDER = "retain"
"""The strategy's state in a checkpoint of the Trainer's."""


def protect(
    trainer: Trainer,
    strategy: Strategy,
    *,
    task: str = "task",
    base: Literal["self", "off"] | Sequence[str | Mapping[str, Any]] = "self",
    base_rows: int = 64,
    memory: Path | str | None = None,
) -> "Protection":
    """Let a strategy act on a Trainer; call it before `trainer.train()`, also when a checkpoint is resumed.

    Args:
        trainer: with its data set; rows of token ids, labels and texts.
        strategy: without memory, or with that of an earlier task.
        task: the name of what is learned, its own for every Trainer.
        base: what stands for the base model's abilities, where there is no memory yet: text that it writes itself
            (`self`), texts, rows with the columns of `trainer.train_dataset`, or nothing (`off`).
        base_rows: how many of them it writes.
        memory: a folder that `Protection.consolidate` wrote.

    Raises:
        CompatibilityError: the strategy needs more than a Trainer gives, or the Trainer uses fp16 or DeepSpeed.
    """
    return Protection(trainer, strategy, task=task, base=base, base_rows=base_rows, memory=memory)


class Protection(TrainerCallback):
    """A strategy at work in a Trainer; made by `protect`."""

    def __init__(
        self,
        trainer: Trainer,
        strategy: Strategy,
        *,
        task: str,
        base: Literal["self", "off"] | Sequence[str | Mapping[str, Any]],
        base_rows: int,
        memory: Path | str | None,
    ) -> None:
        self.trainer, self.strategy = trainer, strategy
        method = cast("TaskMethod", TrainerMethod(isinstance(self.model, PeftModel)))  # its names are no class's
        refuse(trainer, strategy, method)
        rows = [dict(row) for row in cast("Iterable[Mapping[str, Any]]", trainer.train_dataset)]
        self.task = TrainerTask(
            name=task,
            examples=[example_of(row, task=task) for row in rows],
            columns=tuple(rows[0]),
            collate=cast("Callable[..., Any]", trainer.get_train_dataloader().collate_fn),
            method=method,
            autocast=trainer.compute_loss_context_manager,
            device=trainer.args.device,
            batch_size=trainer.args.per_device_train_batch_size,
            seed=trainer.args.seed,
            tokenizer=trainer.processing_class,
            kind=TrainerTask.kind_of(self.model),
        )
        strategy.bind(method)
        if memory is not None:
            strategy.restore(self.model, load_state(Path(memory)))
        elif base != "off" and strategy.remembers:
            strategy.after_task(self.model, self._base(base, base_rows))
        if strategy.before_task(self.model, self.task) is not self.model:
            raise CompatibilityError(
                f"{strategy.name!r} exchanges the model, which a Trainer does not allow", hint="use `retain train`"
            )
        self._mix(rows)
        self._take_steps()
        trainer.add_callback(self)

    @property
    def model(self) -> nn.Module:
        """The Trainer's model without what `accelerate` wrapped around it."""
        return cast("nn.Module", self.trainer.accelerator.unwrap_model(cast("nn.Module", self.trainer.model)))

    def _base(self, base: str | Sequence[str | Mapping[str, Any]], num: int) -> TrainerTask:
        """The task that stands for the base model."""
        rows: Sequence[Example]
        if isinstance(base, str):
            rows = write_self_text(self.model, self.task, num=num, seed=self.task.seed, chat=self.task.chat)
        else:
            rows = [self.task.example(row, name="base") for row in base]
        return replace(self.task, name="base", examples=rows)

    def _mix(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Give the Trainer the strategy's mixture, where it is another than the rows that it has."""
        mixed = self.strategy.mix_examples(self.task, 0)
        self.known = {tuple(self.task.row(example).get("input_ids", ())): example for example in mixed}
        if [example.id for example in mixed] == [example.id for example in self.task.examples]:
            return
        from datasets import Dataset

        columns = {name: [self.task.row(example).get(name) for example in mixed] for name in self.task.columns}
        self.trainer.train_dataset = Dataset.from_dict(columns)

    def _take_steps(self) -> None:
        """Put the strategy where its places in a step are."""
        trainer, strategy = self.trainer, self.strategy
        clip, norm, loss_of = trainer._clip_grad_norm, trainer._get_grad_norm, trainer.compute_loss  # pyright: ignore[reportPrivateUsage]
        clips = trainer.args.max_grad_norm > 0

        def edit() -> None:
            strategy.edit_gradients(self.model)
            with torch.no_grad():
                strategy.add_penalty(self.model)

        def clip_edited(model: nn.Module) -> Any:
            edit()
            return clip(model)

        def norm_of_edited(model: nn.Module, grad_norm: Any = None) -> Any:
            if not clips:
                edit()
            return norm(model, grad_norm=grad_norm)

        def loss_with_term(
            model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            training = model.training
            batch = self.task.batch_of(inputs, self._examples(inputs)) if training else None
            found = loss_of(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            if batch is None:
                return found
            term = strategy.loss_term(model, batch, self.task.forward(model, batch))
            if term is None:
                return found
            scaled = term / self._divisor(batch.counted, num_items_in_batch)
            return (found[0] + scaled, found[1]) if return_outputs else found + scaled

        trainer._clip_grad_norm = clip_edited  # pyright: ignore[reportPrivateUsage]
        trainer._get_grad_norm = norm_of_edited  # pyright: ignore[reportPrivateUsage]
        if has_loss_term(strategy):  # it costs a pass of its own: SFTTrainer's makes no logits
            trainer.compute_loss = loss_with_term

    def _examples(self, inputs: Mapping[str, Any]) -> list[Example]:
        """The examples of a batch that the Trainer's loader made, found by their tokens."""
        ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        if ids is None:
            return [UNKNOWN] * len(inputs["labels"])
        if positions is not None and len(ids) == 1:
            starts = positions[0].eq(0).nonzero().flatten().tolist()
            rows = [ids[0, start:end] for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
        else:
            whole = torch.ones_like(ids) if mask is None else mask
            rows = [row[kept.bool()] for row, kept in zip(ids, whole, strict=True)]
        return [self.known.get(tuple(row.tolist()), UNKNOWN) for row in rows]

    def _divisor(self, counted: Tensor, num_items_in_batch: Any) -> Any:
        """What the Trainer divides nats by, so that the term has the loss's scale."""
        if num_items_in_batch is None:
            return counted.sum().clamp(min=1)
        several = self.trainer.args.average_tokens_across_devices
        return num_items_in_batch / (self.trainer.accelerator.num_processes if several else 1)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the strategy's state of the checkpoint that the Trainer resumes."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FOLDER
        if state.global_step and folder.exists():
            self.strategy.restore(self.model, load_state(folder))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The weights have moved, and the gradients are still there."""
        optimizer = cast("torch.optim.Optimizer", self.trainer.optimizer)
        self.strategy.after_step(self.model, float(optimizer.param_groups[0]["lr"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the strategy's state beside the Trainer's."""
        if distributed.is_main():
            save_state(
                self.strategy.state_dict(), Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FOLDER
            )

    def consolidate(self, folder: Path | str | None = None) -> None:
        """After the training: keep what the next task must not lose, in the strategy and, where named, in a folder."""
        self.strategy.after_task(self.model, self.task)
        if folder is not None:
            self.save(folder)

    def save(self, folder: Path | str) -> None:
        """Write the strategy's memory."""
        if distributed.is_main():
            save_state(self.strategy.state_dict(), Path(folder))
        distributed.barrier()


def has_loss_term(strategy: Strategy) -> bool:
    """Does it, or one of a chain, look at outputs?"""
    return any(type(link).loss_term is not Strategy.loss_term for link in links(strategy))


def refuse(trainer: Trainer, strategy: Strategy, method: TaskMethod) -> None:
    """Raise where a strategy would not act as it should.

    Raises:
        CompatibilityError: with the reason.
    """
    problems: list[str] = []
    if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        problems.append("the Trainer has no training data of a known length")
    if strategy.needs_task_name or strategy.stands_alone:
        problems.append(f"{strategy.name!r} changes the model or the training from task to task")
    problems += [
        f"{link.name!r} reads and writes rows as text, and a Trainer's rows are token ids"
        for link in links(strategy)
        if link.reads_text
    ]
    if reason := strategy.supports(method):
        problems.append(f"{strategy.name!r}: {reason}")
    if trainer.args.fp16:
        problems.append("in fp16 the gradients are scaled before clipping; bf16 is not")
    if trainer.is_deepspeed_enabled:
        problems.append("DeepSpeed clips and steps inside its engine")
    if trainer.optimizer is not None:
        problems.append("the optimizer exists already: protect the Trainer before it trains")
    if not trainable(cast("nn.Module", trainer.model)):
        problems.append("nothing of the model is trainable")
    if problems:
        raise CompatibilityError(
            "this Trainer cannot be protected", problems=problems, hint="use `retain train`, or another strategy"
        )
