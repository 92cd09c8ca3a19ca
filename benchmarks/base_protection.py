"""What tuning on a single task costs the base model's abilities, with and without protection of the base.

    python benchmarks/base_protection.py --train FILE --test FILE [--steps 40] [--method full] [--learning-rate 1e-4]

Every strategy of `STRATEGIES` starts from the same base and takes as many steps. The table is written to
results/base_protection_METHOD.md: probes and their change, the paired difference from `sequential`, KL, seconds.
"""

import argparse
from pathlib import Path

from retain.config import load_config
from retain.config.recipe import write_recipe
from retain.evaluation.statistics import Interval
from retain.lineage import Lineage
from retain.report.summary import Summary, paired_differences
from retain.run import train

RESULTS = Path(__file__).parent / "results"

STRATEGIES: dict[str, dict[str, object]] = {
    "sequential": {"name": "sequential"},
    "replay 0.25": {"name": "replay", "ratio": 0.25},
    "ewc 1": {"name": "ewc", "strength": 1.0, "num_samples": 64},
}
"""Each with the text that the base model writes by itself (`protect_base: self`)."""


def shown(interval: Interval | None, digits: int = 2) -> str:
    """`+0.31 (0.10 to 0.52)`."""
    if interval is None:
        return ""
    return f"{interval.mean:+.{digits}f} ({interval.low:+.{digits}f} to {interval.high:+.{digits}f})"


def main() -> None:
    """Train each, compare, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="full")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--test-rows", type=int, default=50)
    parser.add_argument("--probes", type=int, default=220)
    parser.add_argument("--folder", type=Path, default=Path("runs/base_protection"))
    arguments = parser.parse_args()
    task: dict[str, object] = {
        "name": Path(arguments.train).parent.name, "train": str(Path(arguments.train).resolve()),
        "test": str(Path(arguments.test).resolve()), "max_train_rows": 8 * arguments.steps,
        "max_test_rows": arguments.test_rows, "max_new_tokens": 24,
    }  # fmt: skip
    lineages: dict[str, Lineage] = {}
    for name, strategy in STRATEGIES.items():
        folder = (arguments.folder / arguments.method / name.replace(" ", "_")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.yaml"
        settings = {
            "title": name, "model": arguments.model, "method": {"name": arguments.method}, "strategy": strategy,
            "tasks": [task], "output_dir": "lineage",
            "train": {
                "learning_rate": arguments.learning_rate, "max_steps": arguments.steps,
                "max_length": arguments.max_length, "on_overflow": "drop",
            },
            "evaluation": {"max_probes": arguments.probes, "max_texts": 16},
        }  # fmt: skip
        recipe.write_text(write_recipe(settings), encoding="utf-8")
        lineages[name] = train(load_config(recipe).config, base=next(iter(lineages.values()), None))
    plain = Summary(lineages["sequential"].record())
    lines = [
        f"# One task ({task['name']}) with and without protection of the base", "",
        f"{arguments.model}, {arguments.method}, {arguments.steps} steps of 8 rows at {arguments.learning_rate:g}; "
        f"{arguments.probes} probes; 95 % intervals over the same probes.", "",
        "| strategy | new task | probes, change in nats | less lost than sequential, nats | KL to the base | seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, lineage in lineages.items():
        summary, stage = Summary(lineage.record()), lineage.load_stage(1)
        score = stage.scores[str(task["name"])]
        change = summary.figures["probes"].interval
        less = paired_differences(plain, summary).get("probes") if name != "sequential" else None
        lines.append(
            f"| {name} | {score.value:.3f} ({score.low:.3f} to {score.high:.3f}) {score.metric} | {shown(change)} | "
            f"{shown(less)} | {stage.scores['kl'].value:.3f} | {stage.provenance['seconds']:.0f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(lines) + "\n"
    (RESULTS / f"base_protection_{arguments.method}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
