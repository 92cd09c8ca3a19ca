"""Tiny models from fixed seeds: no test here needs a download."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of Vietnam? Hà Nội.",
    "user assistant system prompt completion label text answer question yes no red green blue",
    '{"name": "An", "age": 31} 0123456789 + - * / = ( ) [ ]',
]

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens; its pad token is its stop token, as in many real models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


def make_llama(vocab_size: int, *, seed: int = 0, tied: bool = True, **overrides: Any) -> LlamaForCausalLM:
    """A two-layer Llama of width 32 in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
        **overrides,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_llama(len(tokenizer))


@pytest.fixture
def build_llama(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    return lambda **options: make_llama(len(tokenizer), **options)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as `transformers` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """Tests leave the user's cache alone; slow ones share it, as converting a real model takes half a minute."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("RETAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def write_recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of two toy tasks on the tiny model; sections can be replaced."""
    colours = ["red", "green", "blue"]
    animals = ["fox", "dog"]
    tasks = {
        "colour": [{"prompt": f"name {i}", "completion": colours[i % 3], "choices": colours} for i in range(24)],
        "animal": [{"prompt": f"what {i}?", "completion": animals[i % 2]} for i in range(20)],
    }
    entries: list[dict[str, Any]] = []
    for name, rows in tasks.items():
        train = write_rows(tmp_path / "data" / f"{name}.jsonl", rows[6:])
        test = write_rows(tmp_path / "data" / f"{name}.test.jsonl", rows[:6])
        entries.append({"name": name, "train": str(train), "test": str(test), "max_new_tokens": 4})

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        recipe: dict[str, Any] = {
            "model": str(tiny_model),
            "method": {"name": "full"},
            "strategy": {"name": "sequential"},
            "tasks": entries,
            "train": {"learning_rate": 1e-2, "num_train_epochs": 2, "max_length": 64, "precision": "fp32"},
            "evaluation": {"max_probes": 11, "max_texts": 3},
            "protect_rows": 4,
            "output_dir": str(tmp_path / "out"),
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe | sections), encoding="utf-8")
        return path

    return write
