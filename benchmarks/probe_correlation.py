"""Do the built-in probes see what public benchmarks see? A line a checkpoint, and the correlation of the changes.

    python benchmarks/probe_correlation.py LINEAGE... --sets lambada=FILE arc=FILE mmlu=FILE [--limit N] [--probes N]

Every stage of the lineages is scored on the probes and on the sets (JSONL with prompt, completion and, for choices,
`choices` and `answer`), on the same examples, and compared with the base model's scores. With `--cache FILE` a
checkpoint is scored once; the file holds every probe's margin, which tells which probes do not follow.
"""

import argparse
import json
from pathlib import Path
from random import Random

import numpy as np

from retain import distributed
from retain.data.rendering import Renderer
from retain.evaluation.probes import balanced, load_probes, score_probes
from retain.inference import Answering, load_stage
from retain.lineage import Lineage

RESULTS = Path(__file__).parent / "results" / "probe_correlation.md"


def read(path: Path, limit: int) -> list[dict[str, object]]:
    """A seeded sample of a set's rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Random(0).sample(rows, min(limit, len(rows)))


def continuation(renderer: Renderer, context: list[int], prompt: str, text: str) -> list[int]:
    """The ids of a text after a prompt, as raw text."""
    whole = renderer.text_ids(prompt + text)
    return whole[len(context) :] if whole[: len(context)] == context else renderer.text_ids(text)


def score(target: Answering, rows: list[dict[str, object]]) -> float:
    """The mean margin of choices, nats a byte, or the mean log-likelihood of the completion where there are none, nats.

    A choice's margin is how much likelier a byte of the right one is than of the best other: above 0 where `acc_norm`,
    these sets' usual figure, counts it right. Without the division a model that was tuned on short answers seems to
    lose everything that has a long one.
    """
    pairs, sizes = [], []
    for row in rows:
        prompt = str(row["prompt"]) + ("\nAnswer:" if row.get("choices") else "")
        context = target.renderer.text_ids(prompt)
        choices = list(row.get("choices") or [row["completion"]])
        pairs += [(context, continuation(target.renderer, context, prompt, f" {choice}")) for choice in choices]
        sizes.append(len(choices))
    values = target.family.loglikelihood(target.model, target.renderer.tokenizer, pairs)
    figures, at = [], 0
    for row, size in zip(rows, sizes, strict=True):
        part, at = values[at : at + size], at + size
        if size == 1:
            figures.append(part[0])
            continue
        rates = [value / len(f" {choice}".encode()) for value, choice in zip(part, row["choices"], strict=True)]
        right = row["choices"].index(row["completion"])
        figures.append(rates[right] - max(rates[:right] + rates[right + 1 :]))
    return float(np.mean(figures))


def ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value among all; correlated, they give Spearman's coefficient, which no outlier decides."""
    return np.argsort(np.argsort(values)).astype(float)


def main() -> None:
    """Score, correlate, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lineages", nargs="+", type=Path)
    parser.add_argument("--sets", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--limit", type=int, default=150, help="rows of each set")
    parser.add_argument("--probes", type=int, default=464, help="probes, balanced over abilities")
    parser.add_argument("--cache", type=Path, help="a JSONL file of what was scored before")
    arguments = parser.parse_args()
    sets = {
        name: read(Path(path), arguments.limit) for name, _, path in (entry.partition("=") for entry in arguments.sets)
    }
    probes = balanced(load_probes(), arguments.probes, seed=0)
    abilities = sorted({probe.ability for probe in probes})
    cache = arguments.cache
    lines = cache.read_text(encoding="utf-8").splitlines() if cache and cache.exists() else []
    known = {row["checkpoint"]: row for row in map(json.loads, lines)}
    rows: list[tuple[str, dict[str, float]]] = []
    for place, path in enumerate(arguments.lineages):
        lineage = Lineage.open(path)
        for stage in lineage.log()[0 if place == 0 else 1 :]:
            label = f"{path.name} {stage.index} {stage.name}"
            if label not in known:
                target, _ = load_stage(lineage, stage.index)
                with distributed.autocast(distributed.resolve_precision("auto")):
                    answers = score_probes(target.model, target.family, target.renderer, probes)
                    public = {name: score(target, examples) for name, examples in sets.items()}
                known[label] = {"checkpoint": label, "margins": {x.id: x.margin for x in answers}, "sets": public}
                if cache:
                    with cache.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(known[label]) + "\n")
            margins = known[label]["margins"]
            by_ability = {a: [margins[probe.id] for probe in probes if probe.ability == a] for a in abilities}
            figures = {ability: float(np.mean(values)) for ability, values in by_ability.items()}
            figures["probes"] = float(np.mean([margins[probe.id] for probe in probes]))
            figures |= known[label]["sets"]
            rows.append((label, figures))
            print(label, {name: round(value, 3) for name, value in figures.items()}, flush=True)
    names = ["probes", *abilities]
    base = rows[0][1]
    change = {name: np.array([figures[name] - base[name] for _, figures in rows[1:]]) for name in (*names, *sets)}
    lines = [
        "# Probes against public sets", "",
        f"Change from the base model, in nats (choices of the sets: nats a byte), "
        f"{len(probes)} probes, {arguments.limit} rows a set.", "",
        "| checkpoint | probes | " + " | ".join(sets) + " |", "|---|" + "--:|" * (1 + len(sets)),
    ]  # fmt: skip
    for k, (label, _) in enumerate(rows[1:]):
        lines.append(f"| {label} | " + " | ".join(f"{change[name][k]:+.3f}" for name in ("probes", *sets)) + " |")
    lines += [
        "", f"Pearson correlation of the changes over {len(rows) - 1} checkpoints; last, of their ranks.", "",
        "| probes | " + " | ".join(sets) + " | their mean | its ranks |", "|---|" + "--:|" * (2 + len(sets)),
    ]  # fmt: skip
    together = np.mean([change[name] / change[name].std() for name in sets], axis=0)  # their units differ
    for name in names:
        figures = [np.corrcoef(change[name], other)[0, 1] for other in (*(change[s] for s in sets), together)]
        figures.append(np.corrcoef(ranks(change[name]), ranks(together))[0, 1])
        lines.append(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
