"""A tokenizer learned from the data, for a model that starts from nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retain.types import Example

__all__ = [
    "END",
    "PAD",
    "SMALLEST_VOCABULARY",
    "TOKENIZERS",
    "character_tokenizer",
    "check_sizes",
    "check_transformer",
    "read_aloud",
    "subword_tokenizer",
    "word_tokenizer",
]

END = "<|endoftext|>"
"""Ends a text; trained as the stop token."""

PAD = "<|pad|>"

SMALLEST_VOCABULARY = 2 + 256
"""Every tokenizer keeps a token for every byte, so that any text goes in and comes out unchanged."""

WORDS = r" ?\p{L}[\p{L}\p{M}'’]*| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"
"""A word, a number or signs, each with the space before it; else one white space."""


def read_aloud(example: Example) -> str:
    """A row as the default chat template writes it: what a tokenizer is learned from."""
    return example.text or "\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in example.messages)


def subword_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019).

    Args:
        texts: what to learn from.
        vocab_size: tokens at most, `SMALLEST_VOCABULARY` or more; fewer where the texts are short.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def character_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a character; characters outside the vocabulary are spelled in UTF-8 bytes.

    Args:
        texts: whose commonest characters are kept.
        vocab_size: tokens at most, `SMALLEST_VOCABULARY` or more.
    """
    vocab = _spelled(Counter(character for text in texts for character in text), vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(tokenizer)


def word_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a word, with the space before it; words outside the vocabulary are spelled in UTF-8 bytes.

    Args:
        texts: whose commonest words are kept.
        vocab_size: tokens at most, `SMALLEST_VOCABULARY` or more.
    """
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    tokenizer = Tokenizer(
        models.BPE(vocab=_spelled(counts, vocab_size), merges=[], byte_fallback=True, ignore_merges=True)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(tokenizer)


TOKENIZERS = {"bpe": subword_tokenizer, "characters": character_tokenizer, "words": word_tokenizer}
"""How text may be cut, by its name in a recipe."""


def check_sizes(**sizes: tuple[int, int]) -> None:
    """Refuse a size of a model that starts from nothing that is below its least: `name=(value, least)`.

    Raises:
        ValueError: naming the first.
    """
    for name, (value, least) in sizes.items():
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")


def check_transformer(sizes: Mapping[str, int], *, width: str, heads: str, least_vocabulary: int) -> None:
    """Refuse sizes that no transformer which starts from nothing can have.

    Args:
        sizes: by the configuration's names, `vocab_size` among them.
        width: the name of the width, which the heads share.
        heads: the name of the number of attention heads.
        least_vocabulary: tokens that every vocabulary has.

    Raises:
        ValueError: naming the first that is too small, or a width that is no multiple of the heads.
    """
    check_sizes(**{name: (size, least_vocabulary if name == "vocab_size" else 1) for name, size in sizes.items()})
    if sizes[width] % sizes[heads]:
        raise ValueError(f"{width}: expected a multiple of {heads} ({sizes[heads]}), got {sizes[width]}")


def _spelled(counts: Counter[str], vocab_size: int) -> dict[str, int]:
    """The numbers of the control tokens, of every byte, and of the commonest pieces as far as there is room."""
    common = sorted(counts, key=lambda piece: (-counts[piece], piece))
    tokens = [END, PAD, *(f"<0x{byte:02X}>" for byte in range(256)), *common]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens[:vocab_size]))}


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
