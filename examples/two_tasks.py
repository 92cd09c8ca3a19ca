"""Learn two tasks with a small GRU from scratch, plainly and with replay, and compare what the first one lost.

    python examples/two_tasks.py [FOLDER]

About half a minute on a CPU. The same from the command line: `retain train recipes/lstm-from-scratch.yaml`.
"""

import json
import sys
from pathlib import Path

import retain
from retain.report.summary import Summary

THINGS = ("rose", "leaf", "sky", "snow", "coal", "lemon")
TEMPLATES = ("a {}", "the {}", "this {}", "my {}", "one {}", "that {}")
ANSWERS = {
    "colours": ("red", "green", "blue", "white", "black", "yellow"),
    "numbers": ("one", "two", "three", "four", "five", "six"),
}
"""Each task answers the same words in its own way, so the second one overwrites the first."""


def write_rows(folder: Path, name: str) -> Path:
    """The rows of a task as JSONL."""
    path = folder / f"{name}.jsonl"
    pairs = [
        (form.format(thing), answer) for form in TEMPLATES for thing, answer in zip(THINGS, ANSWERS[name], strict=True)
    ]
    lines = [json.dumps({"prompt": f"{name}: {words}", "completion": answer}) for words, answer in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def learn(folder: Path, strategy: dict[str, object]) -> Summary:
    """Train both tasks in a row; the lineage lies in `folder`, named for the strategy."""
    data = [write_rows(folder, name) for name in ANSWERS]
    recipe = folder / f"{strategy['name']}.yaml"
    settings = {
        "model": {"family": "recurrent", "cell": "gru", "hidden_size": 128, "vocab_size": 300},
        "method": "full",
        "strategy": strategy,
        "tasks": [{"name": path.stem, "train": str(path), "test": str(path)} for path in data],
        "train": {"learning_rate": 1e-2, "max_steps": 200},
        "evaluation": {"probes": False, "kl": False},
        "output_dir": str(strategy["name"]),
    }
    recipe.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return Summary(retain.train(retain.load_config(recipe).config).record())


def main() -> None:
    """Print the score of the first task when it was learned and at the end."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/two_tasks")
    folder.mkdir(parents=True, exist_ok=True)
    runs = [learn(folder, {"name": "sequential"}), learn(folder, {"name": "replay", "ratio": 0.3})]
    for run in runs:
        first = run.lost[0]
        print(
            f"{run.record.strategy}: {first.suite} {first.before.value:.0%} when learned, {first.after.value:.0%} now"
        )
    print("report:", retain.write_report([run.record for run in runs], folder / "report.html"))


if __name__ == "__main__":
    main()
