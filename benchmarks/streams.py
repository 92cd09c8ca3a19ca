"""The streams of `benchmarks/strategies.py`: rows and recipes, made from public sets.

    python benchmarks/streams.py --data FOLDER --out runs/streams

FOLDER holds one folder a set (banking77, sib200_multi, e2e_nlg, arc_easy, mmlu_a, wikitext2_valid), each with
`train.jsonl` and `test.jsonl` of prompt and completion or text. Written are, for each stream, its tasks' train,
validation and test rows, STREAM.yaml, which scores the test rows, and STREAM.tune.yaml, which scores the validation
rows: a part of the set's train rows that neither recipe trains on, where strengths are chosen.

Prompts are short and framed ("... Topic:"), and the template is plain, so that a stream of five tasks and 300 scored
rows each takes minutes on two cores.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

Row = dict[str, Any]

NUM_TRAIN = 96
NUM_VALIDATION = 60
NUM_TEST = {"smollm2": 300, "small": 120, "small_lora": 120}


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Part:
    """A task of a stream.

    Args:
        source: the set's folder.
        frame: the prompt, from the row's fields.
        settings: of the task in the recipe.
        keep: the rows that are taken.
        longest: characters that a prompt may have.
        answer: the completion, from the row's fields.
    """

    source: str
    frame: str
    settings: Row
    keep: Callable[[Row], bool] = lambda row: True
    longest: int = 200
    answer: str = "{completion}"

    def rows(self, folder: Path, num_test: int) -> dict[str, list[Row]]:
        """Train, validation and test rows; a set without train rows is cut in two."""
        train, test = (read(folder / self.source / f"{split}.jsonl") for split in ("train", "test"))
        random = Random(0)
        for rows in (train, test):
            rows[:] = [row for row in rows if self.keep(row) and len(row["prompt"]) <= self.longest]
            random.shuffle(rows)
        if not train:
            train, test = test[num_test:], test[:num_test]
        found = {
            "train": train[:NUM_TRAIN],
            "validation": train[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION],
            "test": test[:num_test],
        }
        return {split: [self.framed(row) for row in rows] for split, rows in found.items()}

    def framed(self, row: Row) -> Row:
        """The row as the task asks it."""
        asked = {"prompt": self.frame.format(**row), "completion": self.answer.format(**row)}
        own = asked["completion"] == row["completion"]  # its choices and references are of the set's own question
        return asked | {key: row[key] for key in ("choices", "references") if own and key in row}


def labelled(*labels: str) -> Callable[[Row], bool]:
    """Rows with one of these completions."""
    return lambda row: row["completion"] in labels


INTENTS = (
    "activate_my_card", "age_limit", "card_arrival", "card_swallowed", "change_pin", "country_support",
    "edit_personal_details", "exchange_rate", "lost_or_stolen_phone", "request_refund", "top_up_limits",
)  # fmt: skip
OTHER_INTENTS = (
    "atm_support", "beneficiary_not_allowed", "cancel_transfer", "card_about_to_expire", "cash_withdrawal_charge",
    "contactless_not_working", "disposable_card_limits", "passcode_forgotten", "terminate_account",
    "topping_up_by_card", "verify_my_identity",
)  # fmt: skip

LABEL = {"metric": "exact_match", "max_new_tokens": 12}
INTENT = Part("banking77", "Customer: {prompt}\nIntent:\n", LABEL, labelled(*INTENTS), 90)
OTHER = Part("banking77", "Customer: {prompt}\nIntent:\n", LABEL, labelled(*OTHER_INTENTS), 90)
SCIENCE = Part(
    "arc_easy", "{prompt}\nAnswer:\n", {"metric": "accuracy"},
    lambda row: len(set(row["choices"])) == len(row["choices"]), 160,
)  # fmt: skip
RESTAURANT = Part("e2e_nlg", "{prompt}\nDescription:\n", {"metric": "rouge_l", "max_new_tokens": 24}, longest=160)
LANGUAGE = Part(
    "sib200_multi", "{prompt:.24}\nLanguage:\n", LABEL,
    lambda row: row["task"].endswith(("deu_Latn", "fra_Latn", "rus_Cyrl", "hin_Deva")), 10_000, "{task}",
)  # fmt: skip
SUBJECT = Part("mmlu_a", "{prompt}\nSubject:\n", LABEL, longest=160, answer="{task}")

SMALL: Row = {
    "model": {"name": "small", "template": "plain"},
    "method": {"name": "full"},
    "tasks": {"intent": INTENT, "language": LANGUAGE, "restaurant": RESTAURANT, "subject": SUBJECT, "other": OTHER},
    "train": {"learning_rate": 1.0e-3, "num_train_epochs": 4, "max_length": 256},
    "evaluation": {"probes": False, "max_texts": 24, "matrix": "lower"},
}
"""On the model of pretrain.yaml: `retain train pretrain.yaml`, then `retain export pretrain small`."""

STREAMS: dict[str, Row] = {
    "smollm2": {
        "model": {"name": "smollm2-135m", "template": "plain"},
        "method": {"name": "lora", "r": 16, "alpha": 32},
        "tasks": {
            "intent": INTENT,
            "science": SCIENCE,
            "language": LANGUAGE,
            "restaurant": RESTAURANT,
            "subject": SUBJECT,
        },
        "train": {"learning_rate": 1.0e-3, "num_train_epochs": 2, "max_length": 256},
        "evaluation": {"max_probes": 33, "max_texts": 6, "matrix": "ends"},
        "tuning": {"intent", "language"},
    },
    "small": SMALL,
    "small_lora": {
        **SMALL,
        "method": {"name": "lora", "r": 16, "alpha": 32},
        "train": {**SMALL["train"], "learning_rate": 5.0e-3},
    },
}
"""By name. `tuning`: the tasks that strengths are chosen on, where all would take too long."""


def write(path: Path, rows: Iterable[Row]) -> str:
    """Write JSON lines; the file's name."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path.name


def main() -> None:
    """Write every stream, and the recipe that pre-trains the small model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/streams"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, stream in STREAMS.items():
        recipes: dict[str, list[Row]] = {"": [], ".tune": []}
        for task, part in stream["tasks"].items():
            rows = part.rows(arguments.data, NUM_TEST[name])
            files = {split: write(arguments.out / f"{name}.{task}.{split}.jsonl", rows[split]) for split in rows}
            print(name, task, {split: len(found) for split, found in rows.items()})
            for kind, scored in (("", "test"), (".tune", "validation")):
                recipes[kind].append({"name": task, "train": files["train"], "test": files[scored], **part.settings})
        recipes[".tune"] = [task for task in recipes[".tune"] if task["name"] in stream.get("tuning", stream["tasks"])]
        settings = {key: value for key, value in stream.items() if key != "tuning"}
        unmeasured = {**stream["evaluation"], "probes": False, "kl": False}  # strengths are chosen by the tasks alone
        for kind, tasks in recipes.items():
            own = {"evaluation": unmeasured} if kind else {}
            recipe = yaml.safe_dump({**settings, **own, "tasks": tasks}, sort_keys=False)
            (arguments.out / f"{name}{kind}.yaml").write_text(recipe, encoding="utf-8")
    texts = [row for split in ("train", "test") for row in read(arguments.data / "wikitext2_valid" / f"{split}.jsonl")]
    pretrain = {
        "model": {"family": "decoder", "architecture": "llama", "hidden_size": 128, "vocab_size": 2048},
        "method": "full",
        "strategy": "sequential",
        "protect_base": "off",
        "tasks": [
            {"name": "text", "train": write(arguments.out / "text.train.jsonl", texts[:-100]), "metric": "perplexity",
             "test": write(arguments.out / "text.test.jsonl", texts[-100:])},
        ],
        "train": {"learning_rate": 3.0e-3, "num_train_epochs": 4, "max_length": 256, "on_overflow": "split",
                  "max_tokens_per_batch": 4096},
        "evaluation": {"probes": False, "kl": False},
        "output_dir": "pretrain",
    }  # fmt: skip
    (arguments.out / "pretrain.yaml").write_text(yaml.safe_dump(pretrain, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
