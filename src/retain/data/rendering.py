"""One renderer for training, evaluation, chat and export: how a conversation becomes token ids, and which are trained.

    encode(conversation) = prompt_ids(the turns before the answer) + answer_ids(those turns, the answer)

The prompt is tokenised exactly as the model will be given it, and the answer as what follows, so the two sides of the
equation hold token by token. What is trained is found by rendering, never by a token's id: the turn of an assistant
begins where the rendered prompt before it ends, and ends with the stop token that the template (or we) put after it.
A padding token that equals the stop token is therefore harmless.

A control token that a user's text spells out (`<|im_end|>`) stays text: only the template writes control tokens.
Raw text and the `plain` template are the user's own markup, so there it does count.
"""

from collections.abc import Sequence
from typing import Any, final

import jinja2

from retain.data.controls import Controls, added_tokens, special_tokens
from retain.data.labels import Labels
from retain.errors import ConfigError, DataError, ModelError
from retain.types import Example, Message

__all__ = ["DEFAULT_TEMPLATE", "PLAIN_TEMPLATE", "Renderer"]

Tokenizer = Any  # a `transformers` tokenizer; they share no base that a type checker can see through

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For a model that brings no chat template."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Prompt, completion, stop token, and nothing else: TRL's reading of prompt/completion rows."""

_BEGIN = "{% if not messages[0].content.startswith(bos_token) %}{{ bos_token }}{% endif %}"
"""Before our own templates, for a tokenizer that begins every text with BOS."""

_STOP = (
    "{% set ended = namespace(messages=[]) %}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set ended.messages = ended.messages + [{'role': message.role, 'content': message.content + eos_token}] %}"
    "{% else %}{% set ended.messages = ended.messages + [message] %}{% endif %}{% endfor %}"
    "{% set messages = ended.messages %}"
)
"""Before a template that puts no stop token after an assistant's turn."""

_PROBE = (Message("system", "probe-system"), Message("user", "probe-user"), Message("assistant", "probe-answer"))


@final
class Renderer:
    """Turns conversations into text and token ids.

    Args:
        tokenizer: a `transformers` tokenizer with an EOS token.
        template: `auto` (the tokenizer's own chat template, else `DEFAULT_TEMPLATE`), `plain` (`PLAIN_TEMPLATE`),
            or the text of a Jinja chat template.

    Attributes:
        chat_template: the Jinja text in use; saved with an exported model, it renders the same prompts elsewhere.
        stop_ids: the tokens that end an answer.
        notes: what had to be adapted, as sentences.
        labels: the classes that the model's head tells apart; the family sets them, and none where labels are text.

    Raises:
        ModelError: the tokenizer has no EOS token, or its template cannot render a question and an answer.
        ConfigError: the given template cannot.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "auto") -> None:
        if tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has no EOS token",
                problems=["every answer must end in a stop token that is trained, else the model never stops"],
                hint="set `eos_token` in the model's tokenizer_config.json",
            )
        self.tokenizer = tokenizer
        self.notes: tuple[str, ...] = ()
        self.labels = Labels()
        self._bos_ids = _begin_ids(tokenizer)
        self._controls = Controls(tokenizer, special_tokens(tokenizer), live=template == "plain")
        self.chat_template = self._choose(template)
        try:
            stop = self._probe_stop(live=template == "plain")
            self._takes_system = self._probe_system()
        except jinja2.TemplateError as error:
            own = template in ("auto", "plain")
            message = "the model's chat template cannot be used" if own else "the given chat template cannot be used"
            raise (ModelError if own else ConfigError)(
                message,
                problems=[f"{type(error).__name__}: {error}"],
                hint="set `template` to `plain`, or to a Jinja text that renders `messages` with `role` and `content`",
            ) from error
        self.stop_ids = tuple(dict.fromkeys(tokenizer.convert_tokens_to_ids([tokenizer.eos_token, stop])))

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it; with the opening of the assistant's next turn where asked."""
        return self._controls.restore(self._render(messages, add_generation_prompt))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that the model is given to answer the conversation."""
        return self._controls.ids(self._render(messages, True))

    def answer_ids(self, messages: Sequence[Message], answer: str) -> list[int]:
        """The ids of an answer to the conversation, the stop token included."""
        prompt = self._render(messages, True)
        return self._continue(self._controls.ids(prompt), prompt, self._answer(messages, prompt, answer))

    def text_ids(self, text: str) -> list[int]:
        """The ids of raw text: BOS where the model begins with one, and no EOS."""
        ids = self._controls.raw_ids(text)
        return ids if ids[: len(self._bos_ids)] == self._bos_ids else self._bos_ids + ids

    def encode(self, example: Example) -> tuple[list[int], list[float]]:
        """The ids of an example, and the loss weight of each: 0 where it is not trained, never above 0 for the first.

        Every assistant turn with a weight is trained, from where the prompt before it ends to its stop token. An
        assistant's turn that opens the conversation answers nothing and is not trained. Raw text is trained whole,
        with a stop token at its end. The example's own weight is not in these weights: see `packing.shifted`.

        Raises:
            DataError: the conversation does not end in an answer, or the template refuses it.
        """
        if not example.messages:
            ids = self.text_ids(example.text)
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids = [*ids, self.tokenizer.eos_token_id]
            return ids, [0.0] + [1.0] * (len(ids) - 1)
        *history, answer = example.messages
        if answer.role != "assistant" or not history:
            raise DataError(
                f"row {example.id}: a conversation must have a question and end in the assistant's answer",
                problems=[f"its roles: {', '.join(message.role for message in example.messages)}"],
            )
        prompt = self._render(history, True)
        prompt_ids = self._controls.ids(prompt)
        answer_ids = self._continue(prompt_ids, prompt, self._answer(history, prompt, answer.content))
        weights = [0.0] * len(prompt_ids) + [answer.weight] * len(answer_ids)
        spans = self._spans(history, prompt)
        positions = self._positions(prompt, prompt_ids, [end for start, stop, _ in spans for end in (start, stop)])
        for (_, _, weight), first, last in zip(spans, positions[::2], positions[1::2], strict=True):
            weights[first:last] = [weight] * (last - first)
        return prompt_ids + answer_ids, [0.0, *weights[1:]]

    def _choose(self, template: str) -> str:
        """The Jinja text behind a template's name."""
        begin = _BEGIN if self._bos_ids else ""
        if template == "plain":
            return begin + PLAIN_TEMPLATE
        if template != "auto":
            return template
        if self.tokenizer.chat_template is not None:
            return self.tokenizer.get_chat_template()
        self.notes += ("the model brings no chat template: a plain `User: ... Assistant: ...` is used",)
        return begin + DEFAULT_TEMPLATE

    def _probe_stop(self, *, live: bool) -> str:
        """The token that ends an answer, after a template that writes none is made to; learns the control tokens."""
        _, user, answer = _PROBE
        added = Controls(self.tokenizer, added_tokens(self.tokenizer), live=live)
        if not added.find(self._after(answer, [user, answer])):
            self.chat_template = _STOP + self.chat_template
            self.notes += (f"the chat template ends no answer: {self.tokenizer.eos_token} is put after each",)
        tail = self._after(answer, [user, answer])
        stop = added.find(tail)
        if not stop:
            raise jinja2.TemplateError("it drops the stop token after the assistant's turn")
        self._tail = tail[: stop.end()]
        # Some tokenizers (those read from GGUF files) do not declare their template's control tokens as special.
        around = self._apply([user], False)
        written = {token for token in added_tokens(self.tokenizer) if token in around} | {stop.group()}
        self._controls = Controls(self.tokenizer, special_tokens(self.tokenizer) | written, live=live)
        return stop.group()

    def _probe_system(self) -> bool:
        """Does the template take a system turn?"""
        system, user, _ = _PROBE
        try:
            taken = system.content in self._apply([system, user], True)
        except jinja2.TemplateError:
            taken = False
        if not taken:
            self.notes += ("the chat template takes no system turn: its text is put before the first user turn",)
        return taken

    def _after(self, message: Message, messages: Sequence[Message]) -> str:
        """What the template writes after a message's content."""
        _, found, tail = self._apply(messages, False).rpartition(message.content)
        if not found:
            raise jinja2.TemplateError(f"it leaves out the {message.role}'s turn")
        return tail

    def _apply(self, messages: Sequence[Message], generation: bool) -> str:
        """The template's text, with control tokens in the contents escaped."""
        turns = [{"role": message.role, "content": self._controls.escape(message.content)} for message in messages]
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self.chat_template, tokenize=False, add_generation_prompt=generation
        )

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        """`_apply`, with the system turn folded where the template takes none, and its refusals explained."""
        if not messages:
            raise DataError("an empty conversation cannot be rendered", hint="begin with a user's turn")
        if messages[0].role == "system" and not self._takes_system:
            messages = _fold(messages)
        try:
            return self._apply(messages, generation)
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template refuses a conversation: {error}",
                problems=[
                    f"its roles: {', '.join(message.role for message in messages)}",
                    f"its first turn: {messages[0].content[:80]!r}",
                ],
                hint="many templates want user and assistant in turn; `template: plain` takes any",
            ) from error

    def _answer(self, history: Sequence[Message], prompt: str, answer: str) -> str:
        """What follows the rendered prompt when the assistant gives this answer, to the stop token."""
        full = self._render([*history, Message("assistant", answer)], False)
        content = self._controls.escape(answer)
        if not full.startswith(prompt):  # the prompt opens the turn with more than the finished turn has
            opened = prompt[_num_common(full, prompt) :]
            return content.removeprefix(opened) + self._tail
        rest = full[len(prompt) :]
        end = rest.rfind(self._tail)
        return rest[: end + len(self._tail)] if end >= 0 else rest + self.tokenizer.eos_token

    def _spans(self, history: Sequence[Message], prompt: str) -> list[tuple[int, int, float]]:
        """(start, end, weight) in the rendered prompt of every earlier assistant turn that is trained."""
        spans: list[tuple[int, int, float]] = []
        for i, message in enumerate(history):
            if i == 0 or message.role != "assistant" or message.weight <= 0:
                continue
            content = self._controls.escape(message.content)
            opening = self._render(history[:i], True)
            start = len(opening)
            if not prompt.startswith(opening):  # the template rewrites earlier turns, or opens a turn with more
                closed = _num_common(prompt, self._render(history[:i], False))
                found = prompt.find(content.strip(), closed)
                start = _num_common(prompt, opening)
                start = min(start, found) if found >= 0 else start
            start = max(start, spans[-1][1] if spans else 0)
            end = self._turn_end(prompt, start, content)
            if end > start:
                spans.append((start, end, message.weight))
        return spans

    def _turn_end(self, text: str, start: int, content: str) -> int:
        """Where the stop token of the turn ends; `start` where it has none."""
        content = content.strip()
        found = text.find(content, start)
        while found >= 0:  # a short content may also occur in what opens the turn: a stop token must follow it
            after = found + len(content)
            stop = self._controls.find(text, after)
            if stop and not text[after : stop.start()].strip():
                return stop.end()
            found = text.find(content, found + 1)
        stop = self._controls.find(text, start)  # the template rewrote the content
        return stop.end() if stop else start

    def _positions(self, text: str, ids: list[int], ends: list[int]) -> list[int]:
        """The token at which each of the ascending places in the text falls."""
        pieces = [self._controls.ids(text[a:b]) for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
        if [token for piece in pieces for token in piece] == ids:
            return [sum(map(len, pieces[: k + 1])) for k in range(len(ends))]
        return [_num_common(self._controls.ids(text[:end]), ids) for end in ends]

    def _continue(self, prompt_ids: list[int], prompt: str, rest: str) -> list[int]:
        """The ids of `rest` after the prompt; tokens never span the border, for the model is given the prompt alone."""
        ids = self._controls.ids(prompt + rest)
        return ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else self._controls.ids(rest)


def _begin_ids(tokenizer: Tokenizer) -> list[int]:
    """[BOS] where the tokenizer begins every text with one, else nothing."""
    ids: list[int] = tokenizer("a", verbose=False)["input_ids"]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _fold(messages: Sequence[Message]) -> list[Message]:
    """The conversation with the system's text at the head of the first user turn."""
    system, *rest = messages
    if rest and rest[0].role == "user":
        return [Message("user", f"{system.content}\n\n{rest[0].content}"), *rest[1:]]
    return [Message("user", system.content), *rest]


def _num_common(left: Sequence[int] | str, right: Sequence[int] | str) -> int:
    """How many leading ids, or characters, are the same."""
    for k, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return k
    return min(len(left), len(right))
