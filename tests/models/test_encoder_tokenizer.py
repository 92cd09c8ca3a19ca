"""The encoder's tokenizer: brackets, pairs, words, and special tokens that a text spells out."""

from typing import Any

import pytest

from retain.errors import ModelError
from retain.models.encoder_tokenizer import bracketed, encoder_tokenizer, readable, segments, words_of
from retain.models.vocabulary import subword_tokenizer
from retain.types import Message


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return encoder_tokenizer(["the sky is blue", "a leaf is green"], vocab_size=300)


def test_reads_a_text_and_a_pair(tokenizer: Any) -> None:
    ids, types = segments(tokenizer, [Message("user", "the sky")])
    assert tokenizer.decode(ids) == "[CLS]the sky[SEP]"
    assert set(types) == {0}
    ids, types = segments(tokenizer, [Message("user", "the sky"), Message("user", "a leaf")])
    assert tokenizer.decode(ids) == "[CLS]the sky[SEP]a leaf[SEP]"
    first = ids.index(tokenizer.sep_token_id) + 1
    assert types == [0] * first + [1] * (len(ids) - first)
    ids, _ = segments(tokenizer, [Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    assert tokenizer.decode(ids) == "[CLS]a\nb\nc[SEP]"


def test_a_special_token_in_a_text_is_text(tokenizer: Any) -> None:
    ids, _ = segments(tokenizer, [Message("user", "say [SEP] and [MASK]")])
    assert ids.count(tokenizer.sep_token_id) == 1
    assert tokenizer.mask_token_id not in ids


def test_finds_each_words_first_token(tokenizer: Any) -> None:
    words = ["the", "unheard-of", "sky"]
    ids, places = words_of(tokenizer, words)
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    assert places[0] == 1
    assert places == sorted(places)
    assert len(set(places)) == 3
    assert [tokenizer.decode(ids[at]).strip()[:1] for at in places] == ["t", "u", "s"]


def test_brackets_once(tokenizer: Any) -> None:
    bare = tokenizer("the sky", add_special_tokens=False)["input_ids"]
    whole = tokenizer("the sky")["input_ids"]
    assert bracketed(tokenizer, bare) == bracketed(tokenizer, whole) == whole


def test_refuses_a_tokenizer_without_brackets() -> None:
    with pytest.raises(ModelError, match="no token that begins a text"):
        readable(subword_tokenizer(["a"], vocab_size=300))
