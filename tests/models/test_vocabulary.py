from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retain.models.vocabulary import (
    END,
    PAD,
    SMALLEST_VOCABULARY,
    TOKENIZERS,
    character_tokenizer,
    check_transformer,
    subword_tokenizer,
    word_tokenizer,
)

TEXTS = ["Hà Nội là thủ đô của Việt Nam.", "Thành phố Hồ Chí Minh ở phía nam.", "The cat sat on the mat."] * 3
HARD = [
    "Hà Nội là thủ đô của Việt Nam.",
    "  two  spaces\n\nand\ttabs ",
    "unseen: 東京 😀 ß",
    "Tiếng Việt",  # decomposed: letters and marks are characters of their own
    "<|im_start|> <0x41> ▁ Ġ",
    "",
]

every = pytest.mark.parametrize("learn", TOKENIZERS.values())
Learn = Callable[..., PreTrainedTokenizerFast]


@every
def test_any_text_comes_out_as_it_went_in(learn: Learn, tmp_path: Path):
    tokenizer = learn(TEXTS, vocab_size=400)
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in HARD:
            assert reader.decode(reader(text)["input_ids"]) == text
        assert [reader(text)["input_ids"] for text in HARD] == [tokenizer(text)["input_ids"] for text in HARD]


@every
def test_special_tokens(learn: Learn):
    tokenizer = learn(TEXTS, vocab_size=400)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer(f"end{END}")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token is None
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


@every
def test_the_size_is_a_limit(learn: Learn):
    assert len(learn(TEXTS, vocab_size=SMALLEST_VOCABULARY)) == SMALLEST_VOCABULARY
    assert len(learn(TEXTS, vocab_size=270)) == 270
    assert len(learn(TEXTS, vocab_size=10_000)) < 1000


@every
def test_the_same_texts_make_the_same_tokenizer(learn: Learn):
    first, second = learn(TEXTS, vocab_size=300), learn(TEXTS, vocab_size=300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_character_is_a_token():
    tokenizer = character_tokenizer(TEXTS, vocab_size=400)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Việt a")["input_ids"]) == ["V", "i", "ệ", "t", " ", "a"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("é")["input_ids"]) == ["<0xC3>", "<0xA9>"]


def test_a_word_is_a_token():
    tokenizer = word_tokenizer(TEXTS, vocab_size=400)
    known = tokenizer("The cat, 12 on")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(known) == ["The", " cat", "<0x2C>", *["<0x20>", "<0x31>", "<0x32>"], " on"]


def test_subwords_are_shorter_than_bytes():
    text = TEXTS[0]
    assert len(subword_tokenizer(TEXTS, vocab_size=400)(text)["input_ids"]) < len(text) / 2
    assert len(subword_tokenizer(TEXTS, vocab_size=258)(text)["input_ids"]) == len(text.encode())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocab_size": 99}, "vocab_size: expected 100 or more, got 99"),
        ({"layers": 0}, "layers: expected 1 or more, got 0"),
        ({"heads": 3}, r"width: expected a multiple of heads \(3\), got 8"),
    ],
)
def test_sizes_that_no_transformer_has_are_refused(change: dict[str, int], says: str):
    sizes = {"width": 8, "heads": 4, "layers": 1, "vocab_size": 100}
    check_transformer(sizes, width="width", heads="heads", least_vocabulary=100)
    with pytest.raises(ValueError, match=f"^{says}$"):
        check_transformer(sizes | change, width="width", heads="heads", least_vocabulary=100)
