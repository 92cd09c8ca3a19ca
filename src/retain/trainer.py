"""The one loop: every family, method and strategy is trained here, one task at a time."""

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retain import distributed
from retain.checkpoint import load_checkpoint, save_checkpoint
from retain.data.packing import schedule
from retain.errors import CompatibilityError, DataError, DivergedError
from retain.models.family import pretrained
from retain.parameters import trainable
from retain.strategies.strategy import State, Strategy
from retain.task_view import BoundTask, overflow_notes
from retain.train_config import TrainConfig
from retain.types import Encoded, Example, StepInfo

__all__ = ["Observer", "TrainResult", "learning_rate", "train_helper", "train_task"]

WORTH_KEEPING = 60.0
"""Seconds of training from which a checkpoint is written after the last step: what follows may be interrupted."""

LOOKED_AT = 256
"""Rows whose loss stands for all where a model counts."""

Observer = Callable[[StepInfo], None]
"""Looks at a step; what it returns is ignored."""


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """The rate of a step (from 0): a linear warm-up, then the schedule; a pure function, so that resuming is exact."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(num_steps - warmup, 1)
    match config.lr_scheduler_type:
        case "linear":
            return config.learning_rate * (1 - progress)
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return config.learning_rate


@dataclass(frozen=True)
class TrainResult:
    """What `train_task` did.

    Args:
        model: the trained model; another object than was given where the strategy changed its architecture.
        history: every step.
        notes: what a user should know (rows dropped, an early stop).
        num_steps: steps taken.
    """

    model: nn.Module
    history: tuple[StepInfo, ...]
    notes: tuple[str, ...] = ()
    num_steps: int = 0


@contextmanager
def deferred_interrupts() -> Generator[Callable[[], bool]]:
    """Hold Ctrl-C and SIGTERM back until a step is whole; a second Ctrl-C stops at once.

    Yields a function that tells whether one came. Signals reach only the main thread; elsewhere nothing is held back.
    """
    came: list[int] = []

    def hold(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Best:
    """The best validation loss so far, and the weights that gave it."""

    loss: float = math.inf
    waited: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def state(self) -> State:
        """What a checkpoint keeps of it."""
        return {"loss": self.loss, "waited": self.waited, **{f"weights/{k}": v for k, v in self.weights.items()}}

    def restore(self, state: State) -> None:
        """Take it back."""
        self.loss, self.waited = state["loss"], state["waited"]
        self.weights = {key.removeprefix("weights/"): v for key, v in state.items() if key.startswith("weights/")}

    def see(self, loss: float, model: nn.Module) -> None:
        """Keep the weights of a better loss, or count one more validation without."""
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            self.weights = {name: parameter.detach().cpu().clone() for name, parameter in trainable(model).items()}
        else:
            self.waited += 1

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """Give the model the best weights."""
        for name, parameter in trainable(model).items():
            parameter.copy_(self.weights[name])


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what moves; only matrices decay.

    Raises:
        CompatibilityError: if nothing moves.
    """
    moving = list(trainable(model).values())
    if not moving:
        raise CompatibilityError(
            "the method and strategy leave nothing to train: every parameter is frozen",
            hint="check `method.target_modules`, or use `method: full`",
        )
    groups = [
        {"params": [p for p in moving if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in moving if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def steps_from(view: BoundTask, strategy: Strategy, config: TrainConfig) -> Iterator[tuple[float, list[Encoded]]]:
    """Endless steps: where in which epoch each is, and its rows over all processes; a function of the seed alone."""
    epoch = 0
    while True:
        rows, _ = view.rows(strategy.mix_examples(view, epoch), epoch)
        lengths = None if view.packed else [row.num_tokens for row in rows]
        plan = schedule(len(rows), rows_per_step=config.rows_per_step, seed=config.seed, epoch=epoch, lengths=lengths)
        for at, step in enumerate(plan):
            yield epoch + at / len(plan), [rows[i] for i in step]
        epoch += 1


def train_task(
    model: nn.Module,
    view: BoundTask,
    *,
    strategy: Strategy,
    config: TrainConfig,
    validation: Sequence[Example] = (),
    observers: Sequence[Observer] = (),
    folder: Path | None = None,
    keep_last: bool = False,
) -> TrainResult:
    """Train a model on one task, under a strategy.

    Losses are normalised by the counted targets of the whole step, so micro-batches, padding, packing and the number of
    processes change nothing. Consolidation (`strategy.after_task`) is the caller's next step.

    Args:
        model: with what moves marked by `requires_grad`.
        view: the task, bound to family, tokenizer and method.
        strategy: what protects old abilities.
        config: how to train.
        validation: rows for `eval_steps` and early stopping.
        observers: called after every step.
        folder: where checkpoints go; one that lies there is continued, bit for bit.
        keep_last: write a checkpoint after the last step, also where training was short.

    Raises:
        DataError: if no row is left to train on.
        DivergedError: if the loss or gradient is NaN or infinite; the weights are those before that step.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    model = strategy.before_task(model, view)
    if not view.family.needs_gradients:
        return count_task(model, view, strategy=strategy, validation=validation, observers=observers)
    rows, counts = view.rows(strategy.mix_examples(view, 0))
    if not rows:
        raise no_row(view)
    steps_per_epoch = math.ceil(len(rows) / config.rows_per_step)
    num_steps = max(1, math.ceil(steps_per_epoch * config.num_train_epochs))
    if config.max_steps:
        num_steps = math.ceil(config.max_steps * strategy.steps_factor)

    optimizer = make_optimizer(model, config)
    torch.manual_seed(config.seed + distributed.rank())
    history: list[StepInfo] = []
    best = Best()
    first = 0
    if folder is not None and (checkpoint := load_checkpoint(folder, model=model, optimizer=optimizer)) is not None:
        model = strategy.restore(model, part_of(checkpoint.strategy_state, "strategy/"))
        best.restore(part_of(checkpoint.strategy_state, "best/"))
        history = [StepInfo(**info) for info in checkpoint.position["history"]]
        first = len(history)

    def save() -> None:
        if folder is not None:
            position: Mapping[str, Any] = {"history": [asdict(info) for info in history]}
            parts = {"strategy/": strategy.state_dict(), "best/": best.state()}
            state = {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}
            save_checkpoint(folder, model=model, optimizer=optimizer, position=position, strategy_state=state)

    model.train()
    if config.gradient_checkpointing:
        pretrained(model).activation_checkpointing_enable({"use_reentrant": False})
    notes = [f"task {view.name}: {note}" for note in (*overflow_notes(counts), *strategy.notes)]
    started = time.perf_counter()
    with deferred_interrupts() as interrupted:
        for step, (epoch, group) in enumerate(steps_from(view, strategy, config)):
            if step >= num_steps:
                break
            if step < first:
                continue
            rate = learning_rate(config, step, num_steps)
            figures = take_step(model, group, view, strategy, optimizer, rate, config, save)
            loss = None
            if config.eval_steps and validation and (step + 1) % config.eval_steps == 0:
                loss = view.mean_loss(model, validation)
                best.see(loss, model)
            seconds, started = time.perf_counter() - started, time.perf_counter()
            info = StepInfo(
                task=view.name, step=step + 1, num_steps=num_steps, epoch=epoch, learning_rate=rate,
                seconds=seconds, validation_loss=loss, **figures,
            )  # fmt: skip
            history.append(info)
            for observer in observers:
                observer(info)
            if interrupted():
                save()
                raise KeyboardInterrupt
            if config.save_steps and (step + 1) % config.save_steps == 0:
                save()
            if config.early_stopping_patience and best.waited >= config.early_stopping_patience:
                notes.append(f"stopped early after step {step + 1}: no better validation loss than {best.loss:.4f}")
                break
    if len(history) > first and (keep_last or sum(info.seconds for info in history) > WORTH_KEEPING):
        save()
    if config.early_stopping_patience and best.weights:
        best.put_back(model)
    if config.gradient_checkpointing:
        pretrained(model).activation_checkpointing_disable()
    model.eval()
    return TrainResult(model, tuple(history), tuple(notes), len(history))


def count_task(
    model: nn.Module,
    view: BoundTask,
    *,
    strategy: Strategy,
    validation: Sequence[Example],
    observers: Sequence[Observer],
) -> TrainResult:
    """Let a model that learns by counting count the strategy's mixture once; every process counts all of it.

    The one step's loss is that of `LOOKED_AT` rows before they are counted, as every step's is.

    Raises:
        DataError: if there is no row.
    """
    examples = strategy.mix_examples(view, 0)
    if not examples:
        raise no_row(view)
    started = time.perf_counter()
    loss = view.mean_loss(model, examples[:LOOKED_AT])
    view.family.fit(model, examples, view.renderer)
    rows = [view.encode(example) for example in examples]
    info = StepInfo(
        task=view.name, step=1, num_steps=1, epoch=0.0, loss=loss, penalty=0.0, learning_rate=0.0, gradient_norm=0.0,
        num_tokens=sum(row.num_tokens for row in rows), num_targets=sum(row.num_targets for row in rows),
        seconds=time.perf_counter() - started,
        validation_loss=view.mean_loss(model, validation) if validation else None,
    )  # fmt: skip
    for observer in observers:
        observer(info)
    notes = ["rows are counted once and whole; `train` has no further effect on a model that counts", *strategy.notes]
    return TrainResult(model.eval(), (info,), tuple(notes), 1)


def no_row(view: BoundTask) -> DataError:
    """The error of a task without rows."""
    return DataError(
        f"task {view.name!r} has no row to train on", hint="`retain data check FILE` shows what became of each row"
    )


def train_helper(model: nn.Module, view: BoundTask, *, config: TrainConfig) -> nn.Module:
    """Train a strategy's own network on the rows of a view, without protection, checkpoints or validation."""
    plain = replace(config, eval_steps=0, early_stopping_patience=0, save_steps=0)
    return train_task(model, view, strategy=Strategy(), config=plain).model


def part_of(state: State, prefix: str) -> State:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def take_step(
    model: nn.Module,
    group: Sequence[Encoded],
    view: BoundTask,
    strategy: Strategy,
    optimizer: torch.optim.Optimizer,
    rate: float,
    config: TrainConfig,
    save: Callable[[], None],
) -> dict[str, Any]:
    """One optimizer step, whole: the order that `strategies.strategy` promises."""
    moving = list(trainable(model).values())
    targets = max(sum(row.num_targets for row in group), 1)  # counted targets of the global batch
    total = torch.zeros((), device=view.device)
    for batch in view.collate(group[distributed.rank() :: distributed.world_size()]):
        outputs = view.forward(model, batch)
        loss = view.loss(outputs, batch)
        total += loss.detach()
        with distributed.autocast(view.precision):
            term = strategy.loss_term(model, batch, outputs)
        ((loss if term is None else loss + term) / targets).backward()
    distributed.sum_gradients(moving)
    strategy.edit_gradients(model)  # the data loss's gradients: complete, unclipped
    penalty = strategy.add_penalty(model)  # once a step, without a graph
    limit = config.max_grad_norm or math.inf
    norm = float(nn.utils.clip_grad_norm_(moving, limit))
    mean = distributed.sum_number(float(total)) / targets
    value = 0.0 if penalty is None else float(penalty)
    if not math.isfinite(mean + norm + value):
        optimizer.zero_grad()
        save()
        raise DivergedError(
            f"task {view.name!r}: training diverged: loss {mean}, penalty {value}, gradient norm {norm}",
            problems=[f"the learning rate was {rate:g}; the weights are those before this step"],
            hint="lower train.learning_rate or the strategy's strength, or look at the data with `retain data check`",
        )
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    strategy.after_step(model, rate)
    return {
        "loss": mean, "penalty": value, "gradient_norm": norm,
        "num_tokens": sum(row.num_tokens for row in group), "num_targets": targets,
    }  # fmt: skip
