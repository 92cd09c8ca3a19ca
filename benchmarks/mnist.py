"""Split-MNIST and Permuted-MNIST with the strategies of this package in a plain PyTorch loop, beside a peer's results.

    python benchmarks/mnist.py --data FOLDER [--peer FILE] [--experiments split permuted] [--seeds 3]

FOLDER holds train.npz and test.npz, with `x`, (rows, 28, 28) of uint8, and `y`, the digits. FILE is JSON: `name`,
`notes`, and `runs` like those of `--cache`, made on the contexts that `contexts_of` gives for the same seeds, starting
from the weights of `Network`. Both sides' strengths are chosen by `chosen`: on rows of train that are not trained on,
in the order of a seed that is not scored. With `fisher`, a .npz beside FILE, the diagonals are compared, too.
Finished runs stay in `--cache`: the command can be interrupted. The tables are written to results/mnist.md.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from retain.evaluation.statistics import interval, is_noise
from retain.kernels.fisher import Kind
from retain.kernels.importance import diagonal_fisher
from retain.strategies import Strategy
from retain.strategies.ewc import EWC
from retain.strategies.replay import Replay
from retain.strategies.sequential import Sequential
from retain.strategies.si import SI
from retain.types import Batch, Example

RESULTS = Path(__file__).parent / "results" / "mnist.md"

TUNING_SEED = 1000  # strengths are chosen on its validation rows; nothing depends on its test rows
BATCH_SIZE, HIDDEN, FISHER_ROWS = 128, 400, 500
LEARNING_RATE, VALIDATION_SHARE = 1e-3, 0.1

INTRODUCTION = f"""\
# Split-MNIST and Permuted-MNIST beside a peer

Accuracy on test rows after the last context, in %, the mean over contexts: mean ± standard error over seeds. Forgotten:
how much higher it was right after the context. MLP of 2 x {HIDDEN} ReLU, Adam {LEARNING_RATE:g} that is not reset,
batch {BATCH_SIZE}, {{iterations}} iterations a context on both sides. For a seed both have the same rows, contexts and
first weights, so differences are paired by seed; their 95 % interval is as wide as a t interval.

Strengths are chosen on rows held out from train, under a seed that is not scored. Our EWC divides each context's Fisher
by its mean, so that its strength is the peer's lambda times that mean, another one for each context; it was scanned.
EWC is separate for each context, its Fisher from {FISHER_ROWS} rows; SI in the authors' units, damping 0.1; replay has
1000 rows in all, every class alike, and as many old rows a step as new ones.
"""

Run = dict[str, Any]
"""experiment, strategy, strength, seed, iterations; validation, test: the accuracy on every context at the end;
learned: the test accuracy on each context right after it; seconds."""


class Experiment(NamedTuple):
    """A stream of contexts, and the strengths that are tried on it."""

    num_contexts: int
    num_heads: int
    num_classes: int  # of a head
    fisher: Kind  # on both sides
    strengths: Mapping[str, Sequence[float]]


EXPERIMENTS = {
    "split": Experiment(5, 5, 2, "exact", {"ewc": [0.1, 1.0, 10.0, 100.0], "si": [10.0, 100.0, 1000.0]}),
    "permuted": Experiment(5, 1, 10, "sampled", {"ewc": [0.003, 0.03, 0.3], "si": [1.0, 10.0, 100.0]}),
}

STRATEGIES = ("sequential", "ewc", "si", "replay")


def strategy_of(name: str, strength: float, experiment: Experiment) -> Strategy:
    """A strategy by the settings that the peer has, too."""
    match name:
        case "ewc":
            return EWC(strength, fisher=experiment.fisher, num_samples=FISHER_ROWS, mode="separate")
        case "si":
            return SI(strength, damping=0.1, normalise=False)
        case "replay":
            return Replay(1000, ratio=0.5, selection="class")
        case _:
            return Sequential()


class Rows(NamedTuple):
    """Digits of one context: (rows, 784) of uint8, and the class within the head, (rows,)."""

    images: Tensor
    labels: Tensor


class Context(NamedTuple):
    """One context's rows, and the head that answers for it."""

    name: str
    head: int
    train: Rows
    validation: Rows
    test: Rows


def contexts_of(experiment: Experiment, folder: Path, seed: int) -> list[Context]:
    """The contexts of a seed: which digits, or which permutation of pixels; a tenth of train is held out."""
    generator = np.random.default_rng(seed)
    files = [np.load(folder / f"{part}.npz") for part in ("train", "test")]
    images = [torch.from_numpy(file["x"].reshape(-1, 784)) for file in files]
    digits = [torch.from_numpy(file["y"].astype(np.int64)) for file in files]
    held_out = torch.from_numpy(generator.random(len(digits[0])) < VALIDATION_SHARE)
    classes = torch.from_numpy(generator.permutation(10))  # the place of each digit
    contexts: list[Context] = []
    for index in range(experiment.num_contexts):
        head, order, labels = 0, generator.permutation(784), digits
        if experiment.num_heads > 1:
            head, order, labels = index, np.arange(784), [classes[d] - index * experiment.num_classes for d in digits]
        train, test = (Rows(pixels[:, order], label) for pixels, label in zip(images, labels, strict=True))
        mine = [(label >= 0) & (label < experiment.num_classes) for label in labels]
        which = ((train, mine[0] & ~held_out), (train, mine[0] & held_out), (test, mine[1]))
        rows = [Rows(whole.images[mask], whole.labels[mask]) for whole, mask in which]
        contexts.append(Context(f"context {index + 1}", head, *rows))
    return contexts


class Network(nn.Module):
    """Two hidden layers of ReLU and one output layer of several heads: (rows, 1, 784) to (rows, 1, heads, classes)."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads = (experiment.num_heads, experiment.num_classes)
        self.first, self.second = nn.Linear(784, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, experiment.num_heads * experiment.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(images))))
        return self.output(hidden).unflatten(-1, self.heads)


class AtTargets(NamedTuple):
    """The logits of a pass at its targets."""

    hidden: Tensor

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def logits(self) -> Tensor:
        return self.hidden


@dataclass(frozen=True)
class DigitTask:
    """A context as strategies see it: the members of `strategies.TaskView` that these strategies call."""

    name: str
    seed: int
    seen: Sequence[Context]  # this one last; rows that are replayed are looked up in them

    @cached_property
    def examples(self) -> list[Example]:
        labels = self.seen[-1].train.labels.tolist()
        return [Example(f"{self.name}/{i}", text=str(label), task=self.name) for i, label in enumerate(labels)]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each context's rows begin among all."""
        sizes = [len(context.train.labels) for context in self.seen]
        return {context.name: sum(sizes[:index]) for index, context in enumerate(self.seen)}

    @cached_property
    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and heads of all rows."""
        heads = [torch.full_like(context.train.labels, context.head) for context in self.seen]
        images = torch.cat([context.train.images for context in self.seen])
        return images, torch.cat([context.train.labels for context in self.seen]), torch.cat(heads)

    def num_tokens(self, example: Example) -> int:
        return 1

    def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Iterator[Batch]:
        images, labels, heads = self.stacked
        size = max_tokens or max(len(examples), 1)
        for start in range(0, len(examples), size):
            rows = tuple(examples[start : start + size])
            at = torch.tensor([self.offsets[row.task] + int(row.id.rpartition("/")[2]) for row in rows])
            inputs = {"images": scaled(images[at]), "heads": heads[at]}
            documents = torch.arange(len(rows))[:, None]  # (rows, 1): a row is a sequence of one target
            yield Batch(inputs, labels[at][:, None], documents, torch.ones(len(rows)), rows)

    def forward(self, model: nn.Module, batch: Batch) -> AtTargets:
        logits = model(batch.inputs["images"])[:, 0]  # (rows, heads, classes)
        return AtTargets(logits[torch.arange(len(logits)), batch.inputs["heads"]])


def scaled(images: Tensor) -> Tensor:
    """(rows, 1, 784) in [0, 1]."""
    return images[:, None].float() / 255


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows, head: int) -> float:
    """The share of rows whose class, among those of the head, is the likeliest."""
    return float((model(scaled(rows.images))[:, 0, head].argmax(-1) == rows.labels).float().mean())


def learn(model: nn.Module, optimizer: Optimizer, strategy: Strategy, task: DigitTask, iterations: int) -> None:
    """One context: all that a training loop has to do for a strategy."""
    model = strategy.before_task(model, task)
    step = epoch = 0
    while step < iterations:
        rows = list(strategy.mix_examples(task, epoch))
        random.Random(f"{task.seed}/{task.name}/{epoch}").shuffle(rows)
        size = round(BATCH_SIZE * len(rows) / len(task.examples))  # as many new rows a step, whatever is mixed in
        for start in range(0, len(rows) - size + 1, size)[: iterations - step]:
            (batch,) = task.batches(rows[start : start + size])
            outputs = task.forward(model, batch)
            loss = F.cross_entropy(outputs.logits(), batch.targets[batch.counted])
            term = strategy.loss_term(model, batch, outputs)
            (loss if term is None else loss + term / size).backward()
            strategy.edit_gradients(model)
            strategy.add_penalty(model)
            optimizer.step()
            optimizer.zero_grad()
            strategy.after_step(model, LEARNING_RATE)
            step += 1
        epoch += 1
    strategy.after_task(model, task)


def run(experiment: str, strategy: str, strength: float, seed: int, *, folder: Path, iterations: int) -> Run:
    """All contexts in turn, one optimizer throughout."""
    stream = EXPERIMENTS[experiment]
    contexts = contexts_of(stream, folder, seed)
    model, acting = Network(stream, seed), strategy_of(strategy, strength, stream)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    start = time.process_time()
    learned: list[float] = []
    for index, context in enumerate(contexts):
        learn(model, optimizer, acting, DigitTask(context.name, seed, contexts[: index + 1]), iterations)
        learned.append(accuracy(model, context.test, context.head))
    seconds = time.process_time() - start
    return {
        "experiment": experiment, "strategy": strategy, "strength": strength, "seed": seed, "iterations": iterations,
        "validation": [accuracy(model, context.validation, context.head) for context in contexts],
        "test": [accuracy(model, context.test, context.head) for context in contexts],
        "learned": learned, "seconds": round(seconds, 1),
    }  # fmt: skip


def chosen(runs: Sequence[Run], name: str, strategy: str) -> float:
    """The strength that did best on validation rows under the tuning seed, the weakest of equals; 0 for none tried."""
    tuned = [r for r in runs if (r["experiment"], r["strategy"], r["seed"]) == (name, strategy, TUNING_SEED)]
    best = max(sorted(tuned, key=itemgetter("strength")), key=lambda r: np.mean(r["validation"]), default=None)
    return best["strength"] if best else 0.0


def load_runs(cache: Path, iterations: int) -> list[Run]:
    """The finished runs of as many iterations, a line of JSON each."""
    lines = cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []
    return [r for r in map(json.loads, lines) if r["iterations"] == iterations]


def run_all(name: str, seeds: range, cache: Path, folder: Path, iterations: int) -> None:
    """The strengths under the tuning seed, then every strategy with the best one under every seed."""

    def finish(strategy: str, strength: float, seed: int) -> None:
        key: dict[str, Any] = {"experiment": name, "strategy": strategy, "strength": strength, "seed": seed}
        if not any(key.items() <= r.items() for r in load_runs(cache, iterations)):
            done = run(**key, folder=folder, iterations=iterations)
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done) + "\n")
            print(*key.values(), f"{final(done):.2f}", flush=True)

    for strategy in STRATEGIES:
        for strength in EXPERIMENTS[name].strengths.get(strategy, ()):
            finish(strategy, strength, TUNING_SEED)
        for seed in seeds:
            finish(strategy, chosen(load_runs(cache, iterations), name, strategy), seed)


def scored(runs: Sequence[Run], name: str, strategy: str) -> list[Run]:
    """Those that count: of the chosen strength, in the order of their seeds."""
    key = (name, strategy, chosen(runs, name, strategy))
    mine = [r for r in runs if (r["experiment"], r["strategy"], r["strength"]) == key and r["seed"] != TUNING_SEED]
    return sorted(mine, key=itemgetter("seed"))


def final(run: Run) -> float:
    """Test accuracy after the last context, in %."""
    return 100 * float(np.mean(run["test"]))


def forgotten(run: Run) -> float:
    """What earlier contexts lost since they were learned, in %."""
    return 100 * float(np.mean(np.subtract(run["learned"], run["test"])[:-1]))


def shown(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


def compared(ours: Sequence[Run], peer: Sequence[Run]) -> str:
    """The difference over the seeds that both have, its 95 % interval, and what it says."""
    theirs = {run["seed"]: final(run) for run in peer}
    differences = [final(run) - theirs[run["seed"]] for run in ours if run["seed"] in theirs]
    if len(differences) < 2:
        return ""
    mean = interval(differences, bounded=False)
    verdict = "within noise" if is_noise(mean) else "ours is better" if mean.mean > 0 else "ours is worse"
    return f"{mean.mean:+.2f} ({mean.low:+.2f} to {mean.high:+.2f}): {verdict}"


def table(name: str, runs: Sequence[Run], peer: Sequence[Run]) -> list[str]:
    """One experiment, a line a strategy."""
    lines = [
        "| strategy | strength | ours | forgotten | peer's strength | peer | forgotten | ours - peer |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for strategy in STRATEGIES:
        sides = [scored(side, name, strategy) for side in (runs, peer)]
        cells = [strategy]
        for side in sides:
            strength = next((f"{run['strength']:g}" for run in side if run["strength"]), "")
            cells += [strength, shown([final(run) for run in side]), shown([forgotten(run) for run in side])]
        lines.append(f"| {' | '.join([*cells, compared(*sides)])} |")
    return lines


def fisher_lines(path: Path) -> list[str]:
    """Our diagonals on the peer's weights and rows, beside the peer's, which are divided by N - 1 instead of N."""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    model = Network(EXPERIMENTS["split"], 0)
    model.load_state_dict({name: arrays[f"weights/{name}"] for name in model.state_dict()})
    rows = Rows(arrays["images"], arrays["labels"])
    task = DigitTask("context 1", 0, [Context("context 1", 0, rows, rows, rows)])
    num = len(rows.labels)
    lines: list[str] = []
    kinds: tuple[Kind, ...] = ("exact", "empirical")  # they draw nothing, so entries can be compared
    for kind in kinds:
        ours = diagonal_fisher(model, task, kind=kind, num_samples=num)
        mine = torch.cat([value.flatten() for value in ours.values()]).double() * num / (num - 1)
        theirs = torch.cat([arrays[f"{kind}/{name}"].flatten() for name in ours]).double()
        apart, ratio = (mine - theirs).abs().max() / theirs.max(), mine.sum() / theirs.sum()
        lines.append(
            f"- {kind}: sum of ours * N / (N - 1) to the peer's {ratio:.7f}; entries differ by at most {apart:.1e} of "
            f"the largest ({len(theirs):,} entries, N = {num})."
        )
    return lines


def report(runs: Sequence[Run], names: Sequence[str], peer_file: Path | None, iterations: int) -> str:
    """The tables as Markdown."""
    peer: dict[str, Any] = json.loads(peer_file.read_text(encoding="utf-8")) if peer_file else {"runs": []}
    theirs = [r for r in peer["runs"] if r["iterations"] == iterations]
    lines = [INTRODUCTION.format(iterations=iterations)]
    if peer_file:
        lines += [f"The peer: {peer['name']}.", *(f"- {note}" for note in peer["notes"]), ""]
    for name in names:
        stream = EXPERIMENTS[name]
        tried = "; ".join(f"{key} {', '.join(f'{x:g}' for x in values)}" for key, values in stream.strengths.items())
        lines += [
            f"## {name}\n\n{stream.num_contexts} contexts of {stream.num_classes} classes, {stream.num_heads} output "
            f"head(s), Fisher {stream.fisher}. Strengths tried: {tried}.\n", *table(name, runs, theirs), "",
        ]  # fmt: skip
    if peer_file and "fisher" in peer:
        lines += ["## The Fisher's diagonal", "", *fisher_lines(peer_file.parent / peer["fisher"]), ""]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, compare, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=300, help="of a context; 2000 were published")
    parser.add_argument("--cache", type=Path, default=Path("runs/mnist.jsonl"))
    arguments = parser.parse_args()
    arguments.cache.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.experiments:
        run_all(name, range(arguments.seeds), arguments.cache, arguments.data, arguments.iterations)
    runs = load_runs(arguments.cache, arguments.iterations)
    text = report(runs, arguments.experiments, arguments.peer, arguments.iterations)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
