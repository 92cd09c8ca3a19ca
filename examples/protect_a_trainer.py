"""Protect a `transformers.Trainer` with one call: a tiny Llama learns two tasks, plainly and with replay.

    python examples/protect_a_trainer.py

A few seconds on a CPU. Real use differs in the model only.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from retain import Replay, protect

FIRST = [[1, 10 + i, 20 + i] for i in range(8)]  # token 10 + i is followed by 20 + i
SECOND = [[1, 40 + i, 50 + i] for i in range(8)]


def tiny_llama() -> LlamaForCausalLM:
    """Two layers of width 32, the same weights each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def trainer_of(model: LlamaForCausalLM, rows: list[list[int]], folder: str) -> Trainer:
    """A plain Trainer."""
    settings = TrainingArguments(
        output_dir=folder, max_steps=60, learning_rate=5e-3, per_device_train_batch_size=8, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": row, "labels": [-100, -100, row[2]]} for row in rows])
    return Trainer(model, settings, train_dataset=data, data_collator=default_data_collator)


@torch.no_grad()
def nats(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """The mean loss of the last token."""
    ids = torch.tensor(rows)
    log_probs = model.eval()(input_ids=ids).logits[:, 1].log_softmax(dim=-1)
    return -float(log_probs.gather(1, ids[:, 2:]).mean())


def main() -> None:
    """Learn both tasks without old rows and with a share of them."""
    for ratio in (0.0, 0.3):
        model = tiny_llama()
        with tempfile.TemporaryDirectory() as folder:
            first = trainer_of(model, FIRST, folder)
            protection = protect(first, Replay(ratio=ratio), task="first", base="off")
            first.train()
            protection.consolidate(f"{folder}/memory")
            learned = nats(model, FIRST)
            second = trainer_of(model, SECOND, folder)
            protect(second, Replay(ratio=ratio), task="second", memory=f"{folder}/memory")
            second.train()
        print(
            f"replay {ratio:.0%}: the first task {learned:.2f} nats when learned, {nats(model, FIRST):.2f} now; "
            f"the second {nats(model, SECOND):.2f}"
        )


if __name__ == "__main__":
    main()
