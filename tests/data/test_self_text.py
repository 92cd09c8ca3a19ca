from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn

from retain.data.rendering import Renderer
from retain.data.self_text import OPENINGS, REQUESTS, draw, write_self_text
from retain.methods.full import Full
from retain.models.decoder import DecoderFamily
from retain.task_view import BoundTask
from retain.types import Example, Sampling


@dataclass
class Scripted:
    """A view whose model says what the test says."""

    says: Sequence[str]
    seed: int = 0
    asked: list[Example] = field(default_factory=list)

    def generate(
        self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        assert sampling.seed == self.seed
        self.asked = list(prompts)
        return [self.says[at % len(self.says)] for at in range(len(prompts))]


def write(view: Any, **options: Any) -> tuple[Example, ...]:
    return write_self_text(nn.Identity(), view, seed=view.seed, **options)


def test_half_is_free_text_and_half_answers_requests() -> None:
    view = Scripted([" and so on"])
    rows = write(view, num=9)
    texts, chats = [row for row in rows if row.text], [row for row in rows if row.messages]
    assert (len(texts), len(chats)) == (5, 4)
    assert all(row.text.removesuffix(" and so on") in OPENINGS for row in texts)
    for row in chats:
        assert [message.role for message in row.messages] == ["user", "assistant"]
        assert row.messages[0].content in REQUESTS
        assert row.answer == " and so on"
    assert {(row.source, row.task, row.weight) for row in rows} == {("generated", "base", 1.0)}
    assert {row.task for row in write(Scripted([" x"]), num=4, task="desk")} == {"desk"}


def test_a_model_without_chat_writes_text_only() -> None:
    rows = write(Scripted([" x"]), num=8, chat=False)
    assert len(rows) == 8
    assert not any(row.messages for row in rows)


def test_empty_answers_and_repeats_are_dropped() -> None:
    assert write(Scripted(["", " \n"]), num=6) == ()
    num = 2 * len(OPENINGS)
    rows = write(Scripted([" the same"]), num=num, chat=False)
    assert len(rows) == len(OPENINGS)


def test_ids_are_of_the_content() -> None:
    one, two = write(Scripted([" a"]), num=8), write(Scripted([" b"]), num=8)
    assert len({row.id for row in one} | {row.id for row in two}) == 16
    assert [row.id for row in write(Scripted([" a"]), num=8)] == [row.id for row in one]


def test_the_seed_chooses_the_openings() -> None:
    views = [Scripted([" a"], seed=seed) for seed in (0, 0, 1)]
    for view in views:
        write(view, num=10)
    first, same, other = ([row.text or row.prompt[0].content for row in view.asked] for view in views)
    assert first == same
    assert first != other


@pytest.mark.parametrize("num", [0, 1, 5, 12, 13, 31])
def test_each_choice_is_drawn_as_often_as_any_other(num: int) -> None:
    choices = "abcdef"
    counts = Counter(draw(choices, num, seed=2))
    assert sum(counts.values()) == num
    assert {counts[letter] for letter in choices} <= {num // 6, -(-num // 6)}


def test_openings_and_requests_are_different() -> None:
    assert len(set(OPENINGS)) == len(OPENINGS)
    assert len(set(REQUESTS)) == len(REQUESTS)


def test_on_a_real_view(llama: nn.Module, tokenizer: Any) -> None:
    view = BoundTask(
        name="base", examples=(), family=DecoderFamily(), renderer=Renderer(tokenizer), method=Full(),
        max_length=64, max_tokens=1000, packed=True, precision="fp32", seed=5,
    )  # fmt: skip
    rows = write_self_text(llama, view, num=6, seed=5, max_new_tokens=5)
    assert rows == write_self_text(llama, view, num=6, seed=5, max_new_tokens=5)
    assert 0 < len(rows) <= 6
    encoded, _ = view.rows(rows)
    assert all(row.num_targets for row in encoded)
