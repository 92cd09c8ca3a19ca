"""A Trainer's rows as tasks: targets where its own loss has them, and rows that come back from a memory."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from retain.errors import CompatibilityError, DataError
from retain.protection import protect
from retain.storage.state import load_state
from retain.strategies.ewc import EWC
from retain.trainer_task import TrainerMethod, TrainerTask, example_of
from retain.types import IGNORED, Example, Message, Sampling

ROWS = [
    {"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [-100, 6, 7, 8]},
    {"input_ids": [9, 10], "attention_mask": [1] * 2, "labels": [-100, 10]},
]
EXAMPLES = [example_of(row, task="t") for row in ROWS]
SETTINGS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def bound(collate: Any, tokenizer: Any = None, **options: Any) -> TrainerTask:
    settings: dict[str, Any] = {
        "name": "t", "examples": EXAMPLES, "columns": tuple(ROWS[0]), "collate": collate, "tokenizer": tokenizer,
        "method": TrainerMethod(adapter=False), "autocast": nullcontext, "device": torch.device("cpu"),
        "batch_size": 2, "seed": 0,
    }  # fmt: skip
    return TrainerTask(**(settings | options))


def test_padded_rows(tokenizer: Any, llama: Any) -> None:
    task = bound(DataCollatorForSeq2Seq(tokenizer))
    [batch] = task.batches(EXAMPLES)
    assert batch.targets.tolist() == [[6, 7, 8, IGNORED], [10, IGNORED, IGNORED, IGNORED]]
    assert batch.target_documents.tolist() == [0, 0, 0, 1]
    assert batch.examples == tuple(EXAMPLES)
    padded = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in ROWS])
    theirs = llama(**padded).loss  # a mean over the counted targets
    torch.testing.assert_close(task.loss(task.forward(llama, batch), batch) / 4, theirs)


def test_rows_one_after_another(llama: Any) -> None:
    task = bound(DataCollatorWithFlattening())
    [batch] = task.batches(EXAMPLES)
    assert batch.targets.shape == (1, 6)
    assert batch.targets[0].tolist() == [6, 7, 8, IGNORED, 10, IGNORED]
    assert batch.documents[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.target_documents.tolist() == [0, 0, 0, 1]


def test_batches_stay_within_the_tokens(tokenizer: Any) -> None:
    task = bound(DataCollatorForSeq2Seq(tokenizer), batch_size=8)
    assert [len(batch.examples) for batch in task.batches(EXAMPLES * 3)] == [6]
    assert [len(batch.examples) for batch in task.batches(EXAMPLES * 3, max_tokens=8)] == [2, 2, 2]
    assert [len(batch.examples) for batch in task.batches(EXAMPLES * 3, max_tokens=1)] == [1] * 6


def test_likelihoods_and_embeddings_are_of_each_row(tokenizer: Any, llama: Any) -> None:
    task = bound(DataCollatorForSeq2Seq(tokenizer))
    together = task.loglikelihood(llama, EXAMPLES)
    for example, found in zip(EXAMPLES, together, strict=True):
        assert found == pytest.approx(task.loglikelihood(llama, [example])[0], rel=1e-5)
    embedded = task.embed(llama, EXAMPLES)
    [batch] = task.batches(EXAMPLES[:1])
    hidden = llama(**batch.inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(embedded[0], hidden[0, :3].mean(dim=0))


def test_a_row_comes_back_as_it_was() -> None:
    task = bound(default_data_collator)
    assert task.row(EXAMPLES[0]) == ROWS[0]
    assert task.num_tokens(EXAMPLES[1]) == 2
    assert example_of(ROWS[0], task="other").id == EXAMPLES[0].id
    with pytest.raises(DataError, match="cannot be kept"):
        example_of({"image": object()}, task="t")
    with pytest.raises(DataError, match="has no labels"):
        task.example({"input_ids": [1], "attention_mask": [1]}, name="base")


def test_texts_and_conversations_become_rows(tokenizer: Any, llama: Any) -> None:
    task = bound(DataCollatorForSeq2Seq(tokenizer), tokenizer)
    ids = tokenizer("The lazy dog")["input_ids"]
    assert task.row(task.example("The lazy dog", name="base")) == {
        "input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids,
    }  # fmt: skip
    turns = (Message("user", "name"), Message("assistant", "red"))
    spoken = task.row(Example(id="c", messages=turns))["input_ids"]
    assert "assistant" in tokenizer.decode(spoken)
    texts = [Example(id="a", text="The lazy"), Example(id="b", messages=turns)]
    sampling = Sampling(temperature=1.0, seed=1)
    made = task.generate(llama, texts, max_new_tokens=4, sampling=sampling)
    assert made == task.generate(llama, texts, max_new_tokens=4, sampling=sampling)
    assert len(made) == 2


def test_what_a_trainer_cannot_do_is_refused(llama: Any) -> None:
    task = bound(default_data_collator, columns=("input_ids", "pixel_values"))
    with pytest.raises(CompatibilityError, match="cannot be made from a text") as caught:
        task.row(Example(id="a", text="b"))
    assert "pixel_values" in caught.value.problems[0]
    with pytest.raises(CompatibilityError, match="cannot write text"):
        task.generate(llama, [], max_new_tokens=1, sampling=Sampling())
    with pytest.raises(CompatibilityError, match="our loop"):
        task.fit(llama, [])
    method = TrainerMethod(adapter=False)
    assert method.modules(llama) == []
    assert list(method.low_rank(llama)) == []
    for refused in (
        lambda: method.detached(llama), lambda: method.extend(llama, "a"), lambda: method.activate(llama, ["a"])
    ):  # fmt: skip
        with pytest.raises(CompatibilityError):
            refused()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = BertForSequenceClassification(config)
    rows = [{"input_ids": [1, 2 + i, 3], "attention_mask": [1, 1, 1], "labels": i % 3} for i in range(9)]
    settings = {**SETTINGS, "output_dir": str(tmp_path / "out")}
    trainer = Trainer(
        model, TrainingArguments(**settings), train_dataset=Dataset.from_list(rows), data_collator=default_data_collator
    )
    strategy = EWC(strength=1e3, num_samples=9, fisher="empirical")
    protection = protect(trainer, strategy, base=rows[:3])
    [batch] = protection.task.batches(protection.task.examples[:2])
    assert batch.targets.tolist() == [[0], [1]]
    found = protection.task.loglikelihood(model, protection.task.examples[:2])
    nats = F.cross_entropy(model.eval()(**batch.inputs).logits, torch.tensor([0, 1]), reduction="none")
    assert found == pytest.approx((-nats).tolist(), rel=1e-5)
    assert protection.task.embed(model, protection.task.examples[:4]).shape == (4, 16)
    trainer.train()
    protection.consolidate(tmp_path / "memory")
    assert load_state(tmp_path / "memory")["tasks"] == ["base", "task"]
