"""Prompt tuning beside PEFT's own: 11 intents of banking77, told apart by a frozen decoder behind 20 virtual tokens.

    python benchmarks/prompt_tuning.py --data FOLDER [--seeds 0 1] [--validation] [--folder runs/prompt_tuning]

FOLDER holds banking77's train.jsonl and test.jsonl with `prompt` and `completion`. Either side learns the same rows in
the plain template with the same settings; PEFT's prompt begins as an instruction's words, ours as tokens drawn from the
vocabulary. Both are scored alike: the likeliest of the 11 labels, and what the model writes. What a run came to is kept
in results/prompt_tuning.json, so the command, called again, goes on where it stopped; it ends by writing
results/prompt_tuning.md. With `--validation`, training rows that neither side trains on are scored instead of the test
rows, and kept in the runs' folder: settings are chosen so.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from streams import INTENT, INTENTS, LABEL, Row, read, write
from torch import Tensor
from torch.nn import functional as F

from retain import distributed
from retain.config import load_config
from retain.config.recipe import write_recipe
from retain.data.tasks import TaskConfig, load_task
from retain.evaluation.grading import exact_match
from retain.evaluation.statistics import Interval, interval, paired_interval
from retain.inference import load_for_answering, load_stage, score
from retain.lineage import Lineage
from retain.models.hub import resolve
from retain.parameters import trainable
from retain.run import train
from retain.types import Task

RESULTS = Path(__file__).parent / "results"
log = logging.getLogger("benchmark")

TEXT = "The intent of the customer is one of: activate card, age limit, change PIN, lost phone, refund, exchange rate"
NUM_TOKENS = 20
GOAL = 0.6
MEASURES = {"accuracy": "likeliest label, %", "exact_match": "written label, %"}

Scores = dict[str, dict[str, float]]
"""By measure and row."""
Ids = tuple[list[int], list[int]]
"""Of a prompt and of what follows it."""


def rows(folder: Path, *, train: int, test: int) -> dict[str, list[Row]]:
    """So many rows of each intent as `streams.py` frames them; `validation` holds training rows that are left over."""
    found: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for split in ("train", "test"):
        everything = read(folder / f"{split}.jsonl")
        for label in INTENTS:
            own = [row for row in everything if row["completion"] == label and len(row["prompt"]) <= INTENT.longest]
            Random(0).shuffle(own)
            own = [INTENT.framed(row) for row in own]
            if split == "train":
                found["validation"] += own[train : train + test]
            found[split] += own[: {"train": train, "test": test}[split]]
    return found


class PlainScript:
    """What everyone writes: PEFT's prompt, AdamW, and a loop.

    Args:
        name: the model's.
        settings: of training, as a recipe has them.
    """

    def __init__(self, name: str, settings: Row) -> None:
        from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.settings = settings
        self.precision = distributed.resolve_precision("auto")
        source = resolve(name).folder
        torch.manual_seed(settings["seed"])
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        prompt = PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=NUM_TOKENS, prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=TEXT, tokenizer_name_or_path=str(source),
        )  # fmt: skip
        self.model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(source, dtype=dtype), prompt)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def ids(self, prompt: str, answer: str) -> Ids:
        """Of a prompt, and of an answer with its stop token."""
        first = self.tokenizer("a")["input_ids"][0]
        start = [first] if first == self.tokenizer.bos_token_id else []
        texts = (prompt, answer + self.tokenizer.eos_token)
        asked, answered = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        return start + asked, answered

    def batch(self, pairs: list[Ids]) -> dict[str, Tensor]:
        """Padded on the right."""
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        free = [longest - len(prompt) - len(answer) for prompt, answer in pairs]
        pad_id = self.tokenizer.pad_token_id or 0
        columns = {
            "input_ids": [p + a + [pad_id] * n for (p, a), n in zip(pairs, free, strict=True)],
            "attention_mask": [[1] * (longest - n) + [0] * n for n in free],
            "labels": [[-100] * len(p) + a + [-100] * n for (p, a), n in zip(pairs, free, strict=True)],
        }
        return {name: torch.tensor(values) for name, values in columns.items()}

    def fit(self, task: Task) -> float:
        """Learn the rows; seconds."""
        from transformers import get_linear_schedule_with_warmup

        pairs = [self.ids(example.prompt[0].content, example.answer) for example in task.train]
        size, epochs = self.settings["per_device_train_batch_size"], self.settings["num_train_epochs"]
        steps = -(-len(pairs) // size) * epochs
        optimizer = torch.optim.AdamW(self.trained, self.settings["learning_rate"], weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, round(self.settings["warmup_ratio"] * steps), steps)
        generator = torch.Generator().manual_seed(self.settings["seed"])
        started = time.perf_counter()
        self.model.train()
        for _ in range(epochs):
            for places in torch.randperm(len(pairs), generator=generator).split(size):
                with distributed.autocast(self.precision):
                    loss = self.model(**self.batch([pairs[place] for place in places.tolist()])).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return time.perf_counter() - started

    @torch.no_grad()
    def ask(self, task: Task) -> Scores:
        """The score of each test row by either measure."""
        found: Scores = {measure: {} for measure in MEASURES}
        self.model.eval()
        stop = self.tokenizer.eos_token_id
        for example in task.test:
            prompt = example.prompt[0].content
            tensors = self.batch([self.ids(prompt, label) for label in task.choices])
            targets = tensors.pop("labels")[:, 1:]
            with distributed.autocast(self.precision):
                logits = self.model(**tensors).logits[:, NUM_TOKENS:-1].float()  # (labels, time - 1, vocab)
                asked = torch.tensor([self.ids(prompt, "")[0]])
                told = self.model.generate(
                    input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False,
                    max_new_tokens=LABEL["max_new_tokens"], eos_token_id=stop, pad_token_id=stop,
                )  # fmt: skip
            nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
            written = self.tokenizer.decode(told[0][asked.shape[1] :], skip_special_tokens=True)
            found["accuracy"][prompt] = float(task.choices[int(nats.argmin())] == example.answer)
            found["exact_match"][prompt] = exact_match(written, [example.answer])
        return found


def plain_peft(task: Task, name: str, settings: Row) -> Row:
    """What the plain script comes to."""
    script = PlainScript(name, settings)
    seconds = script.fit(task)
    return {"scores": script.ask(task), "seconds": seconds, "trained": sum(p.numel() for p in script.trained)}


def ours(task: Row, name: str, settings: Row, path: Path) -> Row:
    """What `method: prompt` comes to, and the base model; the lineage is learned or taken up."""
    recipe = {
        "model": {"name": name, "template": "plain"}, "method": {"name": "prompt", "num_tokens": NUM_TOKENS},
        "strategy": "sequential", "protect_base": "off", "tasks": [task], "train": settings,
        "evaluation": {"probes": False, "kl": False}, "output_dir": str(path),
    }  # fmt: skip
    made = path.with_suffix(".yaml")
    made.write_text(write_recipe(recipe), encoding="utf-8")
    lineage = train(load_config(made).config)
    found: Row = {key: scored(lineage, stage, task) for key, stage in (("base", 0), ("scores", 1))}
    trained = sum(parameter.numel() for parameter in trainable(load_stage(lineage)[0].model).values())
    return {**found, "seconds": sum(info.seconds for info in lineage.load_stage(1).history), "trained": trained}


def scored(lineage: Lineage, stage: int, task: Row) -> Scores:
    """The likeliest labels as the lineage recorded them, and what the loaded stage writes."""
    target = load_for_answering(str(lineage.path), stage=stage)
    asked = load_task(TaskConfig(name="written", train=task["train"], test=task["test"], **LABEL)).task
    given = {
        "accuracy": [answer for answer in lineage.load_stage(stage).answers if answer.suite == task["name"]],
        "exact_match": score(target, [asked], probes=False).answers,
    }
    return {measure: {answer.prompt: answer.score for answer in answers} for measure, answers in given.items()}


def over_seeds(runs: list[Row], measure: str, key: str = "scores") -> dict[str, float]:
    """Each row's score, the mean over seeds."""
    return {row: float(np.mean([run[key][measure][row] for run in runs])) for row in runs[0][key][measure]}


def shown(found: Interval, sign: str = "") -> str:
    """In per cent, with the 95 % interval."""
    return f"{100 * found.mean:{sign}.1f} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def written(results: dict[str, Row], arguments: argparse.Namespace, num_train: int) -> str:
    """The table as Markdown."""
    sides = {side: [results[f"{side} | {seed}"] for seed in arguments.seeds] for side in ("PEFT", "retain")}
    num_test = len(over_seeds(sides["retain"], "accuracy"))
    lines = [
        "# Prompt tuning on 11 intents", "",
        f"{arguments.model}, frozen, behind {NUM_TOKENS} virtual tokens; {num_train} training and {num_test} test rows",
        f"of banking77, {arguments.epochs} epochs at {arguments.learning_rate:g}, {len(arguments.seeds)} seed(s).",
        "PEFT's prompt begins as the words of an instruction, retain's as tokens drawn from the vocabulary. The",
        f"likeliest label is one of 11, of which guessing finds {100 / len(INTENTS):.1f} %; a written one must be",
        "right to the letter. Intervals are of 95 % over rows, a row's score the mean over seeds.", "",
        f"| | {' | '.join(MEASURES.values())} | by seed | trained parameters | seconds of training |",
        "|---|--:|--:|---|--:|--:|",
    ]  # fmt: skip
    before = [shown(interval(list(over_seeds(sides["retain"], measure, "base").values()))) for measure in MEASURES]
    lines.append(f"| before | {' | '.join(before)} | | | |")
    reached: dict[str, float] = {}
    for side, runs in sides.items():
        means = [interval(list(over_seeds(runs, measure).values()), bounded=True) for measure in MEASURES]
        reached[side] = min(mean.mean for mean in means)
        each = [
            " / ".join(f"{100 * np.mean(list(run['scores'][measure].values())):.1f}" for measure in MEASURES)
            for run in runs
        ]
        seconds = np.mean([run["seconds"] for run in runs])
        cells = [*map(shown, means), ", ".join(each), f"{runs[0]['trained']:,}", f"{seconds:.0f}"]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    gaps = [
        shown(paired_interval(*(over_seeds(runs, measure) for runs in sides.values()), bounded=True), "+")
        for measure in MEASURES
    ]
    lines.append(f"| retain - PEFT, points | {' | '.join(gaps)} | | | |")
    said = ", ".join(f"{side} {'reaches' if value >= GOAL else 'misses'} it" for side, value in reached.items())
    lines += ["", f"{100 * GOAL:.0f} % by both measures: {said}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, the sides in turn, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=30, help="training rows of each intent")
    parser.add_argument("--test-rows", type=int, default=10, help="scored rows of each intent")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--only", nargs="+", choices=["PEFT", "retain"], default=["PEFT", "retain"])
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/prompt_tuning"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table is written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = rows(arguments.data, train=arguments.rows, test=arguments.test_rows)
    files = {split: str(folder / write(folder / f"{split}.jsonl", part)) for split, part in parts.items()}
    task: Row = {
        "name": "intent", "train": files["train"], "test": files["validation" if arguments.validation else "test"],
        "metric": "accuracy", "choices": list(INTENTS),
    }  # fmt: skip
    loaded = load_task(TaskConfig(**{**task, "choices": INTENTS})).task
    kept: Path = (folder if arguments.validation else arguments.results) / "prompt_tuning.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Row] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for seed in arguments.seeds:
        settings = {
            "learning_rate": arguments.learning_rate, "num_train_epochs": arguments.epochs, "warmup_ratio": 0.05,
            "per_device_train_batch_size": 8, "max_length": 128, "seed": seed,
        }  # fmt: skip
        for side in arguments.only:
            if (key := f"{side} | {seed}") in results:
                continue
            log.info("%s: %d rows", key, len(loaded.train))
            if side == "PEFT":
                results[key] = plain_peft(loaded, arguments.model, settings)
            else:
                results[key] = ours(task, arguments.model, settings, folder / f"retain-{seed}")
            for measure, values in results[key]["scores"].items():
                log.info("%s: %s %.1f %%", key, measure, 100 * np.mean(list(values.values())))
            kept.write_text(json.dumps(results) + "\n", encoding="utf-8")
    if not arguments.validation and len(arguments.only) == 2:
        text = written(results, arguments, len(loaded.train))
        (arguments.results / "prompt_tuning.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
