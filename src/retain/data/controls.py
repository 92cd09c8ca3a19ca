"""Control tokens that a user's text spells out stay text: only a chat template writes control tokens.

A content is escaped before it goes through the template: each control token in it becomes a private pair of
characters. In the rendered text, what is still spelled as a control token was therefore written by the template.
"""

import re
from collections.abc import Iterable
from typing import Any, final

__all__ = ["Controls", "added_tokens", "special_tokens"]

Tokenizer = Any  # a `transformers` tokenizer; they share no base that a type checker can see through

_MARK, _FIRST = "\U0010fffd", 0x100000
"""An escaped token is `_MARK` and a character of private plane 16, counted from `_FIRST`; so is `_MARK` itself."""

_PAIR = re.compile(f"{_MARK}.", flags=re.DOTALL)


def special_tokens(tokenizer: Tokenizer) -> set[str]:
    """The tokens that the tokenizer declares as special."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(
        tokenizer.all_special_tokens
    )


def added_tokens(tokenizer: Tokenizer) -> set[str]:
    """All tokens that are matched before text is split, special or not; but for white space, which is text."""
    contents = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return {content for content in contents if content.strip()} | special_tokens(tokenizer)


@final
class Controls:
    """Escapes, finds and tokenises control tokens.

    Args:
        tokenizer: a `transformers` tokenizer.
        tokens: the control tokens, as text.
        live: the contents are the user's own markup: nothing is escaped.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Iterable[str], *, live: bool) -> None:
        self._tokenizer = tokenizer
        self._live = live
        longest_first = sorted(tokens, key=lambda text: (-len(text), text))
        spelled = [_MARK, *longest_first]
        self._pairs = {text: _MARK + chr(_FIRST + index) for index, text in enumerate(spelled)}
        self._spelled = {pair: text for text, pair in self._pairs.items()}
        self._escaped = re.compile("|".join(map(re.escape, spelled)))
        self._written = re.compile("|".join(map(re.escape, longest_first)))

    def escape(self, content: str) -> str:
        """A content that can go through a template."""
        return content if self._live else self._escaped.sub(lambda match: self._pairs[match[0]], content)

    def restore(self, text: str) -> str:
        """Rendered text with its contents as they were."""
        return text if self._live else _PAIR.sub(lambda pair: self._spelled.get(pair[0], pair[0]), text)

    def find(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The first control token from `start` on that is not an escaped one."""
        return self._written.search(text, start)

    def ids(self, text: str) -> list[int]:
        """The ids of rendered text, escaped control tokens as text."""
        if self._live or _MARK not in text:
            return self.raw_ids(text)
        ids: list[int] = []
        start = 0
        for control in self._written.finditer(text):
            ids += self._plain_ids(text[start : control.start()])
            ids.append(self._tokenizer.convert_tokens_to_ids(control.group()))
            start = control.end()
        return ids + self._plain_ids(text[start:])

    def raw_ids(self, text: str, **options: bool) -> list[int]:
        """The ids of text that went through no template; all control tokens in it count."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def _plain_ids(self, text: str) -> list[int]:
        """The ids of text in which no control token counts: each is cut after its first character."""
        cuts = [0]
        restored = ""
        for piece in re.split(f"({_PAIR.pattern})", text, flags=re.DOTALL):
            if piece.startswith(_MARK):
                cuts.append(len(restored) + 1)
            restored += self.restore(piece)
        pieces = [restored[a:b] for a, b in zip(cuts, [*cuts[1:], len(restored)], strict=True)]
        return [token for piece in pieces for token in self.raw_ids(piece, split_special_tokens=True)]
