"""KL to the base model against closed forms on written-down tables and against full vocabularies of a tiny model."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from retain.data.packing import pad, shifted
from retain.data.rendering import Renderer
from retain.errors import ModelError
from retain.evaluation import divergence
from retain.evaluation.divergence import base_distribution, kl_to_base
from retain.models.decoder import DecoderFamily
from retain.models.family import Outputs
from retain.types import Batch, Encoded, Example

TEXTS = (
    Example("long", text="The quick brown fox jumps over the lazy dog. What is the capital of Vietnam? Hà Nội."),
    Example("short", text="yes no"),
    Example("middle", text="red green blue yes no red green"),
)


@dataclass
class TableFamily:
    """A model whose next-token logits are one table, row by last token; texts are written as digits."""

    name = "table"

    def encode(self, example: Example, renderer: object) -> Encoded:
        ids = [int(c) for c in example.text]
        return shifted(example, ids, [0.0] + [1.0] * (len(ids) - 1))

    def vary(self, row: Encoded, renderer: object, *, draw: str) -> Encoded:
        return row

    def collate(self, rows: Sequence[Encoded], tokenizer: object, *, packed: bool) -> Batch:
        assert not packed
        return pad(rows, pad_id=0)

    def forward(self, model: nn.Embedding, batch: Batch) -> Outputs:
        return Outputs(hidden=model(batch.inputs["input_ids"])[batch.counted], head=lambda hidden: hidden)


@dataclass
class NoRenderer:
    tokenizer: None = None


def table(rows: list[list[float]]) -> nn.Embedding:
    """The model with these next-token probabilities."""
    return nn.Embedding.from_pretrained(torch.tensor(rows).log())


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


P = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [1 / 3, 1 / 3, 1 / 3]]
Q = [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6]]
DIGITS = (Example("a", text="0010"), Example("b", text="12"))  # contexts 0, 0, 1 and 1


@pytest.mark.parametrize("top", [3, 10])
def test_two_tables_in_closed_form(top: int):
    family, renderer = TableFamily(), NoRenderer()
    base = base_distribution(table(P), family, renderer, DIGITS, top=top)
    mean, nats = kl_to_base(table(Q), family, renderer, DIGITS, base)
    assert nats["a"] == pytest.approx((2 * kl(P[0], Q[0]) + kl(P[1], Q[1])) / 3, abs=1e-6)
    assert nats["b"] == pytest.approx(kl(P[1], Q[1]), abs=1e-6)
    assert mean == pytest.approx((3 * nats["a"] + nats["b"]) / 4)  # over positions, not texts


def test_the_rest_is_one_outcome_and_bounds_the_kl_from_below():
    family, renderer = TableFamily(), NoRenderer()
    base = base_distribution(table(P), family, renderer, DIGITS, top=1)
    _, nats = kl_to_base(table(Q), family, renderer, DIGITS, base)
    first, second = kl((0.7, 0.3), (0.5, 0.5)), kl((0.6, 0.4), (0.6, 0.4))
    assert nats["a"] == pytest.approx((2 * first + second) / 3, abs=1e-6)
    assert nats["b"] == pytest.approx(0, abs=1e-6)
    assert nats["a"] < (2 * kl(P[0], Q[0]) + kl(P[1], Q[1])) / 3


def test_direction_is_from_the_base():
    family, renderer = TableFamily(), NoRenderer()
    forward = kl_to_base(table(Q), family, renderer, DIGITS, base_distribution(table(P), family, renderer, DIGITS))[0]
    backward = kl_to_base(table(P), family, renderer, DIGITS, base_distribution(table(Q), family, renderer, DIGITS))[0]
    assert forward == pytest.approx((2 * kl(P[0], Q[0]) + 2 * kl(P[1], Q[1])) / 4, abs=1e-6)
    assert backward == pytest.approx((2 * kl(Q[0], P[0]) + 2 * kl(Q[1], P[1])) / 4, abs=1e-6)


def test_what_the_base_thinks_impossible_adds_nothing():
    p, q = [[1.0, 0.0, 0.0]] * 3, [[0.5, 0.25, 0.25]] * 3
    family, renderer = TableFamily(), NoRenderer()
    base = base_distribution(table(p), family, renderer, DIGITS, top=2)
    assert kl_to_base(table(q), family, renderer, DIGITS, base)[0] == pytest.approx(math.log(2), abs=1e-6)


# A real model


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


def perturbed(model: nn.Module, scale: float) -> nn.Module:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return changed


@torch.no_grad()
def full_kl(base: nn.Module, model: nn.Module, ids: list[int]) -> Tensor:
    p, q = (m(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1) for m in (base, model))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("max_tokens", [10, 100, 4096])
def test_the_whole_vocabulary_gives_the_full_kl(llama, renderer: Renderer, max_tokens: int):
    model = perturbed(llama, 0.05)
    family = DecoderFamily()
    base = base_distribution(llama, family, renderer, TEXTS, top=10_000, max_tokens=max_tokens)
    mean, nats = kl_to_base(model, family, renderer, TEXTS, base, max_tokens=max_tokens)
    expected = {text.id: full_kl(llama, model, renderer.encode(text)[0]) for text in TEXTS}
    assert nats == pytest.approx({i: float(value.mean()) for i, value in expected.items()}, rel=1e-4)
    assert mean == pytest.approx(float(torch.cat(list(expected.values())).mean()), rel=1e-4)


def test_more_kept_tokens_come_closer_to_the_full_kl(llama, renderer: Renderer):
    model, family = perturbed(llama, 0.05), DecoderFamily()
    bases = [base_distribution(llama, family, renderer, TEXTS, top=top) for top in (1, 8, 64, 10_000)]
    values = [kl_to_base(model, family, renderer, TEXTS, base)[0] for base in bases]
    assert values == sorted(values)
    assert 0 < values[0] < values[-1]


def test_an_untouched_model_has_a_kl_of_exactly_zero(llama, renderer: Renderer):
    base = base_distribution(llama, DecoderFamily(), renderer, TEXTS, top=8)
    mean, nats = kl_to_base(copy.deepcopy(llama), DecoderFamily(), renderer, TEXTS, base)
    assert mean == 0
    assert set(nats.values()) == {0}


def test_chunks_and_passes_change_nothing(llama, renderer: Renderer, monkeypatch: pytest.MonkeyPatch):
    model = perturbed(llama, 0.05)
    base = base_distribution(llama, DecoderFamily(), renderer, TEXTS)
    whole = kl_to_base(model, DecoderFamily(), renderer, TEXTS, base)
    monkeypatch.setattr(divergence, "_CHUNK", 7)
    parts = kl_to_base(model, DecoderFamily(), renderer, TEXTS[::-1], base, max_tokens=1)
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)
    assert parts[1] == pytest.approx(whole[1], rel=1e-4)


def test_no_more_than_a_chunk_of_logits_exists(llama, renderer: Renderer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(divergence, "_CHUNK", 5)
    seen: list[int] = []
    family = DecoderFamily()

    @dataclass(frozen=True)
    class Watched:
        def encode(self, *args: object):
            return family.encode(*args)

        def vary(self, *args: object, **options: object):
            return family.vary(*args, **options)

        def collate(self, *args: object, **options: object):
            return family.collate(*args, **options)

        def forward(self, model: nn.Module, batch: Batch) -> Outputs:
            outputs = family.forward(model, batch)

            def head(hidden: Tensor) -> Tensor:
                seen.append(len(hidden))
                return outputs.head(hidden)

            return Outputs(outputs.hidden, head)

    base = base_distribution(llama, Watched(), renderer, TEXTS)
    kl_to_base(llama, Watched(), renderer, TEXTS, base)
    assert max(seen) == 5
    assert sum(seen) == 2 * sum(base.counts)


def test_a_grown_vocabulary_is_part_of_the_rest(build_llama, llama, renderer: Renderer):
    base = base_distribution(llama, DecoderFamily(), renderer, TEXTS, top=8)
    grown = copy.deepcopy(llama)
    grown.resize_token_embeddings(llama.config.vocab_size + 3, mean_resizing=False)
    assert 0 < kl_to_base(grown, DecoderFamily(), renderer, TEXTS, base)[0] < 0.1


def test_the_beginning_of_a_text_is_enough(llama, renderer: Renderer):
    model, family = perturbed(llama, 0.05), DecoderFamily()
    base = base_distribution(llama, family, renderer, TEXTS, top=10_000, max_length=5)
    assert base.counts == tuple(min(5, len(renderer.encode(text)[0]) - 1) for text in TEXTS)
    _, nats = kl_to_base(model, family, renderer, TEXTS, base)
    for text in TEXTS:
        expected = full_kl(llama, model, renderer.encode(text)[0])[:5].mean()
        assert nats[text.id] == pytest.approx(float(expected), rel=1e-4)


def test_it_survives_the_disk(llama, renderer: Renderer, tmp_path: Path):
    base = base_distribution(llama, DecoderFamily(), renderer, TEXTS, top=8)
    base.save(tmp_path / "base.safetensors")
    loaded = type(base).load(tmp_path / "base.safetensors")
    assert (loaded.texts, loaded.counts, loaded.max_length) == (base.texts, base.counts, base.max_length)
    assert kl_to_base(llama, DecoderFamily(), renderer, TEXTS, loaded)[0] == 0
    assert base.top_ids.dtype == torch.int32
    assert (tmp_path / "base.safetensors").stat().st_size < sum(base.counts) * (8 * 8 + 8) + 2000


@pytest.mark.parametrize("texts", [(Example("long", text="other words"),), (Example("unknown", text="yes no"),)])
def test_other_texts_than_the_bases_are_refused(texts, llama, renderer: Renderer):
    base = base_distribution(llama, DecoderFamily(), renderer, TEXTS)
    with pytest.raises(ModelError, match="other tokens"):
        kl_to_base(llama, DecoderFamily(), renderer, texts, base)
