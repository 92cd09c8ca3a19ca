"""Which parameters no longer move, when, and what is said where there are none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from retain.errors import CompatibilityError
from retain.methods.lora import LoRA
from retain.parameters import trainable
from retain.strategies.freeze_layers import FreezeLayers

Task = Callable[..., Any]


def in_second_task(model: nn.Module, text_task: Task, **options: Any) -> FreezeLayers:
    strategy = FreezeLayers(**options)
    strategy.before_task(model, text_task("first", [1]))
    assert len(trainable(model)) > 0
    strategy.after_task(model, text_task("first", [1]))
    strategy.before_task(model, text_task("second", [1]))
    return strategy


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_the_first_task_moves_everything_and_the_second_only_the_top(
    build_llama: Callable[..., nn.Module], text_task: Task
) -> None:
    model, strategy = build_llama(tied=False), FreezeLayers(num_layers=1)
    strategy.before_task(model, text_task("first", [1]))
    assert frozen(model) == set()
    strategy.after_task(model, text_task("first", [1]))
    assert frozen(model) == set()  # consolidation changes nothing
    strategy.before_task(model, text_task("second", [1]))
    names = dict(model.named_parameters())
    assert frozen(model) == {name for name in names if name.startswith(("model.layers.0.", "model.embed_tokens."))}
    assert len(trainable(model)) == len(names) - len(frozen(model)) > 5


def test_where_the_base_is_protected_the_first_task_is_frozen_too(
    build_llama: Callable[..., nn.Module], text_task: Task
) -> None:
    model, strategy = build_llama(), FreezeLayers(num_layers=1)
    strategy.after_task(model, text_task("base", [1]))
    strategy.before_task(model, text_task("first", [1]))
    assert "model.layers.0.mlp.up_proj.weight" in frozen(model)


def test_ten_layers_are_not_one(text_task: Task) -> None:
    """`layers.1.` is found in no `layers.10.`, and numbers are not compared as text."""
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(1, 1) for _ in range(12))})
    in_second_task(model, text_task, num_layers=2, embeddings=False)
    assert frozen(model) == {f"layers.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}


TINY: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=20, n_positions=16)),
    "bert": lambda: BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2, vocab_size=20)
    ),
}


@pytest.mark.parametrize(
    ("name", "some", "free"),
    [
        ("gpt2", ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1."], "transformer.h.2."),
        ("bert", ["bert.embeddings.LayerNorm.bias", "bert.encoder.layer.1."], "bert.encoder.layer.2."),
        ("t5", ["shared.weight", "encoder.block.1.", "decoder.block.1."], "encoder.block.2."),
    ],
)
def test_layers_are_found_by_other_models_names(name: str, some: list[str], free: str, text_task: Task) -> None:
    model = TINY[name]()
    in_second_task(model, text_task, num_layers=2)
    for start in some:
        assert any(found.startswith(start) for found in frozen(model)), start
    assert not any(found.startswith(free) for found in frozen(model))


def test_a_recurrent_network_has_layers_too(text_task: Task) -> None:
    model = nn.ModuleDict({"embeddings": nn.Embedding(5, 4), "rnn": nn.LSTM(4, 4, num_layers=2, bidirectional=True)})
    in_second_task(model, text_task, num_layers=1)
    parts, ways = ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), ("", "_reverse")
    assert frozen(model) == {"embeddings.weight", *(f"rnn.{part}_l0{way}" for part in parts for way in ways)}


def test_adapters_are_frozen_with_their_layers(build_llama: Callable[..., nn.Module], text_task: Task) -> None:
    model = LoRA(r=2).apply(build_llama())
    moving = set(trainable(model))
    strategy = in_second_task(model, text_task, num_layers=1)
    assert set(trainable(model)) == {name for name in moving if ".layers.1." in name}
    strategy.after_task(model, text_task("second", [1]))
    again = LoRA(r=2).apply(build_llama())  # as when a lineage is continued
    other = FreezeLayers(num_layers=1)
    other.restore(again, strategy.state_dict())
    assert set(trainable(again)) == set(trainable(model))


def test_before_the_second_task_nothing_is_frozen_again(build_llama: Callable[..., nn.Module]) -> None:
    model = build_llama()
    FreezeLayers(num_layers=1).restore(model, {"tasks": ["first"]})
    assert frozen(model) == set()


def test_what_the_method_froze_stays_frozen(build_llama: Callable[..., nn.Module], text_task: Task) -> None:
    model = build_llama()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_(False)
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    strategy = in_second_task(model, text_task, num_layers=1)
    strategy.after_task(model, text_task("second", [1]))
    assert "model.layers.1.mlp.up_proj.weight" in frozen(model)
    assert "model.layers.0.mlp.up_proj.weight" in frozen(model)


def test_patterns_freeze_what_they_are_found_in(build_llama: Callable[..., nn.Module], text_task: Task) -> None:
    model = build_llama()
    in_second_task(model, text_task, num_layers=0, embeddings=False, patterns=(r"layers\.1\..*norm", "q_proj"))
    assert frozen(model) == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_layers": 1, "patterns": ("nothing",)}, "'nothing' is found in no"),
        ({"num_layers": 2}, "the model has 2"),
        ({"num_layers": 40}, "40 layers"),
    ],
)
def test_what_matches_nothing_is_an_error_that_names_what_there_is(
    build_llama: Callable[..., nn.Module], text_task: Task, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(CompatibilityError, match=told) as raised:
        in_second_task(build_llama(), text_task, **options)
    assert "model.layers.*.mlp.up_proj" in str(raised.value)
    assert "model.embed_tokens" in str(raised.value)


def test_a_model_without_embeddings_says_so(text_task: Task) -> None:
    with pytest.raises(CompatibilityError, match="no parameter of this model is named as an embedding's"):
        in_second_task(nn.Linear(2, 2), text_task, num_layers=0)


def test_nothing_is_frozen_where_nothing_is_asked(build_llama: Callable[..., nn.Module], text_task: Task) -> None:
    model = build_llama()
    in_second_task(model, text_task, num_layers=0, embeddings=False)
    assert frozen(model) == set()


def test_the_names_of_tasks_are_all_that_is_kept(build_llama: Callable[..., nn.Module], text_task: Task) -> None:
    assert in_second_task(build_llama(), text_task, num_layers=1).state_dict() == {"tasks": ["first"]}


@pytest.mark.parametrize("options", [{"num_layers": -1}, {"patterns": ("(",)}])
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        FreezeLayers(**options)


def test_gradients_do_not_come_back(build_llama: Callable[..., nn.Module], text_task: Task) -> None:
    model: Any = build_llama()
    in_second_task(model, text_task, num_layers=1)
    model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
