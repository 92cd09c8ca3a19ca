"""The built-in items, and how any items are asked: against one pass a choice."""

from collections import Counter

import pytest
import torch

from retain.data.rendering import Renderer
from retain.evaluation.probes import balanced, load_probes, load_texts, score_probes, some_texts
from retain.evaluation.statistics import interval
from retain.models.decoder import DecoderFamily
from retain.models.hub import resolve
from retain.types import Probe


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


def probe(i: str, context: str, choices: tuple[str, ...], answer: int = 0, ability: str = "a") -> Probe:
    return Probe(i, ability, "en", context, choices, answer)


@torch.no_grad()
def log_odds(model, context: list[int], rests: list[list[int]], right: int) -> tuple[int, float]:
    values = []
    for rest in rests:
        logits = model(torch.tensor([context + rest])).logits[0].double().log_softmax(-1)
        values.append(sum(float(logits[len(context) - 1 + k, token]) for k, token in enumerate(rest)))
    p = torch.tensor(values).softmax(0)
    return int(p.argmax()), float(torch.log(p[right]) - torch.log(1 - p[right]))


def test_the_choice_and_margin_are_those_of_one_pass_each(llama, tokenizer, renderer: Renderer):
    probes = [
        probe("1", "The capital of Vietnam is", (" Hà Nội.", " red.", " the lazy dog."), 1, "knowledge"),
        probe("2", "1 + 1 =", (" 2", " 3"), 1, "arithmetic"),
        probe("3", "The capital of Vietnam is", (" yes", " no"), 0, "knowledge"),
    ]
    answers = score_probes(llama, DecoderFamily(), renderer, probes)
    assert [answer.suite for answer in answers] == ["probe:knowledge", "probe:arithmetic", "probe:knowledge"]
    for item, answer in zip(probes, answers, strict=True):
        ids = tokenizer(item.context, add_special_tokens=False).input_ids
        rests = [tokenizer(item.context + c, add_special_tokens=False).input_ids[len(ids) :] for c in item.choices]
        best, margin = log_odds(llama, ids, rests, item.answer)
        assert (answer.id, answer.prompt) == (item.id, item.context)
        assert answer.answer == item.choices[best]
        assert answer.expected == item.choices[item.answer]
        assert answer.score == float(best == item.answer)
        assert answer.margin == pytest.approx(margin, abs=1e-4)


def test_a_token_over_the_border_leaves_the_context_as_it_is(tokenizer, renderer: Renderer):
    context, choice = "The quick bro", "wn fox"
    ids = tokenizer(context, add_special_tokens=False).input_ids
    assert tokenizer(context + choice, add_special_tokens=False).input_ids[: len(ids)] != ids

    class Asked:
        def loglikelihood(self, model, tok, pairs):
            self.pairs = pairs
            return [0.0, -1.0]

    asked = Asked()
    score_probes(torch.nn.Identity(), asked, renderer, [probe("1", context, (choice, " yes"))])
    assert [pair[0] for pair in asked.pairs] == [ids, ids]
    assert [tokenizer.decode(rest) for _, rest in asked.pairs] == [choice, " yes"]


def test_no_begin_token_stands_inside_a_choice(tokenizer):
    """With a tokenizer that begins every text with BOS."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    begins = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    begins.chat_template = tokenizer.chat_template
    bos = begins.bos_token_id
    assert begins("yes").input_ids[0] == bos

    class Asked:
        def loglikelihood(self, model, tok, pairs):
            self.pairs = pairs
            return [0.0, -1.0]

    asked = Asked()
    score_probes(torch.nn.Identity(), asked, Renderer(begins), [probe("1", "The quick bro", ("wn fox", " yes"))])
    for context, rest in asked.pairs:
        assert context[0] == bos
        assert bos not in context[1:] + rest


def test_balanced_subsets():
    items = [probe(f"{a}{k}", "", ("x", "y"), ability=a) for a, n in (("a", 30), ("b", 30), ("c", 3)) for k in range(n)]
    chosen = balanced(items, 15, seed=0)
    assert Counter(p.ability for p in chosen) == {"a": 6, "b": 6, "c": 3}
    assert list(chosen) == [p for p in items if p in chosen]
    assert chosen == balanced(items, 15, seed=0) != balanced(items, 15, seed=1)
    assert set(balanced(items, 8, seed=0)) <= set(chosen)
    assert balanced(items, 1000, seed=0) == tuple(items)


def test_the_built_in_probes_are_well_formed():
    probes = load_probes()
    assert len(probes) >= 300
    assert len({p.id for p in probes}) == len(probes)
    assert len({p.ability for p in probes}) >= 8
    assert len({(p.context, p.choices) for p in probes}) == len(probes)
    for p in probes:
        assert 2 <= len(p.choices) == len(set(p.choices)), p.id
        assert 0 <= p.answer < len(p.choices), p.id
        assert p.context, p.id
        assert all(choice.strip() for choice in p.choices), p.id


def test_right_answers_stand_everywhere():
    """Always taking one place is no way to a good score."""
    probes = load_probes()
    for k in range(min(len(p.choices) for p in probes)):
        assert sum(p.answer == k for p in probes) < 0.6 * len(probes)


def test_the_built_in_texts_are_well_formed():
    texts = load_texts()
    assert len(texts) >= 30
    assert len({text.id for text in texts}) == len({text.text for text in texts}) == len(texts)
    assert all(len(text.text) > 100 and not text.messages for text in texts)


def test_some_texts_are_a_seeded_sample_in_order():
    everything = load_texts()
    assert some_texts(None, seed=0) == some_texts(1000, seed=0) == everything
    few = some_texts(5, seed=0)
    assert len(few) == 5
    assert [text for text in everything if text in few] == list(few)
    assert few == some_texts(5, seed=0) != some_texts(5, seed=1)


@pytest.mark.slow
def test_a_real_model_knows_most_of_a_sample():
    family = DecoderFamily()
    model, tokenizer = family.load(resolve("smollm2-135m").folder)
    english = [p for p in load_probes() if p.language == "en"]
    answers = score_probes(model, family, Renderer(tokenizer), balanced(english, 60, seed=0))
    found = interval([answer.score for answer in answers])
    assert found.low > 0.4  # guessing reaches a quarter
    assert found.high < 0.95
    assert sum(answer.margin for answer in answers) > 0
