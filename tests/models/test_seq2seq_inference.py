"""Likelihoods against teacher forcing, and what is written against a search by hand."""

from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from retain.data.rendering import Renderer
from retain.models import seq2seq_inference
from retain.models.denoising import Markers
from retain.models.seq2seq import Seq2SeqFamily
from retain.models.seq2seq_inference import answer_likelihoods, generate_answers, start_id
from retain.types import GREEDY, Example, Message, Sampling

ROWS = [Example("0", text="the quick brown fox jumps over the lazy dog and runs home again")]
Pair = tuple[list[int], list[int]]


@pytest.fixture(params=["t5", "bart"])
def family(request: pytest.FixtureRequest) -> Seq2SeqFamily:
    return Seq2SeqFamily(architecture=request.param, d_model=16, num_layers=2, num_heads=2, vocab_size=400)


@pytest.fixture
def made(family: Seq2SeqFamily) -> tuple[nn.Module, Any]:
    model, tokenizer = family.create(ROWS, seed=2)
    return model.double(), tokenizer


def log_probability(model: nn.Module, source: list[int], given: list[int], rest: list[int]) -> float:
    """One row, teacher forced, by the plain model."""
    written = [start_id(model), *given, *rest]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([written[:-1]])).logits[0]
    log_probs = logits.log_softmax(-1)
    return sum(float(log_probs[len(given) + at, token]) for at, token in enumerate(rest))


def test_loglikelihoods_are_those_of_teacher_forcing(made: tuple[nn.Module, Any]) -> None:
    model, tokenizer = made
    markers, random = Markers.of(tokenizer), Random(0)

    def tokens(length: int) -> list[int]:
        return [random.randrange(120, 300) for _ in range(length)]

    shared = [markers.source(tokens(9)), markers.source(tokens(2)), tokens(5)]
    pairs: list[Pair] = [(context, [*tokens(random.randint(1, 6)), *markers.stop]) for context in shared * 3]
    pairs += [(markers.source(tokens(4)), tokens(2)), pairs[0]]
    expected = [log_probability(model, markers.source(one), [], markers.target(rest)) for one, rest in pairs]
    text, rest = [*markers.begin, *tokens(6)], tokens(7)  # goes on: three tokens hidden at a time
    steps = [(markers.request([*text, *rest[:start]]), rest[start : start + 3]) for start in (0, 3, 6)]
    pairs.append((text, rest))
    expected.append(sum(log_probability(model, source, given, part) for (source, given), part in steps))
    for budget in (4096, 12):
        found = answer_likelihoods(model, tokenizer, pairs, max_tokens=budget)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_every_context_is_encoded_once(family: Seq2SeqFamily, made: tuple[nn.Module, Any]) -> None:
    model, tokenizer = made
    read: list[int] = []
    halves: Any = model
    halves.get_encoder().register_forward_pre_hook(
        lambda _, __, inputs: read.append(len(inputs["input_ids"])), with_kwargs=True
    )
    questions = [((Message("user", name),), ("red", "green", "blue fox")) for name in ("one", "two", "one")]
    values = family.choose(model, Renderer(tokenizer), questions)
    assert sum(read) == 2
    assert values[0] == pytest.approx(values[2])
    assert values[0] != pytest.approx(values[1])


def test_the_likelihood_of_an_answer_is_minus_its_loss(family: Seq2SeqFamily, made: tuple[nn.Module, Any]) -> None:
    model, tokenizer = made
    renderer = Renderer(tokenizer)
    row = Example("x", messages=(Message("user", "name a colour"), Message("assistant", "red fox")))
    batch = family.collate([family.encode(row, renderer)], tokenizer, packed=False)
    [[value]] = family.choose(model, renderer, [(row.prompt, (row.answer,))])
    assert value == pytest.approx(-float(family.loss(family.forward(model, batch), batch).detach()), rel=1e-6)


def greedy(model: nn.Module, source: list[int], given: list[int], stops: set[int], most: int) -> list[int]:
    """The likeliest token again and again, without a cache."""
    written = [start_id(model), *given]
    for _ in range(most):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([written])).logits
        token = int(logits[0, -1].argmax())
        if token in stops:
            break
        written.append(token)
    return written[len(given) + 1 :]


def test_answers_are_the_greedy_ones_whatever_the_model_prefers(made: tuple[nn.Module, Any]) -> None:
    model, tokenizer = made
    settings: Any = model.generation_config
    settings.num_beams, settings.min_length, settings.no_repeat_ngram_size = 4, 9, 2
    renderer, markers = Renderer(tokenizer), Markers.of(tokenizer)
    names = ("one", "what is the colour of the fox", "two dogs")
    prompts = [renderer.prompt_ids([Message("user", name)]) for name in names]
    texts = generate_answers(model, tokenizer, prompts, max_new_tokens=7, sampling=GREEDY)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = greedy(model, markers.source(prompt), [], {tokenizer.eos_token_id}, 7)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert any(texts)


def test_draws_depend_on_the_seed_alone(made: tuple[nn.Module, Any]) -> None:
    model, tokenizer = made
    prompts = [Renderer(tokenizer).prompt_ids([Message("user", "one")])] * 2
    state = torch.get_rng_state()
    drawn = [
        generate_answers(
            model, tokenizer, prompts, max_new_tokens=8, sampling=Sampling(temperature=1.0, top_k=50, seed=seed)
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_a_text_without_an_end_is_continued_by_what_fills_it_in(
    made: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round after round what was written is part of the text, until enough is, or nothing more comes."""
    model, tokenizer = made
    renderer, markers = Renderer(tokenizer), Markers.of(tokenizer)
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" fox", " jumps over", " the dog")]
    asked: list[Any] = []

    def fills_in(_: Any, __: Any, requests: list[Pair], ___: Any, most: int, *____: Any) -> list[list[int]]:
        asked.append((requests, most))
        turn = len(asked) - 1
        return [words[turn][:most] if turn < len(words) - (place == 1) else [] for place in range(len(requests))]

    monkeypatch.setattr(seq2seq_inference, "decoded", fills_in)
    prompts = [renderer.text_ids("the quick"), renderer.text_ids("a lazy")]
    texts = generate_answers(model, tokenizer, prompts, max_new_tokens=40, sampling=GREEDY)
    assert texts == [" fox jumps over the dog", " fox jumps over"]
    assert asked[1][0][0] == markers.request([*prompts[0], *words[0]])
    asked.clear()
    [text] = generate_answers(model, tokenizer, prompts[:1], max_new_tokens=len(words[0]) + 1, sampling=GREEDY)
    assert text == tokenizer.decode([*words[0], words[1][0]])
    assert asked[1][1] == 1


def test_what_fills_in_stops_at_the_next_hidden_part(made: tuple[nn.Module, Any]) -> None:
    model, tokenizer = made
    markers = Markers.of(tokenizer)
    ids = tokenizer("the quick brown", add_special_tokens=False)["input_ids"]
    requests = [markers.request([*markers.begin, *ids]), markers.request([*markers.begin, *ids[:1]])]
    found = seq2seq_inference.decoded(model, tokenizer, requests, markers, 6, GREEDY, 4096)
    stops = {tokenizer.eos_token_id, *markers.sentinels}
    assert found == [greedy(model, source, given, stops, 6) for source, given in requests]
