"""Prefix tuning: at the start the base behind real tokens, PEFT's own answers, a base that is left alone."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from retain.errors import CompatibilityError, LineageError
from retain.methods.prefix import Prefix
from retain.models.causal import likelihoods
from retain.models.decoder import DecoderFamily
from retain.models.encoder import EncoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.seq2seq import Seq2SeqFamily
from retain.parameters import trainable
from retain.types import Example

IDS = torch.arange(5, 15)[None]


def logits(model: nn.Module, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False, **options).logits


def gpt2(*, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=layers, n_head=2, n_positions=64)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def build(request: pytest.FixtureRequest, build_llama: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return build_llama if request.param == "llama" else gpt2


def shake(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)


def test_starts_as_the_base_behind_real_tokens(build: Callable[[], nn.Module]) -> None:
    """The oracle: keys and values of tokens in the cache are those tokens, read."""
    base = build()
    size = base.get_input_embeddings().num_embeddings
    torch.manual_seed(3)
    words = torch.randint(size, (1, 4))
    wanted = logits(base, torch.cat([words, IDS], dim=1))[:, 4:]
    torch.manual_seed(3)
    model = Prefix(num_tokens=4).apply(base)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, attention_mask=torch.ones_like(IDS)), wanted, rtol=1e-4, atol=1e-5)


def test_trains_the_prefix_alone_and_detaches(build: Callable[[], nn.Module]) -> None:
    base = build()
    before, names = logits(base), set(base.state_dict())
    model = Prefix(num_tokens=3).apply(base)
    assert list(trainable(model)) == ["prompts.weight"]
    assert names < set(model.state_dict())
    values = {name: p.clone() for name, p in model.named_parameters()}
    model.train()(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert bool((trainable(model)["prompts.weight"].grad != 0).any(dim=1).all())
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, values[name])}
    assert moved == {"prompts.weight"}
    changed = logits(model)
    with Prefix().detached(model) as detached:
        assert torch.equal(logits(detached), before)
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(Prefix().activate(model, [])), before)
    assert torch.equal(logits(Prefix().activate(model, ["default"])), changed)


def test_save_and_load(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    method = Prefix(num_tokens=3)
    model = method.apply(build())
    shake(model)
    method.save(model, tmp_path)
    again = method.load(build(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert trainable(again).keys() == trainable(model).keys()
    theirs = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


def test_generates_as_without_a_cache_and_over_padding(build: Callable[[], nn.Module]) -> None:
    model = Prefix(num_tokens=3).apply(build())
    shake(model)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=IDS, **settings), ids)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    padded = model.generate(input_ids=left, attention_mask=(left > 0).long(), **settings)
    assert torch.equal(padded[:, 3:], ids)


def test_likelihoods_with_and_without_shared_contexts(llama: nn.Module) -> None:
    model = Prefix(num_tokens=3).apply(llama)
    shake(model)
    context = list(range(5, 45))
    pairs = [(context, [8, 9]), (context, [10]), (context, [11, 12, 13])]
    ours = DecoderFamily().loglikelihood(model.eval(), type("Padding", (), {"pad_token_id": 0})(), pairs)
    assert ours == pytest.approx(likelihoods(model, pairs, pad_id=0), rel=1e-4)


def attended(module: Any, names: str, hidden: torch.Tensor, prefix: Any, **more: Any) -> torch.Tensor:
    """softmax(q [K ; k]^T scale + bias) [V ; v], written out, (rows, time, heads * width)."""
    key, value = prefix
    heads, width = key.shape[1], key.shape[3]
    q, k, v = (
        module.get_submodule(name)(hidden).unflatten(-1, (heads, width)).transpose(1, 2) for name in names.split()
    )
    scores = q @ torch.cat([key, k], dim=2).transpose(2, 3) * more["scale"] + more["bias"]
    return (scores.softmax(-1) @ torch.cat([value, v], dim=2)).transpose(1, 2).flatten(2)


def seen_from(model: nn.Module, name: str, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module of the model reads first and gives first in a pass."""
    found: list[Any] = []

    def keep(_: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        found.extend([arguments[0] if arguments else options["hidden_states"], output[0]])

    handle = model.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model.eval()(**inputs)
    handle.remove()
    return found[0], found[1]


NARROW: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 320}
HALVES: dict[str, Any] = {"d_model": 16, "num_layers": 3, "num_heads": 2, "vocab_size": 400}
ROWS = (Example("0", text="the sky is blue and a leaf is green"),)
LAYERS = {  # attention in the second layer; T5's first knows how far apart two tokens are, for all of them
    "bert": "bert.encoder.layer.1.attention.self", "roberta": "roberta.encoder.layer.1.attention.self",
    "electra": "electra.encoder.layer.1.attention.self", "bart": "model.decoder.layers.1.self_attn",
    "distilbert": "distilbert.transformer.layer.1.attention", "t5": "decoder.block.0.layer.0.SelfAttention",
}  # fmt: skip


def made(architecture: str) -> nn.Module:
    if architecture in ("t5", "bart"):
        return Seq2SeqFamily(architecture=architecture, **HALVES).create(ROWS, seed=0)[0]
    return EncoderFamily(architecture=architecture, **NARROW).create(ROWS, seed=0)[0]


@pytest.mark.parametrize("architecture", LAYERS)
def test_attention_is_to_the_prefix_and_the_text(architecture: str) -> None:
    """The oracle: the attention of one layer, written out, over rows of which one is padded."""
    model = Prefix(num_tokens=3).apply(made(architecture))
    shake(model)
    ids, mask = torch.arange(10, 22).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    inputs, bias = {"input_ids": ids, "attention_mask": mask}, torch.zeros(2, 1, 6, 9)
    if architecture in ("t5", "bart"):
        inputs["decoder_input_ids"] = ids
        bias = torch.full((6, 9), -1e9).triu(4).expand(2, 1, -1, -1)  # a prefix is in the past of every token
    else:
        bias[1, :, :, 7:] = -1e9
    name = LAYERS[architecture]
    prefix = model.prompts.layers(2, torch.float32)[0 if architecture == "t5" else 1]
    hidden, output = seen_from(model, name, inputs)
    module: Any = model.get_submodule(name)
    with torch.no_grad():
        if architecture == "t5":
            bias = bias + module.compute_bias(9, 9)[:, :, 3:]
            whole = module.o(attended(module, "q k v", hidden, prefix, scale=1.0, bias=bias))
        elif architecture == "bart":
            whole = attended(module, "q_proj k_proj v_proj", hidden, prefix, scale=8**-0.5, bias=bias)
            whole = module.out_proj(whole)
        elif architecture == "distilbert":
            whole = attended(module, "q_lin k_lin v_lin", hidden, prefix, scale=8**-0.5, bias=bias)
            whole = module.out_lin(whole)
        else:
            whole = attended(module, "query key value", hidden, prefix, scale=8**-0.5, bias=bias)
    torch.testing.assert_close(output, whole, rtol=1e-4, atol=1e-5)
    bare = seen_from(Prefix().activate(model, []), name, inputs)[1]
    assert not torch.allclose(bare, output, atol=1e-3)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_a_decoder_that_reads_a_source_writes_as_without_a_cache(architecture: str) -> None:
    source = torch.arange(10, 22).view(2, 6)
    model: Any = made(architecture)
    before = logits(model, source, decoder_input_ids=source)
    model = Prefix(num_tokens=3).apply(model)
    assert list(trainable(model)) == ["prompts.weight"]
    shake(model)
    start = model.config.decoder_start_token_id
    given = torch.full((2, 1), start)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": 1}
    for _ in range(5):
        with torch.no_grad():
            said = model.eval()(input_ids=source, decoder_input_ids=given, use_cache=False).logits[:, -1:].argmax(-1)
        given = torch.cat([given, said], dim=1)
    assert torch.equal(model.generate(input_ids=source, **settings), given)
    with Prefix().detached(model) as base:
        assert torch.equal(logits(base, source, decoder_input_ids=source), before)
    assert not torch.allclose(logits(model, source, decoder_input_ids=source), before, atol=1e-3)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_peft_writes_the_same_with_a_decoders_prefix(architecture: str, tmp_path: Path) -> None:
    """Each layer has keys and values of its own, which PEFT would tie to one another by its own count."""
    method = Prefix(num_tokens=3)
    model: Any = method.apply(made(architecture))
    shake(model)
    method.save(model, tmp_path)
    theirs: Any = PeftModel.from_pretrained(made(architecture), tmp_path).eval()
    source = torch.arange(10, 22).view(2, 6)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": 1}
    with torch.no_grad():
        ours, other = (m(input_ids=source, decoder_input_ids=source).logits for m in (model.eval(), theirs))
    torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs.generate(input_ids=source, **settings), model.generate(input_ids=source, **settings))
    again = method.load(made(architecture), tmp_path)
    assert torch.equal(again.prompts.weight, model.prompts.weight)
    assert len(set(map(tuple, model.prompts.weight.view(3, 3, -1)[0].tolist()))) == 3


def test_a_copy_has_a_prefix_of_its_own(llama: nn.Module) -> None:
    model = Prefix().apply(llama)
    copied, before = deepcopy(model), logits(model)
    shake(model)
    assert torch.equal(logits(copied), before)


def test_refusals(build_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    assert Prefix().supports(DecoderFamily()) is None
    assert "recurrent" in (Prefix().supports(RecurrentFamily()) or "")
    assert not Prefix.packs
    llama = build_llama()
    assert Prefix().activate(llama, []) is llama
    model = Prefix(num_tokens=2).apply(llama)
    for call in (Prefix().merge, Prefix().weight_changes, lambda m: Prefix().extend(m, "x")):
        with pytest.raises(CompatibilityError):
            call(model)
    assert Prefix().low_rank(model) == ()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(CompatibilityError, match="gradient checkpointing"):
        model.train()(input_ids=IDS)
    with pytest.raises(ValueError, match="num_tokens"):
        Prefix(num_tokens=0)
    Prefix(num_tokens=2).save(model, tmp_path)
    with pytest.raises(LineageError, match="not of this model"):
        Prefix().load(gpt2(layers=3), tmp_path)
    with pytest.raises(CompatibilityError, match="no place for a prefix"):
        Prefix().apply(made("deberta-v2"))
    with pytest.raises(CompatibilityError, match="no prefix"):
        Prefix().save(gpt2(), tmp_path)
