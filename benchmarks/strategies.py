"""Every strategy on one stream of tasks: what it keeps, what it learns, and what it costs.

    python benchmarks/strategies.py STREAM.yaml --seeds 0 1 2 [--only replay ewc] [--folder runs/strategies]

STREAM.yaml is a recipe without `strategy`: model, method, tasks, training. Each strategy of `SETTINGS` learns the
stream once for each seed, in a lineage of its own; called again, the command goes on where it stopped, and then writes
results/strategies_STREAM.md: ACC, BWT, the probes' change and KL as means over seeds with their standard errors,
seconds and bytes. Strengths are the settings' own: choose them on rows that are neither trained nor tested.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np

from retain.config import load_config
from retain.config.recipe import read_recipe, write_recipe
from retain.errors import RetainError
from retain.lineage import Lineage
from retain.report.summary import Summary
from retain.run import train

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmark")

Setting = dict[str, Any] | list[dict[str, Any]]

SETTINGS: dict[str, Setting] = {
    "sequential": {"name": "sequential"},
    "joint": {"name": "joint"},
    "single_task": {"name": "single_task"},
    "replay": {"name": "replay", "ratio": 0.2},
    "der": {"name": "der", "ratio": 0.2},
    "agem": {"name": "agem"},
    "ewc": {"name": "ewc", "strength": 3.0, "num_samples": 64},
    "si": {"name": "si", "strength": 3.0, "num_samples": 64},
    "mas": {"name": "mas", "strength": 3.0, "num_samples": 64},
    "l2": {"name": "l2", "strength": 0.1},
    "lwf": {"name": "lwf", "strength": 1.0},
    "self_replay": {"name": "self_replay"},
    "lamol": {"name": "lamol", "gamma": 0.2},
    "ssr": {"name": "ssr"},
    "scholar": {"name": "scholar"},
    "wise_ft": {"name": "wise_ft"},
    "ties": {"name": "ties"},
    "freeze_layers": {"name": "freeze_layers"},
    "osf": {"name": "osf"},
    "olora": {"name": "olora"},
    "progressive": {"name": "progressive"},
    "replay+ewc": [{"name": "replay", "ratio": 0.2}, {"name": "ewc", "strength": 1.0, "num_samples": 64}],
    "replay+self_replay": [{"name": "replay", "ratio": 0.2}, {"name": "self_replay"}],
}
"""What each runs with."""

METHODS = {"olora": "lora", "progressive": "adapter"}
"""The method of a strategy that does not go with the stream's own."""


def run(stream: dict[str, Any], name: str, seed: int, folder: Path, base: Lineage | None) -> Lineage | None:
    """The lineage of a strategy and a seed, learned or taken up; None where the choices do not go together."""
    strategy = SETTINGS[name]
    settings = {**stream, "strategy": strategy, "output_dir": str(folder / f"{name}-{seed}"), "title": name}
    settings["train"] = {**stream.get("train", {}), "seed": seed}
    if name in METHODS and method_name(stream) != METHODS[name]:
        settings["method"] = {"name": METHODS[name]}
    recipe = folder / f"{name}-{seed}.yaml"
    recipe.write_text(write_recipe(settings), encoding="utf-8")
    try:
        return train(load_config(recipe).config, base=base)
    except RetainError as error:
        log.warning("%s, seed %d: %s", name, seed, error)
        return None


def model_name(stream: dict[str, Any]) -> str:
    """Of the stream's model, or of the family that starts from nothing."""
    model = stream["model"]
    return model if isinstance(model, str) else str(model.get("name") or model.get("cell"))


def method_name(stream: dict[str, Any]) -> str:
    """Of the stream's own method."""
    method = stream.get("method", "lora")
    return method["name"] if isinstance(method, dict) else method


def figures(lineage: Lineage) -> dict[str, float]:
    """What a run came to."""
    summary = Summary(lineage.record())
    found = {key: summary.figures[key].value for key in ("average_accuracy", "backward_transfer", "probes", "kl")}
    stages = [lineage.load_stage(stage.index) for stage in lineage.log()]
    memory = lineage.stage_folder(lineage.head) / "memory"
    found["seconds"] = float(sum(stage.provenance["seconds"] for stage in stages[1:]))
    found["bytes"] = float(sum(path.stat().st_size for path in memory.rglob("*") if path.is_file()))
    return {key: float("nan") if value is None else value for key, value in found.items()}


def shown(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """The mean and its standard error over seeds."""
    array = np.array(values) * scale
    error = f" ± {array.std(ddof=1) / np.sqrt(len(array)):.{digits}f}" if len(array) > 1 else ""
    return f"{array.mean():.{digits}f}{error}"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stream", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--folder", type=Path, default=Path("runs/strategies"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    stream, _ = read_recipe(arguments.stream)
    for task in stream["tasks"]:
        task |= {key: str((arguments.stream.parent / task[key]).resolve()) for key in ("train", "test") if key in task}
    folder = (arguments.folder / arguments.stream.stem).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        base: Lineage | None = None
        for name in arguments.only:
            lineage = run(stream, name, seed, folder, base)
            if lineage is not None:
                base = base or lineage
                rows.setdefault(name, []).append(figures(lineage))
    lines = [
        f"# Strategies on {arguments.stream.stem}", "",
        f"{model_name(stream)}, {method_name(stream)}; {len(stream['tasks'])} tasks; means over {len(arguments.seeds)} "
        "seeds and their standard errors. Seconds are of training, consolidation and scoring.", "",
        "| strategy | ACC, % | BWT, points | probes, nats | KL, nats | seconds | memory, MB |", "|---|" + "--:|" * 6,
    ]  # fmt: skip
    for name, found in sorted(rows.items(), key=lambda row: -np.mean([run["average_accuracy"] for run in row[1]])):
        columns = {key: [run[key] for run in found] for key in found[0]}
        lines.append(
            f"| {name} | {shown(columns['average_accuracy'], 100)} | {shown(columns['backward_transfer'], 100)} | "
            f"{shown(columns['probes'], digits=2)} | {shown(columns['kl'], digits=2)} | "
            f"{shown(columns['seconds'], digits=0)} | {np.mean(columns['bytes']) / 1e6:.1f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(lines) + "\n"
    (RESULTS / f"strategies_{arguments.stream.stem}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
