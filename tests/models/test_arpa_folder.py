import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retain.config import load_config
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError, ModelError
from retain.inference import load_renderer
from retain.models.arpa import read_arpa
from retain.models.backoff import windows
from retain.models.ngram import NGramFamily, export_arpa
from retain.models.source import open_source
from retain.run import train
from retain.types import Example, Message

TINY = (
    "\\data\\\nngram 1=5\nngram 2=3\n\n"
    "\\1-grams:\n-0.60206\t<unk>\n-99\t<s>\t-0.30103\n-0.60206\tx\t-0.1\n-0.60206\ty\n-0.60206\t</s>\n\n"
    "\\2-grams:\n-0.1\t<s> x\n-0.2\tx y\n-0.5\tx <unk>\n\n\\end\\\n"
)
TEXTS = [
    Example(id=str(i), text=text) for i, text in enumerate(["The pear is ripe.", "The plum is not.\nIt is green.", "A"])
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(path: Path, text: str = "") -> tuple[Any, Any, Renderer]:
    if text:
        path.write_text(text)
    source = open_source(str(path))
    model, tokenizer = source.load((), seed=0)
    return source, model, Renderer(tokenizer)


def test_numbers_known_by_hand(tmp_path: Path):
    source, model, renderer = opened(tmp_path / "tiny.arpa", TINY)
    assert type(source.family) is NGramFamily
    ids = [*renderer.text_ids("x  y\nzebra"), renderer.tokenizer.eos_token_id]
    [found] = source.family.loglikelihood(model, renderer.tokenizer, [([], ids)])
    # <s> x, x y, y then an unknown word without a weight, </s> after it likewise
    assert found / math.log(10) == pytest.approx(-0.1 - 0.2 - 0.60206 - 0.60206)
    by_hand, words = read_arpa(tmp_path / "tiny.arpa")
    assert [words[token] for token in ids] == ["x", "y", "<unk>", "</s>"]
    assert by_hand.score(windows([ids], 2, begin=len(words))).sum() == pytest.approx(found, rel=1e-12)
    logits = model(torch.tensor([[2, 1, 0]])).logits[0]
    assert torch.equal(logits, torch.from_numpy(by_hand.distribution(np.array([[2], [1], [0]]))).float())
    assert renderer.text_ids("") == []
    assert source.family.generate(model, renderer.tokenizer, [ids[:1]], max_new_tokens=1) == ["y"]


def test_labels_are_chosen_as_continuations(tmp_path: Path):
    source, model, renderer = opened(tmp_path / "tiny.arpa", TINY)
    prompt, labels = (Message("user", "x"),), ["x", "y"]
    pairs = [(renderer.prompt_ids(prompt), renderer.answer_ids(prompt, label)) for label in labels]
    expected = source.family.loglikelihood(model, renderer.tokenizer, pairs)
    assert source.family.choose(model, renderer, [(prompt, labels)]) == [expected]


def test_nothing_is_counted_on_top(tmp_path: Path):
    source, model, renderer = opened(tmp_path / "tiny.arpa", TINY)
    with pytest.raises(CompatibilityError, match="cannot learn") as caught:
        source.check_learns()
    assert "family: ngram" in caught.value.hint
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CompatibilityError, match="cannot be counted"):
        source.family.fit(model, TEXTS, renderer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_words_where_the_file_has_none(tmp_path: Path):
    text = TINY.replace("1=5", "1=4").replace("2=3", "2=2").replace("-0.60206\t<unk>\n", "")
    source, model, renderer = opened(tmp_path / "closed.arpa", text.replace("-0.5\tx <unk>\n", ""))
    assert any("no <unk>" in note for note in source.notes)
    ids = renderer.text_ids("y zebra")
    assert source.family.loglikelihood(model, renderer.tokenizer, [(ids[:1], ids[1:])]) == [
        pytest.approx(-99 * math.log(10))
    ]


@pytest.mark.parametrize("tokenizer", ["bpe", "characters", "words"])
def test_our_own_export_comes_back(tokenizer: str, tmp_path: Path):
    family = NGramFamily(order=3, vocab_size=300, tokenizer=tokenizer)
    model, own = family.create(TEXTS, seed=0)
    renderer = Renderer(own)
    family.fit(model, TEXTS[:2], renderer)
    (tmp_path / "to").mkdir()
    own.save_pretrained(tmp_path / "to")
    export_arpa(model, own, tmp_path / "to" / "model.arpa")
    source, again, read = opened(tmp_path / "to" / "model.arpa")
    texts = ["The plum is ripe.\tIt is 50% ngã.", "<unk> </s>"]
    pairs = [([], renderer.text_ids(text)) for text in texts]
    assert [read.text_ids(text) for text in texts] == [ids for _, ids in pairs]
    found = source.family.loglikelihood(again, read.tokenizer, pairs)
    assert found == pytest.approx(family.loglikelihood(model, own, pairs), rel=1e-6)
    sums = again(torch.tensor([pairs[0][1]])).logits[0].double().exp().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
    (tmp_path / "alone").mkdir()
    (tmp_path / "to" / "model.arpa").rename(tmp_path / "alone" / "model.arpa")
    with pytest.raises(ModelError, match="pieces of a tokenizer") as caught:
        open_source(str(tmp_path / "alone" / "model.arpa"))
    assert "tokenizer.json" in caught.value.hint


def test_another_models_tokenizer_beside_is_left_alone(tmp_path: Path):
    NGramFamily(vocab_size=300).create(TEXTS, seed=0)[1].save_pretrained(tmp_path)
    _, model, renderer = opened(tmp_path / "tiny.arpa", TINY)
    assert model.config.vocab_size == len(renderer.tokenizer) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TINY[:-9], "line 15: the file ends"),
        (TINY.replace("2=3", "2=4"), "line 17: 3 2-grams"),
        ("hello\n", "line 1"),
        (TINY.replace("</s>", "z"), "text ends"),
    ],
)
def test_a_damaged_file_leaves_nothing_behind(text: str, message: str, tmp_path: Path, cache: Path):
    (tmp_path / "a.arpa").write_text(text)
    with pytest.raises(ModelError, match=message):
        open_source(str(tmp_path / "a.arpa"))
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_a_broken_tokenizer_beside_is_named(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ModelError, match="tokenizer beside"):
        opened(tmp_path / "tiny.arpa", TINY)


def test_a_recipe_is_refused_before_anything_starts(tmp_path: Path):
    (tmp_path / "tiny.arpa").write_text(TINY)
    (tmp_path / "rows.jsonl").write_text('{"text": "x y"}\n' * 8)
    (tmp_path / "r.yaml").write_text(
        "model: tiny.arpa\nmethod: full\nstrategy: sequential\nprotect_base: off\n"
        "tasks:\n  - {name: a, train: rows.jsonl}\noutput_dir: run\n"
    )
    with pytest.raises(CompatibilityError, match="cannot learn"):
        train(load_config(tmp_path / "r.yaml").config)
    assert not (tmp_path / "run").exists()
    family, renderer = load_renderer(str(tmp_path / "r.yaml"))
    assert (family.name, len(renderer.tokenizer)) == ("ngram", 4)
