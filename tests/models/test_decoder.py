"""Decoder-only transformers: packed documents are isolated, and what is cheap equals what is plain."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from retain.data.packing import shifted
from retain.errors import CompatibilityError
from retain.models.decoder import DecoderFamily
from retain.types import IGNORED, Batch, Encoded, Example, Sampling

FAMILY = DecoderFamily()
VOCABULARY = 60


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, gpt2: nn.Module, build_llama: Callable[..., nn.Module]) -> nn.Module:
    return gpt2 if request.param == "gpt2" else build_llama(tied=False).double()


def row(ids: Sequence[int], *, untrained: int = 1, weight: float = 1.0) -> Encoded:
    weights = [0.0] * untrained + [weight] * (len(ids) - untrained)
    return shifted(Example(id=str(ids)), ids, weights)


def tokens(random: Random, length: int) -> list[int]:
    return [random.randrange(VOCABULARY) for _ in range(length)]


def of_document(model: nn.Module, batch: Batch, document: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A document's logits, and the gradient of its loss alone."""
    logits = FAMILY.forward(model, batch).logits()[batch.target_documents == document]
    targets = batch.targets[batch.counted][batch.target_documents == document]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return logits.detach(), dict(zip(names, gradients, strict=True))


def assert_same(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9), st.integers(2, 9), st.integers(0, 2))
def test_a_document_never_moves_another(
    model: nn.Module, seed: int, length: int, other_length: int, kept_length: int, place: int
) -> None:
    random = Random(seed)
    kept = row(tokens(random, kept_length))
    one, two = ([row(tokens(random, size)) for _ in range(2)] for size in (length, other_length))
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for others in (one, two, [], one[:1]):
        rows = [*others[:place], kept, *others[place:]]
        batch = FAMILY.collate(rows, None, packed=True)
        assert batch.inputs.keys() == {"input_ids", "position_ids"}
        found.append(of_document(model, batch, min(place, len(others))))
    for other in found[1:]:
        assert_same(found[0], other)


def test_without_restarting_positions_documents_do_leak(model: nn.Module) -> None:
    """What the isolation rests on, so that the test above is known to be able to fail."""
    random = Random(0)
    kept = row(tokens(random, 6))

    def leaking(first: Encoded) -> Tensor:
        batch = FAMILY.collate([first, kept], None, packed=True)
        inputs = {**batch.inputs, "position_ids": torch.arange(batch.targets.shape[1])[None]}
        return of_document(model, replace(batch, inputs=inputs), 1)[0]

    difference = leaking(row(tokens(random, 5))) - leaking(row(tokens(random, 5)))
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_padded_equals_packed(model: nn.Module, tokenizer: Any, seed: int) -> None:
    random = Random(seed)
    rows = [row(tokens(random, random.randint(2, 12))) for _ in range(5)]
    packed, padded = (FAMILY.collate(rows, tokenizer, packed=packed) for packed in (True, False))
    for document in range(len(rows)):
        assert_same(of_document(model, packed, document), of_document(model, padded, document))
    losses = [FAMILY.loss(FAMILY.forward(model, batch), batch) for batch in (packed, padded)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_at_targets_only_is_that_of_all_logits(model: nn.Module, tokenizer: Any, packed: bool) -> None:
    random = Random(4)
    rows = [row(tokens(random, 9), untrained=4, weight=0.5), row(tokens(random, 7), untrained=2, weight=2.0)]
    batch = FAMILY.collate(rows, tokenizer, packed=packed)
    loss = FAMILY.loss(FAMILY.forward(model, batch), batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    logits = model(**batch.inputs, use_cache=False).logits
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
    expected = (nats[batch.counted.flatten()] * torch.tensor([0.5] * 5 + [2.0] * 5)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for ours, plain in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_load_gives_float32_in_evaluation_mode(tiny_model: Path) -> None:
    model, tokenizer = FAMILY.load(tiny_model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer.pad_token_id is not None
    assert {p.dtype for p in FAMILY.load(tiny_model, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_load_refuses_pickles(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        FAMILY.load(tmp_path)


def plain(model: nn.Module, context: list[int], rest: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + rest])).logits[0].log_softmax(-1)
    return sum(float(logits[len(context) - 1 + at, token]) for at, token in enumerate(rest))


@pytest.mark.parametrize("seed", range(3))
def test_loglikelihoods_of_mixed_groups_are_the_plain_ones(model: nn.Module, tokenizer: Any, seed: int) -> None:
    random = Random(seed)
    shared = [tokens(random, 8), tokens(random, 3)]
    pairs = [(context, tokens(random, random.randint(1, 6))) for context in shared for _ in range(3)]
    pairs += [(tokens(random, length), tokens(random, 2)) for length in (1, 5)]
    pairs.append(pairs[0])
    random.shuffle(pairs)
    found = FAMILY.loglikelihood(model, tokenizer, pairs)
    assert found == pytest.approx([plain(model, *pair) for pair in pairs], rel=1e-5)
    assert FAMILY.loglikelihood(model, tokenizer, []) == []


def test_greedy_answers_are_argmaxes(build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
    model = build_llama(seed=3)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
    expected: list[str] = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        made = [token for token in ids[len(prompt) :] if token != 2]
        expected.append(tokenizer.decode(made, skip_special_tokens=True))
    assert FAMILY.generate(model, tokenizer, prompts, max_new_tokens=6) == expected


def test_samples_follow_the_seed(llama: nn.Module, tokenizer: Any) -> None:
    def sample(seed: int) -> list[str]:
        return FAMILY.generate(llama, tokenizer, [[5, 6, 7]], max_new_tokens=8, sampling=Sampling(1.0, seed=seed))

    assert sample(1) == sample(1)
    assert len({sample(seed)[0] for seed in range(5)}) > 1


def test_a_decoder_is_not_fitted_by_counting(llama: nn.Module) -> None:
    with pytest.raises(CompatibilityError, match="counting"):
        FAMILY.fit(llama, [], None)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma3_text", "mistral"])
def test_a_model_made_from_nothing_comes_back_from_its_folder(architecture: str, tmp_path: Path) -> None:
    family = DecoderFamily(
        architecture=architecture, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=300,
        max_position_embeddings=64,
    )  # fmt: skip
    rows = [Example(id="1", text="To be or not to be, that is the question."), Example(id="2", text="Is it?")]
    state = torch.get_rng_state()
    model, tokenizer = family.create(rows, seed=3)
    same, other = family.create(rows, seed=3)[0], family.create(rows, seed=4)[0]
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, model.state_dict().values(), same.state_dict().values()))
    assert not all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.num_attention_heads) == (32, 2, 2)
    assert len(tokenizer) == model.config.vocab_size <= 300
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, read = DecoderFamily().load(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert read(rows[0].text).input_ids == tokenizer(rows[0].text).input_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "lama"), ("hidden_size", 10), ("num_hidden_layers", 0), ("vocab_size", 257),
        ("max_position_embeddings", 0),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected .*, got {value!r}"):
        DecoderFamily(**{field: value})
