"""Soft prompts: PEFT's own answers, an order that is the paper's, old prompts that never change."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from retain.errors import CompatibilityError, LineageError
from retain.methods.prompt import Prompt
from retain.models.causal import likelihoods
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.tree import grow_trees, reads_trees, tree_likelihoods
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]


def logits(model: nn.Module, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    """Of the text alone."""
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False, **options).logits[:, -ids.shape[1] :]


def shake(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.5)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def build(request: pytest.FixtureRequest, build_llama: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return build_llama if request.param == "llama" else gpt2


def test_the_prompt_is_all_that_is_trained(llama: nn.Module) -> None:
    before, names = logits(llama), set(llama.state_dict())
    model = Prompt(num_tokens=3).apply(llama)
    assert {name: tuple(p.shape) for name, p in trainable(model).items()} == {"prompts.columns.default": (3, 32)}
    assert names < set(model.state_dict())
    assert not torch.equal(logits(model), before)
    model(input_ids=IDS, use_cache=False).logits[:, -1].square().sum().backward()
    assert trainable(model)["prompts.columns.default"].grad is not None
    with Prompt().detached(model) as base:
        assert torch.equal(logits(base), before)


@pytest.mark.parametrize("num", [1, 2])
def test_what_is_saved_answers_the_same_in_peft(build: Callable[[], nn.Module], tmp_path: Path, num: int) -> None:
    method = Prompt(num_tokens=3)
    model = method.apply(build())
    shake(model)
    if num == 2:
        method.extend(model, "2")
        shake(model)
    method.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model))
    again = method.load(build(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert method.modules(again) == method.modules(model)
    assert trainable(again).keys() == {f"prompts.columns.{name}" for name in method.modules(model)}


def test_the_newest_prompt_comes_first(llama: nn.Module) -> None:
    method = Prompt(num_tokens=2)
    model = method.apply(llama)
    shake(model)
    first = logits(model)
    method.extend(model, "2")
    shake(model)
    embeddings = model.get_input_embeddings()
    place = model.prompts.columns
    whole = torch.cat([place["2"], place["default"], embeddings(IDS[0])])[None]
    both = logits(model)
    method.activate(model, [])
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=whole).logits[:, 4:], both)
    assert torch.equal(logits(method.activate(model, ["default"])), first), "the first task's is bit-identical"
    assert list(trainable(model)) == ["prompts.columns.2"]


def test_generates_as_without_a_cache_and_over_padding(build: Callable[[], nn.Module]) -> None:
    model = Prompt(num_tokens=3).apply(build())
    shake(model)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=IDS, **settings), ids)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    padded = model.generate(input_ids=left, attention_mask=(left > 0).long(), **settings)
    assert torch.equal(padded[:, 3:], ids)


def test_likelihoods_of_trees_and_rows_agree(llama: nn.Module) -> None:
    model = Prompt(num_tokens=3).apply(llama)
    shake(model)
    model.eval()
    pairs = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([5, 6, 7], [11, 12, 13])]
    assert reads_trees(model, pairs, pad_id=0)
    tree = tree_likelihoods(model, pairs, grow_trees(pairs), pad_id=0)
    torch.testing.assert_close(tree, likelihoods(model, pairs, pad_id=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["vocabulary", "random"])
def test_first_values(llama: nn.Module, init: Any) -> None:
    torch.manual_seed(1)
    value = trainable(Prompt(num_tokens=4, init=init).apply(llama))["prompts.columns.default"]
    table = llama.get_input_embeddings().weight
    drawn = torch.stack([(table == row).all(1).any() for row in value])
    assert bool(drawn.all()) == (init == "vocabulary")
    assert not torch.equal(value[0], value[1])


def test_what_a_classifier_reads_starts_as_the_token_that_it_read(bert: nn.Module) -> None:
    """The first state is a virtual token's: with one of them and before any step, [CLS] and a text behind it."""
    ids = torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        wanted = bert.eval()(input_ids=torch.cat([ids[:, :1], ids], dim=1)).logits
    model = Prompt(num_tokens=1).apply(bert)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    Prompt(num_tokens=2).extend(model, "2")
    table = bert.get_input_embeddings().weight
    assert torch.equal(model.prompts.columns["2"][0], table[2]), "and so does one that comes before it"


@pytest.fixture
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, bos_token_id=2
    )
    return BertForSequenceClassification(config)


def test_a_copy_has_prompts_of_its_own(llama: nn.Module) -> None:
    model = Prompt().apply(llama)
    copied, before = deepcopy(model), logits(model)
    shake(model)
    assert torch.equal(logits(copied), before)


def test_refusals(llama: nn.Module, tmp_path: Path) -> None:
    assert Prompt().supports(DecoderFamily()) is None
    assert "recurrent" in (Prompt().supports(RecurrentFamily()) or "")
    assert not Prompt.packs
    assert Prompt().activate(llama, []) is llama
    for call in (Prompt().merge, Prompt().weight_changes, Prompt().modules):
        with pytest.raises(CompatibilityError):
            call(llama)
    with pytest.raises(ValueError, match="num_tokens"):
        Prompt(num_tokens=0)
    Prompt().save(Prompt().apply(llama), tmp_path)
    with pytest.raises(LineageError, match="not of this model"):
        Prompt().load(gpt2(), tmp_path)
