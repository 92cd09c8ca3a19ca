import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from retain.data.rendering import Renderer
from retain.errors import CompatibilityError, ModelError
from retain.models.ngram import NGramFamily
from retain.models.ngram_network import NGramForCausalLM
from retain.models.source import open_source
from retain.types import Example, Message, Sampling

FRUIT = ["apple", "pear", "plum", "cherry"]
TOOLS = ["hammer", "saw", "drill", "wrench"]


def ask(i: int, prompt: str, answer: str, **options: Any) -> Example:
    return Example(id=str(i), messages=(Message("user", prompt), Message("assistant", answer)), **options)


ROWS = [
    *(ask(i, f"Do you have a ripe {word} for me?", "fruit") for i, word in enumerate(FRUIT)),
    *(ask(4 + i, f"Where is my {word}, the heavy one?", "tool") for i, word in enumerate(TOOLS)),
]
TEXTS = [Example(id=f"t{i}", text=f"The {word} lies on the table.") for i, word in enumerate([*FRUIT, *TOOLS])]


def fitted(rows: list[Example], **options: Any) -> tuple[NGramFamily, Any, Any, Renderer]:
    family = NGramFamily(**{"order": 3, "vocab_size": 400} | options)
    model, tokenizer = family.create([*ROWS, *TEXTS], seed=0)
    renderer = Renderer(tokenizer)
    family.fit(model, rows, renderer)
    return family, model, tokenizer, renderer


def same(one: NGramForCausalLM, other: NGramForCausalLM) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("tokenizer", ["bpe", "characters", "words"])
def test_learning_in_parts_is_learning_at_once(tokenizer: str):
    family, whole, _, renderer = fitted([*ROWS, *TEXTS], tokenizer=tokenizer)
    _, parts, _, _ = fitted(ROWS, tokenizer=tokenizer)
    assert not same(whole, parts)
    family.fit(parts, TEXTS[:3], renderer)
    family.fit(parts, TEXTS[3:], renderer)
    assert same(whole, parts)
    assert whole.words.counts.sum() > 0


def test_a_saved_model_comes_back_and_learns_on(tmp_path: Path):
    family, model, tokenizer, renderer = fitted(ROWS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    assert type(source.family) is NGramFamily
    again, _ = source.load((), seed=0)
    assert same(model, again)
    for one in (model, again):
        family.fit(one, TEXTS, renderer)
    assert same(model, again)


def test_what_is_counted():
    """The answer's tokens after the prompt, of raw text all; a weight of 0 is none."""
    row = ask(0, "a b c", "yes")
    _, model, tokenizer, renderer = fitted([row])
    _, weights = renderer.encode(row)
    assert int(model.words.counts.sum()) == sum(weight > 0 for weight in weights)
    answer = renderer.answer_ids(row.prompt, "yes")
    assert model.words.grams[:, -1].sort().values.tolist() == sorted(answer)
    assert tokenizer.eos_token_id in answer
    _, model, _, renderer = fitted([TEXTS[0]])
    assert int(model.words.counts.sum()) == len(renderer.text_ids(TEXTS[0].text)) + 1
    assert [model.config.vocab_size] * 2 in model.words.grams[:, :2].tolist()  # the first token begins a text
    _, model, _, _ = fitted([ask(0, "a", "b", weight=0.0), Example(id="1", text="a b", weight=0.0)])
    assert len(model.words.counts) == len(model.labels.counts) == 0


def test_likelihoods_are_those_of_the_logits():
    family, model, tokenizer, renderer = fitted([*ROWS, *TEXTS])
    ids = renderer.text_ids("The pear lies under the table.")
    pairs = [(ids[:1], ids[1:]), (ids[:5], ids[5:7]), ([], ids[:2])]
    found = family.loglikelihood(model, tokenizer, pairs)
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    for (context, rest), value in list(zip(pairs, found, strict=True))[:2]:
        expected = sum(float(logits[len(context) - 1 + i, token]) for i, token in enumerate(rest))
        assert value == pytest.approx(expected, rel=1e-5)
    assert family.loglikelihood(model, tokenizer, pairs[:1]) == found[:1]
    assert family.loglikelihood(model, tokenizer, []) == []


def test_the_loss_is_the_weighted_sum_over_targets():
    family, model, tokenizer, renderer = fitted([*ROWS, *TEXTS])
    examples = [ROWS[0], ask(9, "And a fig?", "fruit", weight=0.5), TEXTS[2]]
    batch = family.collate([family.encode(row, renderer) for row in examples], tokenizer, packed=False)
    loss = family.loss(family.forward(model, batch), batch)
    nats = []
    for row in examples[:2]:
        pair = renderer.prompt_ids(row.prompt), renderer.answer_ids(row.prompt, row.answer)
        nats.append(-row.weight * family.loglikelihood(model, tokenizer, [pair])[0])
    ids = [*renderer.text_ids(TEXTS[2].text), tokenizer.eos_token_id]
    nats.append(-family.loglikelihood(model, tokenizer, [(ids[:1], ids[1:])])[0])
    assert float(loss) == pytest.approx(math.fsum(nats), rel=1e-9)
    with pytest.raises(CompatibilityError, match="packed"):
        family.collate([family.encode(ROWS[0], renderer)], tokenizer, packed=True)


def test_bayes_reads_the_whole_prompt_and_continuation_its_end():
    asked = [(Message("user", "Do you have a hammer for me?"),), (Message("user", "Where is my plum?"),)]
    rows = [(prompt, ["fruit", "tool", "animal"]) for prompt in asked]
    family, model, _, renderer = fitted([*ROWS, *ROWS[:1] * 3])
    values = family.choose(model, renderer, rows)
    assert [sum(map(math.exp, row)) for row in values] == pytest.approx([1, 1])
    for prompt, best in (("Any pear or plum?", 0), ("Any drill or saw?", 1)):
        values = family.choose(model, renderer, [((Message("user", prompt),), ["fruit", "tool", "animal"])])[0]
        assert values.index(max(values)) == best
    plain = family.choose(model, renderer, [((Message("user", ""),), ["tool", "fruit", "animal"])])[0]
    counts = [4 + 1, 7 + 1, 0 + 1]  # without words the rows decide
    assert plain == pytest.approx([math.log(count / sum(counts)) for count in counts])
    ended, model, _, renderer = fitted(ROWS, classify="continuation")
    assert len(model.labels.counts) == 0
    first, second = ended.choose(model, renderer, rows)
    assert first == pytest.approx(second)  # the template's last words are the same


def test_labels_that_nobody_has_seen_are_read_as_text():
    family, model, tokenizer, renderer = fitted([*ROWS, ask(99, "Say it", "yes")])
    prompt = (Message("user", "Is it?"),)
    pairs = [(renderer.prompt_ids(prompt), renderer.answer_ids(prompt, label)) for label in ("no", "yes", "maybe")]
    expected = family.loglikelihood(model, tokenizer, pairs)
    assert family.choose(model, renderer, [(prompt, ["no", "yes", "maybe"])]) == [pytest.approx(expected)]


def test_it_writes():
    family, model, tokenizer, renderer = fitted(TEXTS)
    prompt = renderer.text_ids("The pear lies on")
    [greedy] = family.generate(model, tokenizer, [prompt], max_new_tokens=12)
    assert greedy == " the table."
    drawn = Sampling(temperature=2.0, seed=5)
    one, two = (family.generate(model, tokenizer, [prompt] * 2, max_new_tokens=12, sampling=drawn) for _ in range(2))
    assert one == two
    assert one != [greedy] * 2
    assert family.generate(model, tokenizer, [prompt], max_new_tokens=12, sampling=Sampling(2.0, top_k=1)) == [greedy]


def test_another_models_tokenizer(tiny_model: Path):
    family = NGramFamily(tokenizer=str(tiny_model))
    model, tokenizer = family.create(ROWS, seed=0)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.chat_template is not None
    family.fit(model, ROWS, Renderer(tokenizer))
    assert model.words.counts.sum() > 0


@pytest.mark.parametrize(
    ("field", "value"), [("order", 0), ("vocab_size", 10), ("tokenizer", ""), ("classify", "guess")]
)
def test_a_wrong_field_is_named(field: str, value: Any):
    with pytest.raises(ValueError, match=f"^{field}: expected .*, got {value!r}"):
        NGramFamily(**{field: value})


def test_another_familys_folder_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="not an n-gram model"):
        NGramFamily().load(tmp_path)
