"""What soft prompts have in common: what they refuse, and how they are switched."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from retain.data.rendering import Renderer
from retain.errors import CompatibilityError, LineageError
from retain.methods.p_tuning import Ptuning
from retain.methods.prefix import Prefix
from retain.methods.prompt import Prompt
from retain.methods.soft_prompt import WEIGHTS, SoftPrompt, peft_sizes
from retain.models.decoder import DecoderFamily
from retain.models.encoder import EncoderFamily
from retain.models.ngram import NGramFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.seq2seq import Seq2SeqFamily
from retain.parameters import trainable
from retain.types import Example, Message, Task

METHODS = [Prompt(num_tokens=2), Prefix(num_tokens=2), Ptuning(num_tokens=2, hidden_size=4)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_switched_off_the_base_answers(llama: nn.Module, method: SoftPrompt) -> None:
    ids = torch.arange(5, 15)[None]
    before = llama(input_ids=ids).logits
    model = method.apply(llama)
    assert method.modules(model) == ["default"]
    assert torch.equal(method.activate(model, [])(input_ids=ids).logits, before)
    assert not torch.equal(method.activate(model, ["default"])(input_ids=ids).logits[:, -10:], before)
    with pytest.raises(CompatibilityError, match="merged"):
        method.merge(model)
    assert method.low_rank(model) == ()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_reads_virtual_tokens(method: SoftPrompt) -> None:
    assert {method.supports(family) for family in (DecoderFamily(), EncoderFamily(), Seq2SeqFamily())} == {None}
    assert "recurrent" in (method.supports(RecurrentFamily()) or "")
    assert "ngram" in (method.supports(NGramFamily()) or "")
    assert not method.packs
    assert method.can_extend == (method.name == "prompt")


def test_sizes(llama: nn.Module) -> None:
    sizes = peft_sizes(llama)
    assert (sizes["num_layers"], sizes["num_attention_heads"], sizes["token_dim"]) == (2, 4, 32)
    assert sizes["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("metric", "answers", "kind"),
    [
        ("accuracy", ("red", "blue"), "SEQ_CLS"),
        ("tag_accuracy", ("O", "X"), "TOKEN_CLS"),
        ("", (), "FEATURE_EXTRACTION"),
    ],
)
def test_heads_are_saved_beside_a_prompt(metric: str, answers: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    """PEFT's name for the work, its file, and a head of another shape refused."""
    rows = tuple(Example(str(i), messages=ask("sky", answer)) for i, answer in enumerate(answers * 4))
    task = Task("task", rows or (Example("0", text="sky"),), metric=metric or "perplexity")
    made = [encoder(task, *more) for more in ((), ("grey",))]
    method = Prompt(num_tokens=2)
    model = method.apply(made[0])
    method.save(model, tmp_path)
    settings, saved = (tmp_path / "adapter_config.json").read_text("utf-8"), load_file(tmp_path / WEIGHTS)
    assert f'"task_type": "{kind}"' in settings
    heads = {f"base_model.{name}" for name in trainable(model) if not name.startswith("prompts.")}
    assert saved.keys() == {"prompt_embeddings", *heads}
    assert bool(heads) == bool(answers)
    if answers:
        assert "base_model.classifier.weight" in heads
        with pytest.raises(LineageError, match="not of this model"):
            method.load(made[1], tmp_path)
    again = method.load(encoder(task), tmp_path)
    assert trainable(again).keys() == trainable(model).keys()
    assert all(torch.equal(value, trainable(model)[name]) for name, value in trainable(again).items())
    if not answers:  # a head that was made for a later task
        later = encoder(Task("later", tuple(Example(str(i), messages=ask("sky", "red")) for i in range(4))))
        assert "classifier.weight" in trainable(method.load(later, tmp_path))


def ask(text: str, answer: str) -> tuple[Message, ...]:
    return (Message("user", text), Message("assistant", answer))


def encoder(task: Task, *more: str) -> nn.Module:
    """A tiny encoder that has heads for the task, and further classes."""
    family = EncoderFamily(
        architecture="bert", hidden_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=300
    )
    model, tokenizer = family.create(task.train, seed=0)
    renderer = Renderer(tokenizer)
    labels = tuple(sorted({row.answer for row in task.train if row.messages}))
    task = replace(task, choices=(*labels, *more)) if labels else task
    return family.prepare(family.equip(model, renderer, [task], seed=0), renderer, task, seed=0)
