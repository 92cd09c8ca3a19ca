"""An encoder on banking77: beside a plain `transformers.Trainer`, and as a class-incremental stream of 7 x 11 intents.

    python benchmarks/encoder.py --data FOLDER [--part classify stream] [--seeds 0 1 2] [--rows 2000] [--test-rows 500]

FOLDER holds train.jsonl and test.jsonl with `prompt` and `completion`. Called again, the command goes on where it
stopped; then it writes results/encoder.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from retain.config import load_config
from retain.config.recipe import write_recipe
from retain.lineage import Lineage
from retain.report.summary import Summary
from retain.run import train

RESULTS = Path(__file__).parent / "results" / "encoder.md"
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


def rows_of(path: Path, num: int | None) -> list[dict[str, Any]]:
    """The rows, or as many drawn from a fixed seed."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))[:num]
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


def plain_trainer(
    folder: Path, train_rows: list[Any], test_rows: list[Any], *, seed: int, epochs: float
) -> tuple[float, float]:
    """Accuracy and seconds of the script that everyone writes, with the settings of `full`; kept once it is there."""
    kept = folder / f"plain-{seed}.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        return found["accuracy"], found["seconds"]
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
    accuracy = float((np.argmax(found.predictions, -1) == found.label_ids).mean())
    kept.write_text(json.dumps({"accuracy": accuracy, "seconds": seconds}), encoding="utf-8")
    return accuracy, seconds


def shown(values: list[float]) -> str:
    """The mean in %, and its standard error over seeds."""
    array = 100 * np.array(values)
    return f"{array.mean():.1f}" + (f" ± {array.std(ddof=1) / len(array) ** 0.5:.1f}" if len(array) > 1 else "")


def classify(arguments: argparse.Namespace, folder: Path, parts: tuple[list[Any], list[Any]]) -> list[str]:
    """All intents at once, the plain script first."""
    files = [write_rows(folder / f"{name}.jsonl", rows) for name, rows in zip(("train", "test"), parts, strict=True)]
    task = {"name": "banking", "train": files[0], "test": files[1], "metric": "accuracy"}
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in arguments.seeds:
        found.setdefault("plain Trainer", []).append(plain_trainer(folder, *parts, seed=seed, epochs=arguments.epochs))
        for method in METHODS:
            lineage = learn(
                folder, f"classify-{method}-{seed}", [task],
                method=method, strategy="sequential", seed=seed, epochs=arguments.epochs,
            )  # fmt: skip
            stage = lineage.load_stage(1)
            seconds = sum(info.seconds for info in stage.history)
            found.setdefault(method, []).append((stage.scores["banking"].value, seconds))
    lines = ["## All intents at once", "", "| | accuracy, % | seconds of training |", "|---|--:|--:|"]
    for name, runs in found.items():
        lines.append(f"| {name} | {shown([run[0] for run in runs])} | {np.mean([run[1] for run in runs]):.0f} |")
    return [*lines, ""]


def stream(arguments: argparse.Namespace, folder: Path, parts: tuple[list[Any], list[Any]]) -> list[str]:
    """Seven tasks of new intents, every intent seen so far an answer."""
    names = sorted({row["label"] for row in parts[0]})
    order = np.random.default_rng(0).permutation(len(names))
    tasks: list[dict[str, Any]] = []
    for number, group in enumerate(np.array_split(order, NUM_TASKS), 1):
        own = {names[i] for i in group}
        files = [
            write_rows(folder / f"task{number}.{kind}.jsonl", [row for row in rows if row["label"] in own])
            for kind, rows in zip(("train", "test"), parts, strict=True)
        ]
        tasks.append(
            {"name": f"task{number}", "train": files[0], "test": files[1], "metric": "accuracy", "choices": sorted(own)}
        )
    lines = ["## Seven tasks of new intents", "", "| strategy | ACC, % | BWT, points |", "|---|--:|--:|"]
    for strategy in STRATEGIES:
        figures = [
            Summary(
                learn(
                    folder, f"stream-{strategy}-{seed}", tasks,
                    method="full", strategy=strategy, seed=seed, epochs=arguments.epochs,
                ).record()
            ).figures
            for seed in arguments.seeds
        ]  # fmt: skip
        columns = [[float(f[key].value or 0.0) for f in figures] for key in ("average_accuracy", "backward_transfer")]
        lines.append(f"| {strategy} | {shown(columns[0])} | {shown(columns[1])} |")
    return [*lines, ""]


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
    parser.add_argument("--to", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
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
        lines += {"classify": classify, "stream": stream}[part](arguments, arguments.folder, parts)
    arguments.to.parent.mkdir(exist_ok=True)
    arguments.to.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
