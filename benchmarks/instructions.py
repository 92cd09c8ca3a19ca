"""Does instruction tuning teach to follow instructions? Tasks that were never trained, before and after.

    python benchmarks/instructions.py --data FOLDER [--models gemma-3-270m smollm2-135m] [--seeds 0 1]

Each model learns the same rows of several tasks twice, with LoRA: each input after its instruction (`with`), and the
inputs and outputs alone (`without`). Both, and the model as it came, then answer rows of tasks that neither saw, each
asked with an instruction. This is the ablation of Wei et al. 2022 (FLAN), section 4.3, https://arxiv.org/abs/2109.01652.

FOLDER holds one folder a set, each with train.jsonl and test.jsonl: superni_a, selfinstruct and sgd_chat (`messages`),
e2e_nlg, tatoeba_en_vi, sib200_multi and banking77 (`prompt`, `completion`), arc_easy (those and `choices`). What a run
came to is kept in results/instructions.json, so the command, called again, goes on where it stopped; it ends by writing
results/instructions.md.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from streams import INTENTS, Row, read, write

from retain.config import load_config
from retain.config.recipe import write_recipe
from retain.data.tasks import TaskConfig, load_task
from retain.evaluation.statistics import Interval, interval, is_noise, paired_interval
from retain.inference import load_for_answering, score
from retain.lineage import Lineage
from retain.run import train

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmark")

MODELS = {"gemma-3-270m": "a base model", "smollm2-135m": "tuned for chat"}
ARMS = ("with", "without")
TOPICS = ("entertainment", "geography", "health", "politics", "science/technology", "sports", "travel")

Scores = dict[str, dict[str, float]]
"""By task and row."""


@dataclass(frozen=True)
class Asked:
    """A row in its parts.

    Args:
        instruction: what is to be done.
        input: with what; empty where the instruction says it all.
        output: the right answer.
        references: further right answers.
    """

    instruction: str
    input: str
    output: str
    references: tuple[str, ...] = ()

    def row(self, *, instructed: bool) -> Row:
        """As the data formats have it: Alpaca's columns, or prompt and completion."""
        if not instructed:
            return {"prompt": self.input, "completion": self.output}
        return {
            "instruction": self.instruction, "input": self.input, "output": self.output,
            "references": list(self.references),
        }  # fmt: skip


def splits(folder: Path) -> Iterator[Row]:
    """All rows of a set: of one that is only trained on, or only scored, its split does not matter."""
    yield from (row for split in ("train", "test") for row in read(folder / f"{split}.jsonl"))


def natural(task: str) -> Callable[[Path], Iterator[Asked]]:
    """A task of Super-NaturalInstructions: its definition is the system's turn."""

    def rows(folder: Path) -> Iterator[Asked]:
        for row in splits(folder / "superni_a"):
            if row["task"] == task:
                instruction, asked, answer = (turn["content"] for turn in row["messages"])
                yield Asked(instruction, asked, answer, tuple(row.get("references", ())))

    return rows


def seeds(folder: Path) -> Iterator[Asked]:
    """Self-Instruct's seed tasks that have an input; without one, nothing would be left beside the instruction."""
    for row in read(folder / "selfinstruct" / "train.jsonl"):
        instruction, _, asked = row["messages"][0]["content"].partition("\n\n")
        if asked:
            yield Asked(instruction, asked, row["messages"][1]["content"])


def requests(folder: Path) -> Iterator[Asked]:
    """Self-Instruct's instructions written for users of applications, each a task of its own."""
    for row in read(folder / "selfinstruct" / "test.jsonl"):
        yield Asked(row["messages"][0]["content"], "", row["messages"][1]["content"])


def dialogues(folder: Path) -> Iterator[Asked]:
    """The first exchange with a service."""
    for row in read(folder / "sgd_chat" / "train.jsonl"):
        system, user, assistant = (turn["content"] for turn in row["messages"][:3])
        yield Asked(system, user, assistant)


def pairs(name: str, instruction: str, *, only: Sequence[str] = ()) -> Callable[[Path], Iterator[Asked]]:
    """A set of prompt and completion under one instruction; `only` rows of these tasks or labels."""

    def rows(folder: Path) -> Iterator[Asked]:
        for row in splits(folder / name):
            if not only or row.get("task") in only or row["completion"] in only:
                yield Asked(instruction, row["prompt"], row["completion"], tuple(row.get("references", ())))

    return rows


def questions(folder: Path) -> Iterator[Asked]:
    """Questions with their options, one of which is to be repeated."""
    for row in splits(folder / "arc_easy"):
        options = "\n".join(f"- {choice}" for choice in row["choices"])
        asked = f"{row['prompt'].removeprefix('Question: ')}\n{options}"
        yield Asked("Answer the question with one of the options.", asked, row["completion"])


@dataclass(frozen=True)
class Part:
    """A task.

    Args:
        rows: all that the data folder has of it.
        longest: characters of input and instruction that a row may have.
        longest_output: of its answer.
        metric: of a task that is scored.
        max_new_tokens: of its answers.
    """

    rows: Callable[[Path], Iterator[Asked]]
    longest: int = 300
    longest_output: int = 160
    metric: str = "rouge_l"
    max_new_tokens: int = 16

    def sample(self, folder: Path, num: int) -> list[Asked]:
        """So many of its short rows, each input once, drawn with a fixed seed."""
        short = {
            (row.instruction, row.input): row for row in self.rows(folder)
            if len(row.instruction + row.input) <= self.longest and len(row.output) <= self.longest_output
        }  # fmt: skip
        return Random(0).sample(list(short.values()), min(num, len(short)))


TRAINED: dict[str, Part] = {
    "personachat": Part(natural("task1729_personachat_generate_next"), 750),
    "seed tasks": Part(seeds, 350),
    "service": Part(dialogues),
    "restaurant": Part(pairs("e2e_nlg", "Write a sentence that describes the restaurant.")),
    "Vietnamese": Part(pairs("tatoeba_en_vi", "Translate into Vietnamese."), longest_output=60),
    "topic": Part(
        pairs(
            "sib200_multi", f"Classify the topic of the sentence. The topics are: {', '.join(TOPICS)}.",
            only=("sib200_deu_Latn", "sib200_fra_Latn"),
        )
    ),
}  # fmt: skip

HELD_OUT: dict[str, Part] = {
    "quoref": Part(natural("task002_quoref_answer_generation"), 1700, metric="rouge_l", max_new_tokens=12),
    "query": Part(natural("task639_multi_woz_user_utterance_generation")),
    "requests": Part(requests, 200, 100, max_new_tokens=24),
    "options": Part(questions, longest_output=40, metric="exact_match"),
    "intent": Part(
        pairs("banking77", f"Name the intent of the customer: {', '.join(INTENTS)}.", only=INTENTS),
        longest_output=40, metric="exact_match", max_new_tokens=12,
    ),
}  # fmt: skip
"""Two whole tasks of Super-NaturalInstructions, and sets of which nothing is trained; of `requests`, another half."""


def learn(folder: Path, model: str, arm: str, seed: int, rows: list[Asked], arguments: argparse.Namespace) -> Lineage:
    """A model tuned with or without instructions, now or before."""
    file = write(folder / f"{arm}.jsonl", [row.row(instructed=arm == "with") for row in rows])
    path = folder / f"{Path(model).name}-{arm}-{seed}"
    recipe = {
        "model": model, "method": {"name": "lora", "r": 16, "alpha": 32}, "strategy": "sequential",
        "protect_base": "off", "tasks": [{"name": "tasks", "train": str(folder / file), "test_fraction": 0.0}],
        "train": {
            "learning_rate": arguments.learning_rate, "num_train_epochs": arguments.epochs, "max_length": 512,
            "max_tokens_per_batch": 1024, "seed": seed,
        },
        "evaluation": {"probes": False, "kl": False}, "output_dir": str(path),
    }  # fmt: skip
    made = path.with_suffix(".yaml")
    made.write_text(write_recipe(recipe), encoding="utf-8")
    return train(load_config(made).config)


def ask(lineage: Lineage, stage: int, files: Mapping[str, str]) -> tuple[Scores, dict[str, str]]:
    """The score of each held-out row, and of each task the answer to its first row."""
    tasks = [
        load_task(
            TaskConfig(
                name=name, train=file, test=file, max_train_rows=1,
                metric=HELD_OUT[name].metric, max_new_tokens=HELD_OUT[name].max_new_tokens,
            )
        ).task
        for name, file in files.items()
    ]  # fmt: skip
    target = load_for_answering(str(lineage.path), stage=stage)
    given = score(target, tasks, probes=False).answers
    scores: Scores = {name: {answer.id: answer.score for answer in given if answer.suite == name} for name in files}
    return scores, {answer.suite: answer.answer for answer in reversed(given)}


@dataclass
class Runs:
    """Scores by model, arm (`base` is the model as it came) and seed, kept in a file as they are made."""

    kept: Path

    def __post_init__(self) -> None:
        text = self.kept.read_text(encoding="utf-8") if self.kept.exists() else "{}"
        self.results: dict[str, dict[str, Any]] = json.loads(text)

    def keep(self, key: str, lineage: Lineage, stage: int, files: Mapping[str, str]) -> None:
        """Ask a stage of a lineage, if that was not done before."""
        if key in self.results:
            return
        log.info("asking %s", key)
        scores, answers = ask(lineage, stage, files)
        record = lineage.load_stage(stage).provenance
        self.results[key] = {"scores": scores, "answers": answers, "tokens": record["tokens"],
                             "seconds": record["training_seconds"]}  # fmt: skip
        lines = [f"{json.dumps(key)}: {json.dumps(found, ensure_ascii=False)}" for key, found in self.results.items()]
        self.kept.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def rows(self, model: str, arm: str, seeds: Sequence[int]) -> Scores:
        """Each row's score, the mean over seeds; `all` holds those of every task."""
        runs = [self.results[f"{model} | {arm} | {seed}"]["scores"] for seed in (seeds if arm != "base" else [0])]
        found: Scores = {
            task: {row: float(np.mean([run[task][row] for run in runs])) for row in runs[0][task]} for task in runs[0]
        }
        found["all"] = {f"{task} {row}": value for task, rows in found.items() for row, value in rows.items()}
        return found


def shown(found: Interval, sign: str = "") -> str:
    """In per cent, with the 95 % interval."""
    return f"{100 * found.mean:{sign}.1f} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def verdict(name: str, gap: Interval) -> str:
    """What a difference says."""
    if is_noise(gap):
        return f"- {name}: {shown(gap, '+')} points, which may be noise."
    return f"- {name}: {shown(gap, '+')} points: {'better' if gap.mean > 0 else 'worse'}."


def written(runs: Runs, learned: Mapping[str, int], arguments: argparse.Namespace) -> str:
    """The tables as Markdown, and what they say."""
    models, seeds = arguments.models, arguments.seeds
    some = runs.rows(models[0], "base", seeds)
    heads = {name: f"{name} ({HELD_OUT[name].metric}, {len(some[name])})" for name in HELD_OUT}
    heads["all"] = f"all ({len(some['all'])})"
    line = "|---|---|" + "--:|" * len(heads)
    lines = [
        "# Instruction tuning", "",
        f"Rows that are trained: {', '.join(f'{name} {num}' for name, num in learned.items())}. Each model learns them",
        "with the instruction before the input (`with`) and without it (`without`), the same rows, steps and settings:",
        f"LoRA r 16, {arguments.epochs:g} epoch(s), rate {arguments.learning_rate:g}, {len(seeds)} seed(s). Scored are",
        "tasks that neither saw, each asked with its instruction, in per cent, with 95 % intervals over rows; a row's",
        "score is the mean over seeds. `quoref` and `query` are whole tasks of Super-NaturalInstructions, `requests`",
        "Self-Instruct's for users, `options` science questions with options, `intent` banking77's labels, which",
        "the instruction lists. Both models are dequantised from 4 bits.", "",
        f"| model | tuned | {' | '.join(heads.values())} |", line,
    ]  # fmt: skip
    found = {(model, arm): runs.rows(model, arm, seeds) for model in models for arm in ("base", *ARMS)}
    for (model, arm), scores in found.items():
        cells = [shown(interval(list(scores[task].values()), bounded=True)) for task in heads]
        lines.append(f"| {model}, {MODELS.get(model, '')} | {'not' if arm == 'base' else arm} | {' | '.join(cells)} |")
    lines += ["", "Differences, paired by row, in points:", "", f"| model | | {' | '.join(heads.values())} |", line]
    verdicts: list[str] = []
    for model in models:
        for after, before in (("with", "base"), ("without", "base"), ("with", "without")):
            old, new = found[model, before], found[model, after]
            gaps = {task: paired_interval(old[task], new[task], bounded=True) for task in heads}
            name = f"{after} - {'not tuned' if before == 'base' else before}"
            lines.append(f"| {model} | {name} | {' | '.join(shown(gap, '+') for gap in gaps.values())} |")
            verdicts.append(verdict(f"{model}, {MODELS.get(model, '')}, {name}", gaps["all"]))
    lines += ["", "Over all rows:", "", *verdicts, "", "What each says to one row:", ""]
    for model in models:
        for task in HELD_OUT:
            keys = {"not tuned": f"{model} | base | 0", **{arm: f"{model} | {arm} | {seeds[0]}" for arm in ARMS}}
            said = {arm: " ".join(runs.results[key]["answers"][task].split()) for arm, key in keys.items()}
            quoted = [f"{arm} `{text[:70]}`" for arm, text in said.items()]
            lines.append(f"- {model}, {task}: {'; '.join(quoted)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names or folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", type=int, default=36, help="training rows of each task")
    parser.add_argument("--test-rows", type=int, default=32, help="scored rows of each task")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("runs/instructions"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the tables are written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    parts = {name: part.sample(arguments.data, arguments.rows) for name, part in TRAINED.items()}
    rows = [row for part in parts.values() for row in part]
    files = {
        name: str(folder / write(folder / f"{name}.test.jsonl", [
            row.row(instructed=True) for row in part.sample(arguments.data, arguments.test_rows)
        ])) for name, part in HELD_OUT.items()
    }  # fmt: skip
    runs = Runs(arguments.results / "instructions.json")
    for model in arguments.models:
        for seed in arguments.seeds:
            for arm in ARMS:
                if (key := f"{model} | {arm} | {seed}") not in runs.results:
                    log.info("%s: %d rows", key, len(rows))
                    lineage = learn(folder, model, arm, seed, rows, arguments)
                    runs.keep(f"{model} | base | 0", lineage, 0, files)
                    runs.keep(key, lineage, 1, files)
    text = written(runs, {name: len(part) for name, part in parts.items()}, arguments)
    (arguments.results / "instructions.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
