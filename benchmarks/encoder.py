"""An encoder on banking77: beside a plain `transformers.Trainer`, and as a class-incremental stream of 7 x 11 intents.

    python benchmarks/encoder.py --data FOLDER [--part classify stream] [--seeds 0 1 2] [--rows 2000] [--test-rows 500]

FOLDER holds train.jsonl and test.jsonl with `prompt` and `completion`. What a run came to is kept in
results/encoder.json, so the command, called again, goes on where it stopped; it ends by writing results/encoder.md.
"""

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retain.config import load_config
from retain.config.recipe import write_recipe
from retain.evaluation.statistics import Interval, interval, paired_interval
from retain.lineage import Lineage
from retain.report.summary import Summary
from retain.run import train

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmark")

MODEL, MAX_LENGTH, BATCH = "minilm-l6", 64, 32
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"name": "full"}, 1e-4),
    "lora": ({"name": "lora", "r": 16, "alpha": 32.0}, 1e-3),
    "adapter": ({"name": "adapter", "size": 64}, 1e-3),
}
"""Each with its learning rate; the plain script has that of `full`."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "sequential": {"name": "sequential"},
    "replay": {"name": "replay", "ratio": 0.3},
    "ewc": {"name": "ewc", "strength": 1.0},
    "joint": {"name": "joint"},
}
NUM_TASKS = 7
PLAIN = "plain Trainer"

Run = dict[str, Any]
"""What a run came to."""


class Runs:
    """What runs came to by name, kept in a file as they are made.

    Args:
        kept: the file.
    """

    def __init__(self, kept: Path) -> None:
        self.kept = kept
        self.found: dict[str, Run] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}

    def get(self, key: str, make: Callable[[], Run]) -> Run:
        """The run, made now or before."""
        if key not in self.found:
            log.info("%s", key)
            self.found[key] = make()
            lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in self.found.items()]
            self.kept.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return self.found[key]


def rows_of(path: Path, num: int | None) -> list[dict[str, Any]]:
    """The rows, or about as many drawn with a fixed seed, as even over labels as they come."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    if num is not None:
        most, counts, drawn = -(-num // len({row["completion"] for row in rows})), Counter[str](), order
        order = []
        for i in drawn:
            counts[rows[i]["completion"]] += 1
            if counts[rows[i]["completion"]] <= most:
                order.append(i)
    return [{"text": rows[i]["prompt"], "label": rows[i]["completion"]} for i in sorted(order)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """As JSONL; its absolute path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path.resolve())


def learn(
    folder: Path, name: str, tasks: list[dict[str, Any]], *, method: str, strategy: str, seed: int, epochs: float
) -> Lineage:
    """One lineage, learned or taken up."""
    settings, rate = METHODS[method]
    recipe = {
        "model": MODEL, "method": settings, "strategy": STRATEGIES[strategy], "tasks": tasks, "protect_base": "off",
        "train": {
            "learning_rate": rate, "num_train_epochs": epochs, "max_length": MAX_LENGTH, "on_overflow": "truncate",
            "per_device_train_batch_size": BATCH, "lr_scheduler_type": "linear", "warmup_ratio": 0.1,
            "weight_decay": 0.0,
            "precision": "fp32", "seed": seed,
        },
        "output_dir": str((folder / name).resolve()),
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(write_recipe(recipe), encoding="utf-8")
    return train(load_config(path).config)


def plain_trainer(folder: Path, train_rows: list[Any], test_rows: list[Any], *, seed: int, epochs: float) -> Run:
    """The script that everyone writes, with the settings of `full`."""
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from retain.models.hub import resolve

    source = resolve(MODEL).folder
    names = sorted({row["label"] for row in train_rows})
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(names))

    def encoded(rows: list[Any]) -> Dataset:
        data = Dataset.from_list([{"text": row["text"], "label": names.index(row["label"])} for row in rows])
        return data.map(
            lambda row: tokenizer(row["text"], truncation=True, max_length=MAX_LENGTH), remove_columns="text"
        )

    settings = TrainingArguments(
        output_dir=str(folder / f"plain-{seed}"), per_device_train_batch_size=BATCH, num_train_epochs=epochs,
        learning_rate=METHODS["full"][1], lr_scheduler_type="linear", warmup_steps=0.1, seed=seed, save_strategy="no",
        report_to="none", use_cpu=True,
    )  # fmt: skip
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model=model, args=settings, train_dataset=encoded(train_rows), data_collator=collator)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    found = trainer.predict(encoded(test_rows))
    right = (np.argmax(found.predictions, -1) == found.label_ids).tolist()
    scores = {row["text"]: float(one) for row, one in zip(test_rows, right, strict=True)}
    return {"scores": scores, "seconds": seconds}


def classified(lineage: Lineage) -> Run:
    """The score of each test row, and seconds of training."""
    stage = lineage.load_stage(1)
    scores = {answer.prompt: answer.score for answer in stage.answers if answer.suite == "banking"}
    return {"scores": scores, "seconds": sum(info.seconds for info in stage.history)}


def streamed(lineage: Lineage) -> Run:
    """The figures of a stream, and the accuracy on the classes so far after each task."""
    figures = Summary(lineage.record()).figures
    names = ("average_accuracy", "backward_transfer", "learning_accuracy")
    stages = [lineage.load_stage(stage.index) for stage in lineage.log()[1:]]
    so_far = [
        float(np.mean([stage.scores[f"task{number}"].value for number in range(1, last + 1)]))
        for last, stage in enumerate(stages, 1)
    ]
    seconds = sum(stage.provenance["seconds"] for stage in stages)
    return {**{name: figures[name].value for name in names}, "so_far": so_far, "seconds": seconds}


def over_rows(runs: list[Run]) -> dict[str, float]:
    """Each row's score, the mean over seeds."""
    return {row: float(np.mean([run["scores"][row] for run in runs])) for row in runs[0]["scores"]}


def within(found: Interval, sign: str = "") -> str:
    """In per cent, with the 95 % interval."""
    return f"{100 * found.mean:{sign}.1f} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def shown(values: list[float]) -> str:
    """The mean in %, and its standard error over seeds."""
    array = 100 * np.array(values)
    return f"{array.mean():.1f}" + (f" ± {array.std(ddof=1) / len(array) ** 0.5:.1f}" if len(array) > 1 else "")


def classify(arguments: argparse.Namespace, runs: Runs, parts: tuple[list[Any], list[Any]]) -> list[str]:
    """All intents at once, the plain script first."""
    folder, epochs = arguments.folder, arguments.epochs
    files = [write_rows(folder / f"{name}.jsonl", rows) for name, rows in zip(("train", "test"), parts, strict=True)]
    task = {"name": "banking", "train": files[0], "test": files[1], "metric": "accuracy"}
    found: dict[str, list[Run]] = {name: [] for name in (PLAIN, *METHODS)}
    for seed in arguments.seeds:
        plain = runs.get(
            f"classify | {PLAIN} | {seed}", lambda seed=seed: plain_trainer(folder, *parts, seed=seed, epochs=epochs)
        )
        found[PLAIN].append(plain)
        for method in METHODS:
            run = runs.get(
                f"classify | {method} | {seed}",
                lambda method=method, seed=seed: classified(
                    learn(
                        folder, f"classify-{method}-{seed}", [task],
                        method=method, strategy="sequential", seed=seed, epochs=epochs,
                    )
                ),
            )  # fmt: skip
            found[method].append(run)
    lines = [
        "## All intents at once", "",
        "Accuracy is the mean over seeds with its standard error. Differences are paired by row, in points, with 95 %",
        "intervals over rows; LoRA and adapters are to be within 2 points of full.", "",
        "| | accuracy, % | against the plain Trainer | against full | seconds of training |", "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    rows = {name: over_rows(made) for name, made in found.items()}
    for name, made in found.items():
        gaps = [
            "–" if other == name else within(paired_interval(rows[other], rows[name], bounded=True), "+")
            for other in (PLAIN, "full")
        ]
        means = [interval(list(run["scores"].values())).mean for run in made]
        seconds = np.mean([run["seconds"] for run in made])
        lines.append(f"| {name} | {shown(means)} | {' | '.join(gaps)} | {seconds:.0f} |")
    return [*lines, ""]


def stream(arguments: argparse.Namespace, runs: Runs, parts: tuple[list[Any], list[Any]]) -> list[str]:
    """Seven tasks of new intents, every intent seen so far an answer."""
    names = sorted({row["label"] for row in parts[0]})
    order = np.random.default_rng(0).permutation(len(names))
    tasks: list[dict[str, Any]] = []
    for number, group in enumerate(np.array_split(order, NUM_TASKS), 1):
        own = {names[i] for i in group}
        files = [
            write_rows(arguments.folder / f"task{number}.{kind}.jsonl", [row for row in rows if row["label"] in own])
            for kind, rows in zip(("train", "test"), parts, strict=True)
        ]
        tasks.append(
            {"name": f"task{number}", "train": files[0], "test": files[1], "metric": "accuracy", "choices": sorted(own)}
        )
    found: dict[str, list[Run]] = {strategy: [] for strategy in STRATEGIES}
    for seed in arguments.seeds:
        for strategy in STRATEGIES:
            run = runs.get(
                f"stream | {strategy} | {seed}",
                lambda strategy=strategy, seed=seed: streamed(
                    learn(
                        arguments.folder, f"stream-{strategy}-{seed}", tasks,
                        method="full", strategy=strategy, seed=seed, epochs=arguments.epochs,
                    )
                ),
            )  # fmt: skip
            found[strategy].append(run)
    stages = range(1, NUM_TASKS + 1)
    lines = [
        "## Seven tasks of new intents", "",
        "Every class that was seen so far may be the answer. `learned` is the mean accuracy of each task right after",
        "it, the last columns the mean accuracy on the tasks so far. Seconds are of training and scoring.", "",
        f"| strategy | ACC, % | BWT, points | learned, % | seconds | {' | '.join(f'after {n}' for n in stages)} |",
        "|---|" + "--:|" * (4 + NUM_TASKS),
    ]  # fmt: skip
    for strategy, made in found.items():
        names = ("average_accuracy", "backward_transfer", "learning_accuracy")
        cells = [shown([run[name] for run in made]) for name in names]
        cells.append(f"{np.mean([run['seconds'] for run in made]):.0f}")
        cells += [f"{100 * np.mean([run['so_far'][n - 1] for run in made]):.1f}" for n in stages]
        lines.append(f"| {said(strategy)} | {' | '.join(cells)} |")
    return [*lines, ""]


def said(strategy: str) -> str:
    """The strategy with its settings."""
    settings = [f"{key} {value:g}" for key, value in STRATEGIES[strategy].items() if key != "name"]
    return f"{strategy} ({', '.join(settings)})" if settings else strategy


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=["classify", "stream"], default=["classify", "stream"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--test-rows", type=int)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/encoder"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables are written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.results / "encoder.json")
    parts = (
        rows_of(arguments.data / "train.jsonl", arguments.rows),
        rows_of(arguments.data / "test.jsonl", arguments.test_rows),
    )
    lines = [
        "# An encoder on banking77", "",
        f"{MODEL}; {len(parts[0])} training and {len(parts[1])} test rows, {arguments.epochs:g} epochs, batch {BATCH}, "
        f"{len(arguments.seeds)} seed(s): mean and standard error.", "",
    ]  # fmt: skip
    for part in arguments.part:
        lines += {"classify": classify, "stream": stream}[part](arguments, runs, parts)
    (arguments.results / "encoder.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
