"""Every strategy on one stream of tasks: what it keeps, what it learns, and what it costs.

    python benchmarks/streams.py --data FOLDER --out runs/streams
    python benchmarks/strategies.py runs/streams/STREAM.yaml --seeds 0 1 2 [--only replay ewc]

STREAM.yaml is a recipe without `strategy`: model, method, tasks, training; STREAM.tune.yaml beside it scores other
rows. A strategy of several `CANDIDATES` first learns the tuning stream with each, and goes on with the one of the
highest ACC there. Then each learns the stream once for each seed, in a lineage of its own. What a run came to is kept
in results/strategies_STREAM.json, so the command, called again, goes on where it stopped; it ends by writing
results/strategies_STREAM.md.
"""

import argparse
import json
import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from retain.config import load_config
from retain.config.recipe import read_recipe, write_recipe
from retain.errors import CompatibilityError
from retain.lineage import Lineage
from retain.report.summary import Summary
from retain.run import train

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t by degrees of freedom, from 1."""

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmark")

Figures = dict[str, float | None]
Runs = dict[int, Figures]
"""By seed."""

RATIO = 0.2
"""Share of replayed tokens, of every strategy that replays, so that they are compared at one cost.

Replay alone is tried at higher ones, too."""


def link(name: str, **fields: Any) -> dict[str, Any]:
    """A strategy as a recipe says it."""
    return {"name": name, **fields}


@dataclass(frozen=True)
class Setting:
    """What a strategy runs with.

    Args:
        strategy: the recipe's.
        method: instead of the stream's, where the strategy does not go with it.
        train: changes of the stream's training.
    """

    strategy: list[dict[str, Any]]
    method: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        """What was chosen, without the names."""
        parts = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                 for link in self.strategy for key, value in link.items() if key != "name"]  # fmt: skip
        return ", ".join(parts + [f"{key} {value:g}" for key, value in self.train.items()])


def one(name: str, method: str | None = None, **fields: Any) -> Setting:
    """A strategy alone."""
    return Setting([link(name, **fields)], {"name": method} if method else None)


def strengths(name: str, *values: float, **fields: Any) -> list[Setting]:
    """A strategy at several strengths."""
    return [one(name, strength=value, **fields) for value in values]


def rates(name: str, method: str) -> list[Setting]:
    """A strategy of small modules beside a frozen base, at the stream's learning rate and at higher ones."""
    alone = one(name, method)
    return [alone, *(replace(alone, train={"learning_rate": rate}) for rate in (5e-3, 2e-2))]


CANDIDATES: dict[str, list[Setting]] = {
    "sequential": [one("sequential")],
    "joint": [Setting([link("joint")], train={"learning_rate": rate}) for rate in (5e-4, 1e-3, 2e-3)],
    "single_task": [one("single_task")],
    "replay": [one("replay", ratio=ratio) for ratio in (RATIO, 0.4, 0.6)],
    "der": [one("der", ratio=RATIO, alpha=alpha) for alpha in (0.3, 1.0)],
    "agem": [one("agem")],
    "ewc": strengths("ewc", 0.01, 0.1, 1.0, 10.0, num_samples=64),
    "ewc of BA": strengths("ewc", 0.01, 0.1, 1.0, 10.0, num_samples=64, space="weights"),
    "si": strengths("si", 0.01, 0.1, 1.0, 10.0, num_samples=64),
    "mas": strengths("mas", 0.01, 0.1, 1.0, 10.0, num_samples=64),
    "l2": strengths("l2", 0.01, 0.1, 1.0),
    "lwf": strengths("lwf", 0.3, 1.0, 3.0),
    "self_replay": [one("self_replay", ratio=RATIO, coefficient=value) for value in (1.0, 10.0)],
    "lamol": [one("lamol", gamma=RATIO)],
    "ssr": [one("ssr", ratio=RATIO)],
    "scholar": [one("scholar")],
    "wise_ft": [one("wise_ft", alpha=alpha) for alpha in (0.3, 0.6)],
    "ties": [one("ties")],
    "freeze_layers": [one("freeze_layers")],
    "osf": [one("osf")],
    "olora": rates("olora", "lora"),
    "progressive": rates("progressive", "adapter"),
    "replay + ewc": [
        Setting([link("replay", ratio=ratio), link("ewc", strength=strength, num_samples=64)])
        for ratio, strength in ((RATIO, 0.1), (RATIO, 1.0), (0.6, 0.1))
    ],
    "replay + self_replay": [Setting([link("replay", ratio=RATIO), link("self_replay", ratio=RATIO)])],
    "replay + wise_ft": [Setting([link("replay", ratio=RATIO), link("wise_ft", alpha=0.6)])],
}
"""What each strategy is tried with; the best on the validation rows goes into the table."""


def run(
    stream: dict[str, Any], setting: Setting, title: str, seed: int, path: Path, base: Lineage | None
) -> Lineage | None:
    """The lineage of a setting and a seed, learned or taken up; None where the choices do not go together."""
    settings = {**stream, "strategy": setting.strategy, "output_dir": str(path), "title": title}
    settings["train"] = {**stream.get("train", {}), **setting.train, "seed": seed}
    if setting.method is not None and method_name(stream) != setting.method["name"]:
        settings["method"] = setting.method
    recipe = path.with_suffix(".yaml")
    recipe.write_text(write_recipe(settings), encoding="utf-8")
    try:
        return train(load_config(recipe).config, base=base)
    except CompatibilityError as error:
        log.warning("%s: %s", title, error)
        return None


def model_name(stream: dict[str, Any]) -> str:
    """Of the stream's model, or of the family that starts from nothing."""
    model = stream["model"]
    return Path(model if isinstance(model, str) else str(model.get("name") or model.get("cell"))).name


def method_name(stream: dict[str, Any]) -> str:
    """Of the stream's own method."""
    method = stream.get("method", "lora")
    return method["name"] if isinstance(method, dict) else method


def figures(lineage: Lineage) -> Figures:
    """What a run came to."""
    summary = Summary(lineage.record())
    found = {key: summary.figures[key].value for key in ("average_accuracy", "backward_transfer", "probes", "kl")}
    found["learned"] = summary.figures["learning_accuracy"].value
    stages = [lineage.load_stage(stage.index) for stage in lineage.log()]
    memory = lineage.stage_folder(lineage.head) / "memory"
    found["seconds"] = float(sum(stage.provenance["seconds"] for stage in stages[1:]))
    found["bytes"] = float(sum(path.stat().st_size for path in memory.rglob("*") if path.is_file()))
    return found


@dataclass
class Table:
    """Runs of one stream, kept in a file as they are made.

    Args:
        stream, tuning: the recipes.
        folder: of lineages.
        kept: the file of results.
    """

    stream: dict[str, Any]
    tuning: dict[str, Any]
    folder: Path
    kept: Path

    def __post_init__(self) -> None:
        text = self.kept.read_text(encoding="utf-8") if self.kept.exists() else "{}"
        self.results: dict[str, Figures | None] = json.loads(text)

    def result(self, kind: str, name: str, setting: Setting, seed: int) -> Figures | None:
        """What the run came to, now or before; None where the choices do not go together."""
        key = f"{kind} | {name} | {setting} | {seed}"
        if key not in self.results:
            log.info("%s", key)
            stream = self.stream if kind == "test" else self.tuning
            lineage = run(stream, setting, name, seed, self.path(key), self.base(kind, seed))
            self.results[key] = figures(lineage) if lineage else None
            self.kept.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        return self.results[key]

    def path(self, key: str) -> Path:
        """Of a run's lineage."""
        return self.folder / re.sub(r"[^\w.+-]+", "_", key)

    def base(self, kind: str, seed: int) -> Lineage | None:
        """A finished run on the same rows, whose base model need not be scored again."""
        finished = (
            self.path(key)
            for key, result in self.results.items()
            if result and key.startswith(f"{kind} | ") and key.endswith(f" | {seed}")
        )
        return next((Lineage.open(path) for path in finished if path.exists()), None)

    def best(self, name: str) -> Setting:
        """The candidate that the tuning stream prefers."""
        candidates = CANDIDATES[name]
        if len(candidates) == 1:
            return candidates[0]
        scores = [(self.result("tune", name, candidate, 0) or {}).get("average_accuracy") for candidate in candidates]
        return candidates[int(np.argmax([-1.0 if score is None else score for score in scores]))]

    def rows(self, names: list[str], seeds: list[int]) -> dict[str, tuple[Setting, Runs]]:
        """By strategy its setting and, by seed, what its runs came to."""
        found: dict[str, tuple[Setting, Runs]] = {}
        chosen = {name: self.best(name) for name in names}
        for seed in seeds:
            for name, setting in chosen.items():
                if (result := self.result("test", name, setting, seed)) is not None:
                    found.setdefault(name, (setting, {}))[1][seed] = result
        return found


def mean(values: list[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """The mean over seeds and its standard error; a dash where it is not measured."""
    known = np.array([value for value in values if value is not None]) * scale
    if not len(known):
        return "–"
    error = f" ± {known.std(ddof=1) / np.sqrt(len(known)):.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{error}"


def against(runs: Runs, reference: Runs) -> str:
    """Points of ACC above a reference of the same seeds, with the 95 % interval of Student's t over seeds."""
    both = [(runs[seed]["average_accuracy"], reference[seed]["average_accuracy"]) for seed in runs if seed in reference]
    gaps = np.array([100 * (mine - other) for mine, other in both if mine is not None and other is not None])
    if len(gaps) < 2:
        return f"{gaps.mean():+.1f}" if len(gaps) else "–"
    half = T_975[len(gaps) - 2] * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return f"{gaps.mean():+.1f} ({gaps.mean() - half:+.1f} to {gaps.mean() + half:+.1f})"


def written(table: Table, name: str, rows: dict[str, tuple[Setting, Runs]]) -> str:
    """The table as Markdown, best first."""
    stream = table.stream
    seeds = max(len(runs) for _, runs in rows.values())
    lines = [
        f"# Strategies on {name}", "",
        f"{model_name(stream)}, {method_name(stream)}; {len(stream['tasks'])} tasks; means over {seeds} seeds with",
        "standard errors. `learned`: the mean score of each task right after it was learned. Seconds are of training,",
        "consolidation and scoring. Of several settings the best on validation rows is shown. The columns against",
        "joint and replay are differences of ACC, paired by seed, with 95 % intervals of Student's t.", "",
        "| strategy | setting | ACC, % | BWT, points | learned, % | probes, nats | KL, nats | seconds | memory, MB "
        "| against joint | against replay |",
        "|---|---|" + "--:|" * 9,
    ]  # fmt: skip
    runs_of = {key: runs for key, (_, runs) in rows.items()}
    order = sorted(rows, key=lambda key: -np.mean([run["average_accuracy"] or 0.0 for run in runs_of[key].values()]))
    for key in order:
        setting, runs = rows[key]
        columns = {column: [run[column] for run in runs.values()] for column in next(iter(runs.values()))}
        cells = [
            key, str(setting), mean(columns["average_accuracy"], 100), mean(columns["backward_transfer"], 100),
            mean(columns["learned"], 100), mean(columns["probes"], digits=2), mean(columns["kl"], digits=2),
            mean(columns["seconds"], digits=0), mean(columns["bytes"], 1e-6),
            *(against(runs, runs_of.get(other, {})) for other in ("joint", "replay")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_stream(path: Path) -> dict[str, Any]:
    """A recipe whose files are found from anywhere."""
    stream, _ = read_recipe(path)
    for task in stream["tasks"]:
        task |= {key: str((path.parent / task[key]).resolve()) for key in ("train", "test") if key in task}
    return stream


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--folder", type=Path, default=Path("runs/strategies"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    name = arguments.stream.stem
    folder = (arguments.folder / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    tuning = arguments.stream.with_suffix(".tune.yaml")
    table = Table(read_stream(arguments.stream), read_stream(tuning), folder, RESULTS / f"strategies_{name}.json")
    text = written(table, name, table.rows(arguments.only, arguments.seeds))
    (RESULTS / f"strategies_{name}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
