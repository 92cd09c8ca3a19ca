"""Every method on every family: what is trained, what it costs, what it learns, and what a second task undoes.

    python benchmarks/methods.py --data FOLDER [--pretrained FOLDER] [--only lora ia3] [--folder runs/methods]
    python benchmarks/methods.py FAMILY.yaml ... [--only lora ia3] [--folder runs/methods]

FOLDER holds banking77's train.jsonl and test.jsonl with `prompt` and `completion`: a recipe is written for each family,
of two tasks of 11 intents. Seq2seq and decoder are what `benchmarks/pretrain_small.py` wrote to the folder of
`--pretrained`; without it, a T5 from nothing and smollm2-135m. Else FAMILY.yaml is a recipe without `method` and
`strategy`, named for its family: a model, two tasks, training with the learning rate of LoRA.

Each method learns both tasks in order, without protection, in a process of its own. What a cell came to is kept in
results/methods.json, so the command, called again, goes on where it stopped, a cell that was cut short from its
beginning; it ends by writing results/methods.md. A cell that is refused says why.
"""

import argparse
import json
import logging
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from streams import INTENT, INTENTS, OTHER_INTENTS, Part, Row, labelled, write

from retain import distributed
from retain.config import load_config
from retain.config.recipe import read_recipe, write_recipe
from retain.errors import UserError
from retain.evaluation.evaluate import EvaluationConfig, evaluate
from retain.inference import load_stage
from retain.lineage import Lineage
from retain.models.family import pretrained
from retain.models.source import open_source
from retain.parameters import cast_frozen, trainable
from retain.run import read_task, train
from retain.types import Answer

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmark")

SCRATCH = "from scratch"
"""The same network with random weights, all of it trained: a column of the table."""

CLOSE = 1e-3
"""Nats by which a margin may differ after a reload: sums round otherwise in other batches."""


@dataclass(frozen=True)
class Cell:
    """A method as it is tried.

    Args:
        method: the recipe's.
        rate: its learning rate, in LoRA's.
    """

    method: dict[str, Any]
    rate: float = 1.0


CELLS: dict[str, Cell] = {
    "full": Cell({"name": "full"}, 0.1),
    "freeze": Cell({"name": "freeze", "num_layers": 1}, 0.1),
    "lora": Cell({"name": "lora"}),
    "lora, rsLoRA": Cell({"name": "lora", "use_rslora": True}, 0.5),
    "lora, DoRA": Cell({"name": "lora", "use_dora": True}),
    "lora, PiSSA": Cell({"name": "lora", "init": "pissa"}, 0.3),
    "qlora": Cell({"name": "qlora"}),
    "adapter, Pfeiffer": Cell({"name": "adapter"}),
    "adapter, Houlsby": Cell({"name": "adapter", "placement": "houlsby"}),
    "columns": Cell({"name": "columns"}),
    "ia3": Cell({"name": "ia3"}, 10.0),
    "oft": Cell({"name": "oft"}),
    "prompt": Cell({"name": "prompt"}, 30.0),
    "prefix": Cell({"name": "prefix"}, 10.0),
    "p_tuning": Cell({"name": "p_tuning"}, 3.0),
    "peft, VERA": Cell({"name": "peft", "type": "VERA"}, 10.0),
    SCRATCH: Cell({"name": "full"}),
}


MODELS: dict[str, Row] = {
    "ngram": {"model": {"family": "ngram", "order": 3}},
    "recurrent": {"model": {"family": "recurrent", "cell": "lstm", "hidden_size": 128, "vocab_size": 1024}},
    "encoder": {"model": {"name": "minilm-l6"}},
    "seq2seq": {"model": {"family": "seq2seq", "architecture": "t5", "d_model": 128, "vocab_size": 1024}},
    "decoder": {"model": {"name": "smollm2-135m"}},
}
PRETRAINED = {"seq2seq": "t5", "decoder": "llama"}
"""Of the families of which `pretrain_small.py` makes a model, its name."""
RATES = {"recurrent": 1e-2, "seq2seq": 3e-3}
"""LoRA's, where it is not 1e-3."""
EPOCHS = {"recurrent": 16, "seq2seq": 8}
"""Where they are not 4."""


def recipes(data: Path, pretrained: Path | None, folder: Path, *, num_train: int, num_test: int) -> list[Path]:
    """A recipe for each family, and the rows of two tasks: 11 intents, and 11 others."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks: list[Row] = []
    for name, labels in (("intent", INTENTS), ("other", OTHER_INTENTS)):
        part = Part(data.name, INTENT.frame, {}, labelled(*labels), INTENT.longest)
        parts = part.rows(data.parent, num_test)
        rows = {"train": (parts["train"] + parts["validation"])[:num_train], "test": parts["test"]}
        files = {
            split: write(
                folder / f"{name}.{split}.jsonl",
                [{"text": row["prompt"], "label": row["completion"]} for row in found],
            )
            for split, found in rows.items()
        }
        tasks.append({"name": name, **files, "metric": "accuracy", "choices": list(labels)})
    made: list[Path] = []
    for family, settings in MODELS.items():
        model = dict(settings["model"])
        if pretrained is not None and family in PRETRAINED:
            model = {"name": str((pretrained / PRETRAINED[family]).resolve())}
        training = {
            "learning_rate": RATES.get(family, 1e-3), "num_train_epochs": EPOCHS.get(family, 4), "max_length": 128,
        }  # fmt: skip
        recipe = {"model": {**model, "template": "plain"}, "tasks": tasks, "train": training}
        made.append(folder / f"{family}.yaml")
        made[-1].write_text(write_recipe(recipe), encoding="utf-8")
    return made


def learn(recipe: Path, name: str, folder: Path) -> dict[str, Any]:
    """One cell: both tasks learned, and the last stage loaded again."""
    shutil.rmtree(folder, ignore_errors=True)  # of a cell that was cut short: time and memory are of one process
    settings, _ = read_recipe(recipe)
    for task in settings["tasks"]:
        task |= {key: str((recipe.parent / task[key]).resolve()) for key in ("train", "test") if key in task}
    rate = settings.get("train", {}).get("learning_rate", 2e-4)
    settings["train"] = {**settings.get("train", {}), "learning_rate": rate * CELLS[name].rate}
    settings |= {"method": CELLS[name].method, "strategy": "sequential", "protect_base": "off"}
    settings |= {"output_dir": str(folder / "lineage"), "title": f"{recipe.stem}, {name}"}
    settings["evaluation"] = {"probes": False, "kl": False, **settings.get("evaluation", {})}
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "recipe.yaml"
    made.write_text(write_recipe(settings), encoding="utf-8")
    if name == SCRATCH and (model := random_model(made, folder / "model")):
        settings["model"] = model
        made.write_text(write_recipe(settings), encoding="utf-8")
    started = time.perf_counter()
    lineage = train(load_config(made).config)
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before a second model is loaded
    first, second = (stage.name for stage in lineage.log()[1:])
    stages = [lineage.load_stage(index) for index in range(3)]
    return {
        "trained": trained(lineage), "memory": memory, "seconds": seconds, "bytes": saved_bytes(lineage),
        "before": stages[0].scores[first].value, "after": stages[1].scores[first].value,
        "metric": stages[0].scores[first].metric, "second": stages[2].scores[second].value,
        "forgetting": stages[1].scores[first].value - stages[2].scores[first].value,
        "reload": reload_differences(lineage, stages[2].answers),
    }  # fmt: skip


def random_model(recipe: Path, folder: Path) -> str | None:
    """The folder of a model like the recipe's with random weights; None where it starts from nothing anyway."""
    config = load_config(recipe).config
    source = open_source(config.model.name, config.model.family)
    if source.folder is None:
        return None
    model, tokenizer = source.load((), seed=0)
    torch.manual_seed(config.train.seed)
    made: Any = type(model)(pretrained(model).config)  # pyright: ignore[reportArgumentType]
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained(lineage: Lineage) -> int:
    """Parameters that the method moves."""
    return sum(parameter.numel() for parameter in trainable(load_stage(lineage)[0].model).values())


def saved_bytes(lineage: Lineage) -> int:
    """Of the weights of the last stage, with their configuration, without the tokenizer."""
    folder = lineage.stage_folder(lineage.head) / "weights"
    kept = [*folder.rglob("*.safetensors"), *folder.rglob("*config.json")]
    return sum(path.stat().st_size for path in kept if not path.name.startswith("tokenizer"))


def reload_differences(lineage: Lineage, recorded: tuple[Answer, ...]) -> int:
    """Answers of the loaded model that are not those that the trained one gave."""
    target, config = load_stage(lineage)
    precision = distributed.resolve_precision(config.train.precision)
    if precision == "bf16":
        cast_frozen(target.model, torch.bfloat16)  # as it was trained
    tasks = [read_task(lineage.stage_folder(index)) for index in (1, 2)]
    with distributed.autocast(precision):
        evaluation = evaluate(
            target.model, tasks, family=target.family, renderer=target.renderer,
            config=EvaluationConfig(probes=False, kl=False), seed=config.train.seed,
        )  # fmt: skip
    given = {(answer.suite, answer.id): answer for answer in evaluation.answers}
    both = [(answer, given[answer.suite, answer.id]) for answer in recorded if (answer.suite, answer.id) in given]
    return len(recorded) - len(both) + sum(not same(one, other) for one, other in both)


def same(one: Answer, other: Answer) -> bool:
    """Did both say the same, as surely?"""
    return one.answer == other.answer and abs((one.margin or 0) - (other.margin or 0)) < CLOSE


def in_a_process(recipe: Path, name: str, folder: Path) -> dict[str, Any] | None:
    """What a cell came to, or why it was refused, in a process whose memory is its own; None where it broke."""
    command = [sys.executable, __file__, str(recipe), "--cell", name, "--folder", str(folder)]
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return None if made.returncode else json.loads(made.stdout.splitlines()[-1])


def shown(found: dict[str, Any], scratch: dict[str, Any]) -> list[str]:
    """The columns of a cell."""
    if "refused" in found:
        return [f"refused: {found['refused']}", *["–"] * 8]
    start = f"{100 * scratch['after']:.1f}" if "after" in scratch else f"refused: {scratch.get('refused', 'not run')}"
    return [
        f"{found['trained']:,}", f"{found['memory'] / 1e6:.0f}", f"{found['seconds']:.0f}",
        f"{found['bytes'] / 1e6:.2f}", f"{100 * found['before']:.1f}", f"{100 * found['after']:.1f}", start,
        f"{100 * found['forgetting']:+.1f}", "yes" if not found["reload"] else f"no: {found['reload']} answers differ",
    ]  # fmt: skip


def written(results: dict[str, dict[str, Any]], recipes: list[Path]) -> str:
    """The table as Markdown."""
    lines = [
        "# Methods on families", "",
        "Two tasks, one after the other, without protection. Scores, in per cent, are of the first task: of the base",
        "model, after it was learned, and as learned by the same network with random weights. Forgetting, in points,",
        "is what learning the second task took from it. Memory is the largest resident size of the whole process, and",
        "seconds are of both tasks with all scoring; bytes are those of the weights that a stage keeps. `reload`: does",
        "it, loaded again, give each recorded answer? An n-gram model has counts and no parameters.", "",
        "| family | method | trained parameters | memory, MB | seconds | on disk, MB | before | after | from scratch "
        "| forgetting | reload |",
        "|---|---|" + "--:|" * 8 + "---|",
    ]  # fmt: skip
    for recipe in recipes:
        scratch = results.get(f"{recipe.stem} | {SCRATCH}", {})
        cells = {name: results.get(f"{recipe.stem} | {name}") for name in CELLS if name != SCRATCH}
        rows = [[recipe.stem, name, *shown(found, scratch)] for name, found in cells.items() if found]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="*")
    parser.add_argument("--data", type=Path, help="banking77, of which recipes are made")
    parser.add_argument("--pretrained", type=Path, help="with t5 and llama, for these recipes")
    parser.add_argument("--families", nargs="+", choices=list(MODELS), default=list(MODELS), help="of these recipes")
    parser.add_argument("--rows", type=int, default=132, help="training rows of each task of these recipes")
    parser.add_argument("--test-rows", type=int, default=110, help="test rows of each")
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--folder", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table is written")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.cell:
        try:
            found = learn(arguments.recipes[0].resolve(), arguments.cell, arguments.folder.resolve())
        except UserError as error:
            said = error.problems if error.message.startswith("these choices") else (error.message, *error.problems)
            reasons = [reason.removeprefix(f"$.method: {CELLS[arguments.cell].method['name']}: ") for reason in said]
            found = {"refused": "; ".join(reasons).replace("|", "/")}
        print(json.dumps(found))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    kept = arguments.results / "methods.json"
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    tried: list[Path] = list(arguments.recipes)
    if arguments.data:
        own = arguments.folder / "recipes"
        sizes = {"num_train": arguments.rows, "num_test": arguments.test_rows}
        made = recipes(arguments.data.resolve(), arguments.pretrained, own, **sizes)
        tried += [recipe for recipe in made if recipe.stem in arguments.families]
    broken: list[str] = []
    for recipe in tried:
        for name in arguments.only:
            key = f"{recipe.stem} | {name}"
            if key not in results:
                log.info("%s", key)
                folder = arguments.folder / recipe.stem / name.replace(", ", "-").replace(" ", "_")
                if (found := in_a_process(recipe, name, folder)) is None:
                    broken.append(key)
                    continue
                results[key] = found
                kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = written(results, tried)
    (arguments.results / "methods.md").write_text(text, encoding="utf-8")
    print(text)
    if broken:
        raise SystemExit(f"these broke, and are missing: {'; '.join(broken)}")


if __name__ == "__main__":
    main()
