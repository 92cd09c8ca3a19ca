"""Do the built-in probes see what public benchmarks see? A line a checkpoint, and the correlation of the changes.

    python benchmarks/probe_correlation.py LINEAGE... --sets lambada=FILE arc=FILE mmlu=FILE [--limit N] [--probes N]

Every stage of the lineages is scored on the probes and on the sets (JSONL with prompt, completion and, for choices,
`choices` and `answer`), on the same examples, and compared with the base model's scores.
"""

import argparse
import json
from pathlib import Path
from random import Random

import numpy as np

from retain import distributed
from retain.data.rendering import Renderer
from retain.evaluation.probes import balanced, load_probes, score_probes
from retain.evaluation.scoring import choice_margin
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
    """The mean margin of choices, or the mean log-likelihood of the completion where there are none, nats."""
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
        right = row["completion"]
        figures.append(choice_margin(part, [c == right for c in row["choices"]]) if size > 1 else part[0])
    return float(np.mean(figures))


def main() -> None:
    """Score, correlate, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lineages", nargs="+", type=Path)
    parser.add_argument("--sets", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--limit", type=int, default=150, help="rows of each set")
    parser.add_argument("--probes", type=int, default=464, help="probes, balanced over abilities")
    arguments = parser.parse_args()
    sets = {
        name: read(Path(path), arguments.limit) for name, _, path in (entry.partition("=") for entry in arguments.sets)
    }
    probes = balanced(load_probes(), arguments.probes, seed=0)
    abilities = sorted({probe.ability for probe in probes})
    rows: list[tuple[str, dict[str, float]]] = []
    for place, path in enumerate(arguments.lineages):
        lineage = Lineage.open(path)
        for stage in lineage.log()[0 if place == 0 else 1 :]:
            target, _ = load_stage(lineage, stage.index)
            with distributed.autocast(distributed.resolve_precision("auto")):
                answers = score_probes(target.model, target.family, target.renderer, probes)
                public = {name: score(target, examples) for name, examples in sets.items()}
            margins = {
                a: [x.margin for x in answers if x.suite == f"probe:{a}" and x.margin is not None] for a in abilities
            }
            figures = {ability: float(np.mean(values)) for ability, values in margins.items()}
            figures["probes"] = float(np.mean([value for values in margins.values() for value in values]))
            figures |= public
            rows.append((f"{path.name} {stage.index} {stage.name}", figures))
            print(rows[-1][0], {name: round(value, 3) for name, value in figures.items()}, flush=True)
    names = ["probes", *abilities]
    base = rows[0][1]
    change = {name: np.array([figures[name] - base[name] for _, figures in rows[1:]]) for name in (*names, *sets)}
    lines = [
        "# Probes against public sets", "",
        f"Change from the base model in nats, {len(probes)} probes, {arguments.limit} rows a set.", "",
        "| checkpoint | probes | " + " | ".join(sets) + " |", "|---|" + "--:|" * (1 + len(sets)),
    ]  # fmt: skip
    for k, (label, _) in enumerate(rows[1:]):
        lines.append(f"| {label} | " + " | ".join(f"{change[name][k]:+.3f}" for name in ("probes", *sets)) + " |")
    lines += ["", f"Pearson correlation of the changes over {len(rows) - 1} checkpoints.", "",
              "| probes | " + " | ".join(sets) + " | their mean |", "|---|" + "--:|" * (1 + len(sets))]  # fmt: skip
    together = np.mean([change[name] for name in sets], axis=0)
    for name in names:
        figures = [np.corrcoef(change[name], other)[0, 1] for other in (*(change[s] for s in sets), together)]
        lines.append(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
