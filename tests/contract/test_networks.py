"""Every shape of transformer under the tuning methods: a step moves what it should, and nothing is lost on the way."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.methods import Method
from retain.methods.adapter import Adapter
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.methods.p_tuning import Ptuning
from retain.methods.prefix import Prefix
from retain.methods.prompt import Prompt
from retain.models.decoder import DecoderFamily
from retain.models.family import Family
from retain.models.seq2seq import Seq2SeqFamily
from retain.parameters import trainable
from retain.strategies import Strategy
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import train_task
from retain.types import Example, Message

DECODERS = ("llama", "qwen3", "gemma3_text", "gpt2", "mistral")
FAMILIES: dict[str, Family] = {
    name: DecoderFamily(
        architecture=name, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=320,
        max_position_embeddings=128,
    )
    for name in DECODERS
} | {
    name: Seq2SeqFamily(architecture=name, d_model=16, num_layers=2, num_heads=2, vocab_size=400)
    for name in ("t5", "bart")
}  # fmt: skip

METHODS: dict[str, Method] = {
    "adapter": Adapter(size=4, placement="houlsby"), "full": Full(), "lora": LoRA(r=2, alpha=4),
    "p_tuning": Ptuning(num_tokens=3, hidden_size=8), "prefix": Prefix(num_tokens=3), "prompt": Prompt(num_tokens=3),
}  # fmt: skip


def dialogue(*contents: str) -> Example:
    roles = ["user", "assistant"] * len(contents)
    turns = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    return Example(id=str(contents), messages=turns)


ROWS = [dialogue("name a colour", "red"), dialogue("name a bigger animal", "an elephant"), dialogue("one", "two")]
TALK = dialogue("one", "two", "three", "four five")


@pytest.fixture(scope="module", params=list(FAMILIES))
def network(request: pytest.FixtureRequest) -> tuple[Family, nn.Module, Any]:
    family = FAMILIES[request.param]
    return family, *family.create(ROWS, seed=0)


def logits(family: Family, model: nn.Module, tokenizer: Any) -> Tensor:
    renderer = Renderer(tokenizer)
    batch = family.collate([family.encode(row, renderer) for row in ROWS], tokenizer, packed=False)
    with torch.no_grad():
        return family.forward(model.eval(), batch).logits()


def by_transformers(family: Family, model: Any, tokenizer: Any) -> Tensor:
    """All logits after one question, by a plain call of the model."""
    ids = torch.tensor([Renderer(tokenizer).prompt_ids(ROWS[1].prompt)])
    halves = {"decoder_input_ids": ids} if family.name == "seq2seq" else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **halves).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("name", list(METHODS))
def test_a_step_is_saved_loaded_and_merged(network: tuple[Family, nn.Module, Any], name: str, tmp_path: Path) -> None:
    family, base, tokenizer = network
    method = METHODS[name]
    assert method.supports(family) is None
    before = logits(family, base, tokenizer)
    torch.manual_seed(0)
    model = method.apply(deepcopy(base))
    moving, frozen = trainable(model), {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.clone() for n, p in moving.items()}
    if name in ("lora", "adapter"):
        torch.testing.assert_close(logits(family, model, tokenizer), before)
    view = BoundTask(
        name="task", examples=ROWS, family=family, renderer=Renderer(tokenizer), method=method, max_length=64,
        max_tokens=100, packed=family.isolates_documents and method.packs, precision="fp32",
    )  # fmt: skip
    loss = view.mean_loss(model, ROWS)
    config = TrainConfig(learning_rate=0.02, max_steps=3, lr_scheduler_type="constant", precision="fp32")
    train_task(model, view, strategy=Strategy(), config=config)
    assert view.mean_loss(model, ROWS) < loss
    still = [n for n, p in moving.items() if torch.equal(p, start[n])]
    assert not still
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    after = logits(family, model, tokenizer)
    assert float((after - before).abs().max()) > 1e-3

    method.save(model, tmp_path)
    loaded = method.load(deepcopy(base), tmp_path)
    assert torch.equal(logits(family, loaded, tokenizer), after)
    assert trainable(loaded).keys() == moving.keys()
    if name in ("lora", "prefix", "prompt", "p_tuning"):
        plain = PeftModel.from_pretrained(deepcopy(base), tmp_path)
        torch.testing.assert_close(
            by_transformers(family, plain, tokenizer), by_transformers(family, model, tokenizer), rtol=1e-4, atol=1e-5
        )
    if method.can_detach:
        with method.detached(model) as bare:
            torch.testing.assert_close(logits(family, bare, tokenizer), before)
    if name in ("full", "lora"):
        merged = method.merge(deepcopy(model))
        torch.testing.assert_close(logits(family, merged, tokenizer), after, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(CompatibilityError, match="merged"):
            method.merge(model)


@pytest.mark.parametrize("name", ["adapter", "lora", "prefix", "prompt"])
def test_what_is_generated_and_likely_is_what_a_plain_pass_says(
    network: tuple[Family, nn.Module, Any], name: str
) -> None:
    """With a cache, over padding, and with every context encoded once."""
    family, base, tokenizer = network
    torch.manual_seed(3)
    model = METHODS[name].apply(deepcopy(base))
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.5)
    model.eval()
    renderer = Renderer(tokenizer)
    prompts = [renderer.prompt_ids(row.prompt) for row in ROWS]
    together = family.generate(model, tokenizer, prompts, max_new_tokens=6)
    assert together == [family.generate(model, tokenizer, [ids], max_new_tokens=6)[0] for ids in prompts]
    values = family.choose(model, renderer, [(row.prompt, (row.answer, "other")) for row in ROWS])
    for row, (value, _) in zip(ROWS, values, strict=True):
        batch = family.collate([family.encode(row, renderer)], tokenizer, packed=False)
        with torch.no_grad():
            assert value == pytest.approx(-float(family.loss(family.forward(model, batch), batch)), rel=1e-4)


def test_every_turn_of_a_chat_is_trained(network: tuple[Family, nn.Module, Any]) -> None:
    """The loss of a row is the negative log-likelihood of each answer after all that came before it."""
    family, model, tokenizer = network
    renderer = Renderer(tokenizer)
    batch = family.collate([family.encode(TALK, renderer)], tokenizer, packed=False)
    with torch.no_grad():
        loss = float(family.loss(family.forward(model.eval(), batch), batch))
    turns = [2, 4] if family.name == "decoder" else [4]  # the last one where the encoder reads what came before
    asked = [(TALK.messages[: end - 1], (TALK.messages[end - 1].content,)) for end in turns]
    assert loss == pytest.approx(-sum(value for [value] in family.choose(model, renderer, asked)), rel=1e-4)
