"""A tokenizer that reads a text, or two, as encoders want it; and one that is learned from the data."""

from collections.abc import Iterable, Sequence

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from retain.data.rendering import PLAIN_TEMPLATE
from retain.errors import ModelError
from retain.models.family import Tokenizer
from retain.models.vocabulary import SMALLEST_VOCABULARY, subword_tokenizer
from retain.types import Message

__all__ = ["SMALLEST", "bracketed", "encoder_tokenizer", "readable", "segments", "token_types", "words_of"]

BEGIN, BETWEEN, HIDDEN = "[CLS]", "[SEP]", "[MASK]"

SMALLEST = SMALLEST_VOCABULARY + 3
"""One token for each byte, and those of `vocabulary` and this module."""


def encoder_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding that reads [CLS] a [SEP], or [CLS] a [SEP] b [SEP].

    Args:
        texts: what to learn from.
        vocab_size: tokens at most, `SMALLEST` or more.
    """
    tokenizer = subword_tokenizer(texts, vocab_size=vocab_size - 3)
    tokenizer.add_special_tokens({"cls_token": BEGIN, "sep_token": BETWEEN, "mask_token": HIDDEN})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BEGIN, BETWEEN)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A {BETWEEN}", pair=f"{BEGIN} $A {BETWEEN} $B:1 {BETWEEN}:1", special_tokens=ids
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # so it is saved
    return readable(tokenizer)


def readable(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with what the renderer asks of one: an end, and no roles, as an encoder reads the texts alone.

    Raises:
        ModelError: it puts nothing around a text.
    """
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ModelError(
            "the tokenizer has no token that begins a text, or none that ends it",
            hint="use an encoder of the kind of BERT; of a model that writes text the family is `decoder`",
        )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def segments(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and token types of a conversation: of one turn its text, of two a pair, of more their lines as one text.

    A special token that a text spells out is read as text.
    """
    texts = [message.content for message in messages]
    if len(texts) > 2:
        texts = ["\n".join(texts)]
    ids: list[int] = tokenizer(*texts, verbose=False, split_special_tokens=True)["input_ids"]
    return ids, token_types(tokenizer, *texts)


def token_types(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """0 for the first text and 1 for the second, as the tokenizer counts them."""
    types: list[int] = tokenizer(*texts, verbose=False, split_special_tokens=True, return_token_type_ids=True)[
        "token_type_ids"
    ]
    return types


def words_of(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids of a text that is cut into words, and the place of each word's first token; -1 where it has none."""
    encoded = tokenizer(list(words), is_split_into_words=True, verbose=False, split_special_tokens=True)
    owners: list[int | None] = encoded.word_ids()
    places = [owners.index(word) if word in owners else -1 for word in range(len(words))]
    return list(encoded["input_ids"]), places


def bracketed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Bare ids with what the tokenizer puts around a text."""
    inner = list(ids)
    inner = inner[1:] if inner[:1] == [tokenizer.cls_token_id] else inner
    inner = inner[:-1] if inner[-1:] == [tokenizer.sep_token_id] else inner
    return [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]
