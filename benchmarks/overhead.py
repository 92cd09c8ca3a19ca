"""What strategies add to an optimizer step, and what the Fisher costs beside training on the same rows.

    python benchmarks/overhead.py [--model smollm2-135m] [--tokens 256 1024] [--repeats 15] [--samples 64]

Steps of all strategies are taken in turn on one model, so that what else the machine does falls on all of them; a row's
ratio is the median of its ratios to the sequential step of the same turn. Written to results/overhead.md.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from retain import distributed
from retain.data.rendering import Renderer
from retain.kernels.importance import diagonal_fisher
from retain.kernels.low_rank import only_moving
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.methods.method import Method
from retain.models.source import open_source
from retain.parameters import cast_frozen, num_bytes, trainable
from retain.strategies.ewc import EWC
from retain.strategies.l2 import L2
from retain.strategies.mas import MAS
from retain.strategies.replay import Replay
from retain.strategies.si import SI
from retain.strategies.strategy import Strategy
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import make_optimizer, take_step
from retain.types import Encoded, Example

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, Callable[[], Method]] = {"lora": LoRA, "full": Full}
WORDS = ["the", "model", "reads", "a", "row", "of", "text", "and", "learns", "what", "comes", "next"]
ROW = 64
"""Words of a row, about as many tokens."""


def strategies(method: str) -> dict[str, Strategy]:
    """What is compared; each is consolidated on a few rows first."""
    found: dict[str, Strategy] = {"sequential": Strategy(), "ewc": EWC(num_samples=4)}
    if method == "lora":
        found["ewc, space of weights"] = EWC(num_samples=4, space="weights")
    return {
        **found, "si": SI(num_samples=4), "mas": MAS(num_samples=4), "l2": L2(strength=0.1),
        "replay": Replay(ratio=0.25),
    }  # fmt: skip


def rows_of(num: int, *, task: str, seed: int) -> list[Example]:
    """Rows of random words."""
    draw = random.Random(seed)
    return [
        Example(id=f"{task} {i}", text=" ".join(draw.choices(WORDS, k=ROW)), task=task) for i in range(num)
    ]  # fmt: skip


def view_of(view: BoundTask, name: str, examples: Sequence[Example]) -> BoundTask:
    """The same view of other rows."""
    return replace(view, name=name, examples=examples)


def step_rows(strategy: Strategy, view: BoundTask, tokens: int) -> list[Encoded]:
    """The rows of a step of about so many tokens, of which the strategy's old ones have their share."""
    mixed = list(strategy.mix_examples(view, 0))
    random.Random(0).shuffle(mixed)
    rows, _ = view.rows(mixed)
    taken: list[Encoded] = []
    while sum(row.num_tokens for row in taken) < tokens:
        taken.append(rows[len(taken) % len(rows)])
    return taken


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor of a strategy's memory."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors_in(part)]
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list) else []


def memory_of(strategy: Strategy) -> tuple[int, int]:
    """Bytes of tensors that are kept, and those that are held while a task is learned."""
    kept = num_bytes(tensors_in(strategy.state_dict()))
    return kept, num_bytes(tensors_in(list(vars(strategy).values())))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and the quartiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def shown(ratios: Sequence[float]) -> str:
    """`+2.1 % (+1.8 to +2.6)`."""
    middle, low, high = (100 * (value - 1) for value in quantiles(ratios))
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def timed(action: Callable[[], object]) -> float:
    """Seconds; on a CPU those that the process computed, so that what else the machine does hardly counts."""
    device = distributed.device().type
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def step_table(
    name: str, model: nn.Module, view: BoundTask, config: TrainConfig, sizes: Sequence[int], repeats: int
) -> list[str]:
    """Lines on the steps of every strategy."""
    compared = strategies(name)
    base = view_of(view, "base", rows_of(8, task="base", seed=1))
    old = view_of(view, "old", rows_of(32, task="old", seed=2))
    new = view_of(view, "new", rows_of(64, task="new", seed=3))
    for strategy in compared.values():
        strategy.bind(view.method)
        strategy.before_task(model, base)
        strategy.after_task(model, old if isinstance(strategy, Replay) else base)
        strategy.before_task(model, new)
    optimizer = make_optimizer(model, config)
    model.train()
    seconds: dict[tuple[str, int], list[float]] = {(key, size): [] for key in compared for size in sizes}
    memory: dict[str, tuple[int, int]] = {}
    for size in sizes:
        groups = {key: step_rows(strategy, new, size) for key, strategy in compared.items()}
        for turn in range(repeats + 1):
            for key, strategy in compared.items():

                def step(strategy: Strategy = strategy, group: list[Encoded] = groups[key]) -> None:
                    take_step(model, group, new, strategy, optimizer, 1e-9, config, lambda: None)

                spent = timed(step)
                if turn:  # the first makes buffers
                    seconds[key, size].append(spent)
                memory[key] = memory_of(strategy)
        print(f"{name}: {size} tokens a step done", file=sys.stderr)
    model.eval()
    optimizer.zero_grad()
    columns = " | ".join(f"step of {size} tokens, s | over sequential" for size in sizes)
    lines = [
        f"| strategy | {columns} | kept, MB | while learning, MB |",
        "|---|" + "--:|--:|" * len(sizes) + "--:|--:|",
    ]
    for key in compared:
        cells: list[str] = []
        for size in sizes:
            own, plain = seconds[key, size], seconds["sequential", size]
            ratios = [a / b for a, b in zip(own, plain, strict=True)]
            cells += [f"{quantiles(own)[0]:.3f}", "" if key == "sequential" else shown(ratios)]
        kept, held = memory[key]
        lines.append(f"| {key} | {' | '.join(cells)} | {kept / 1e6:.1f} | {held / 1e6:.1f} |")
    return lines


def fisher_table(name: str, model: nn.Module, view: BoundTask, samples: int, repeats: int) -> list[str]:
    """Lines on the Fisher over rows beside one training pass over the same rows."""
    rows = rows_of(samples, task="fisher", seed=4)
    own = view_of(view, "fisher", rows)

    def train() -> None:
        for batch in own.batches(rows):
            own.loss(own.forward(model, batch), batch).backward()
        model.zero_grad()

    def fisher() -> None:
        diagonal_fisher(model, own, num_samples=samples)

    def of_weights() -> None:
        with only_moving(model, [change.weight for change in view.method.low_rank(model)]):
            fisher()

    actions = {"training pass": train, "fisher": fisher}
    if name == "lora":
        actions = {"training pass": train, "fisher, space of A and B": fisher, "fisher, space of weights": of_weights}
    seconds: dict[str, list[float]] = {key: [] for key in actions}
    for turn in range(repeats + 1):
        for key, action in actions.items():
            spent = timed(action)
            if turn:
                seconds[key].append(spent)
    lines = [f"| over {samples} rows of {ROW} words | seconds | times a training pass |", "|---|--:|--:|"]
    for key, own_seconds in seconds.items():
        ratios = [a / b for a, b in zip(own_seconds, seconds["training pass"], strict=True)]
        middle, low, high = quantiles(ratios)
        lines.append(f"| {key} | {quantiles(own_seconds)[0]:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="of a step")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--samples", type=int, default=64, help="rows that the Fisher is measured on")
    parser.add_argument("--fisher-repeats", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.md")
    arguments = parser.parse_args()
    config = TrainConfig(precision=arguments.precision)
    precision = distributed.resolve_precision(config.precision)
    source = open_source(arguments.model)
    lines = [
        "# What strategies cost", "",
        f"{arguments.model}, {precision}, {torch.get_num_threads()} thread(s) on {distributed.device().type} "
        f"({os.cpu_count()} cores). Medians of {arguments.repeats} steps, taken in turn, with quartiles. "
        "Seconds on a CPU are of computing, not of waiting. Kept: the memory; while learning: with buffers. EWC, SI, "
        "MAS and L2 hold one old stage; a quarter of replay's tokens are old, and a step has as many tokens as "
        "without.", "",
    ]  # fmt: skip
    for name in arguments.methods:
        method = METHODS[name]()
        model, tokenizer = source.load((), seed=0)
        torch.manual_seed(0)
        model = method.apply(model.to(distributed.device())).eval()
        if precision == "bf16":
            cast_frozen(model, torch.bfloat16)
        view = BoundTask(
            name="new", examples=(), family=source.family, renderer=Renderer(tokenizer), method=method,
            max_length=config.max_length, max_tokens=config.max_tokens_per_batch,
            packed=source.family.isolates_documents and method.packs, precision=precision,
        )  # fmt: skip
        moving = sum(parameter.numel() for parameter in trainable(model).values())
        lines += [f"## {name}: {moving / 1e6:.1f} million weights move", ""]
        lines += step_table(name, model, view, config, arguments.tokens, arguments.repeats)
        lines += ["", *fisher_table(name, model, view, arguments.samples, arguments.fisher_repeats), ""]
    text = "\n".join(lines)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
