"""Who writes, who answers, what is dropped, and which rows stay."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.data.rendering import Renderer
from retain.data.written_rows import as_text
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.models.decoder import DecoderFamily
from retain.strategies.ssr import SSR, few_shots, first_row, nearly_copies, representative
from retain.task_view import BoundTask
from retain.types import GREEDY, Example, Message, Sampling

WORDS = ["apple", "river", "window", "candle", "mountain", "violin"]
WORDS += ["harbour", "lantern", "meadow", "thunder", "copper", "basket"]


def rows(task: str, num: int = 12, labels: Sequence[str] = ("yes", "no")) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{task} {i}", task=task,
            messages=(Message("user", f"Is the {WORDS[i % 12]} old?"), Message("assistant", labels[i % len(labels)])),
        )
        for i in range(num)
    )  # fmt: skip


BASE = tuple(Example(id=f"b{i}", text=f"base {i}", source="generated", task="base") for i in range(3))
PEOPLE = ["Anna", "Bert", "Chloe", "David", "Edgar", "Fatima", "Georg", "Hanoi", "Ingmar", "Jun", "Kofi", "Linh"]


def made_up(at: int) -> str:
    """A row unlike the task's own; its answer is the base model's guess."""
    return f"Was {PEOPLE[at % 12]} here on day {at}, or elsewhere?[[assistant]]no[[end]]\n\n[[user]]and so"


class Switched:
    """A method whose base can be had back."""

    can_detach = True

    @contextmanager
    def detached(self, model: Any) -> Generator[nn.Module]:
        model.is_base = True
        model.requires_grad_(True)  # as PEFT's switch does
        yield model
        model.is_base = False


class Fixed:
    can_detach = False


@dataclass
class Scripted:
    """A view whose model writes what the test says."""

    name: str
    examples: Sequence[Example]
    says: Callable[[int], str] = made_up
    answers: Callable[[int], str] = lambda at: " yes"
    seed: int = 0
    method: Any = field(default_factory=Switched)
    asked: list[Any] = field(default_factory=list)
    made: int = 0
    answered: int = 0

    def num_tokens(self, example: Example) -> int:
        return len(example.text.split()) or 5

    def embed(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        assert all(example.text and not example.messages for example in examples), "prompts only"
        return torch.stack([torch.tensor([len(example.text), 1.0]) for example in examples])

    def generate(self, model: Any, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling) -> list[str]:
        self.asked.append((list(prompts), max_new_tokens, sampling, model.is_base))
        if prompts and prompts[0].text:
            self.made += len(prompts)
            return [self.says(at) for at in range(self.made - len(prompts), self.made)]
        self.answered += len(prompts)
        return [self.answers(at) for at in range(self.answered - len(prompts), self.answered)]


def network() -> nn.Module:
    model: Any = nn.Linear(2, 2)
    model.is_base = False
    model.bias.requires_grad_(False)
    return model


def learned(view: Scripted, **options: Any) -> SSR:
    strategy = SSR(**{"num": 4, "num_clusters": 2, **options})
    strategy.after_task(network(), view)
    return strategy


def test_the_base_writes_and_the_tuned_model_answers() -> None:
    view = Scripted("desk", rows("desk"))
    strategy = learned(view)
    (prompts, _, sampling, by_base), (asked, _, greedy, again_base) = view.asked
    assert (by_base, again_base) == (True, False)
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.9, 0.6, 1.0)
    assert greedy == GREEDY
    assert len(prompts) == len(asked) == 8, "twice as many as are kept"
    assert [row.answer for row in strategy.rows] == ["yes"] * 4, "not the base model's `no`"
    assert {(row.source, row.task) for row in strategy.rows} == {("generated", "desk")}


def test_without_a_base_the_tuned_model_writes() -> None:
    view = Scripted("desk", rows("desk"), method=Fixed())
    learned(view)
    assert not view.asked[0][3]


def test_what_moves_is_as_it_was() -> None:
    model = network()
    SSR(num=2).after_task(model, Scripted("desk", rows("desk")))
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]


def test_each_prompt_shows_two_rows_of_few() -> None:
    view = Scripted("desk", rows("desk"), lambda at: "junk")
    learned(view, num_demonstrations=3, max_rounds=2)
    texts = [prompt.text for prompts, *_ in view.asked for prompt in prompts]
    shown = Counter(part for text in texts for part in text.split("\n\n")[:-1])
    assert len(shown) == 3
    assert set(shown) <= {as_text(row) for row in view.examples}
    assert all(text.count("[[end]]") == 2 and text.endswith("[[end]]\n\n[[user]]") for text in texts)
    assert len({sampling.seed for _, _, sampling, _ in view.asked}) == 2, "other draws in each round"


def test_what_is_dropped_is_told() -> None:
    copy = as_text(rows("desk")[0]).replace("?", "??").removeprefix("[[user]]")
    script = ["junk[[end]] ", "q", copy, made_up(0), made_up(0), made_up(1), made_up(2), made_up(3)]
    view = Scripted("desk", rows("desk"), lambda at: script[at % 8], lambda at: "maybe" if at == 1 else "no")
    strategy = learned(view, oversample=1.0, max_rounds=2)
    assert len(strategy.rows) == 2
    [note] = strategy.notes
    assert note == (
        "ssr: of desk 4 rows wanted, 7 written, 3 kept (1 short); dropped: 1 other turns than the task's, 1 cut off, "
        "1 a near-copy of an example, 1 a repeat; 1 without a usable answer; 2 of 4 chosen (2 short)"
    )


def test_two_answers_to_one_prompt_are_a_repeat() -> None:
    view = Scripted("desk", rows("desk"), lambda at: made_up(0).replace("no", ["no", "yes"][at % 2]))
    assert len(learned(view).rows) == 1


def test_no_row_of_the_task_is_kept() -> None:
    state = learned(Scripted("desk", rows("desk"))).state_dict()
    assert not any(WORDS[i] in repr(state) for i in range(12))


def test_raw_text_is_written_and_has_no_answer_to_refine() -> None:
    texts = [Example(id=f"t{i}", text=f"A story of the {word}.", task="stories") for i, word in enumerate(WORDS)]
    view = Scripted("stories", texts, lambda at: f"Once, {PEOPLE[at % 12]} went to sea in {at} boats.[[end]]")
    strategy = learned(view)
    assert len(strategy.rows) == 4
    assert all(row.text.startswith("Once") and not row.messages for row in strategy.rows)
    assert len(view.asked) == 1


def test_the_rows_have_their_share_of_an_epoch() -> None:
    strategy = learned(Scripted("desk", rows("desk")), ratio=0.25)
    task = Scripted("next", rows("next"))
    mixed = strategy.mix_examples(task, 0)
    assert tuple(mixed[:12]) == task.examples
    assert [row.source for row in mixed[12:]] == ["generated"] * 4
    assert mixed == strategy.mix_examples(task, 0)
    assert tuple(learned(Scripted("desk", rows("desk")), ratio=0.0).mix_examples(task, 0)) == task.examples


def test_the_bases_rows_are_taken_as_they_are() -> None:
    view = Scripted("base", BASE)
    strategy = learned(view)
    assert strategy.rows == list(BASE)
    assert view.asked == []


def test_goes_on_from_its_state() -> None:
    strategy, other = learned(Scripted("desk", rows("desk"))), SSR(num=4)
    other.restore(network(), strategy.state_dict())
    assert other.state_dict() == strategy.state_dict()
    task = Scripted("next", rows("next"))
    assert other.mix_examples(task, 1) == strategy.mix_examples(task, 1)


def test_the_same_seed_makes_the_same_rows() -> None:
    views = [Scripted("desk", rows("desk"), seed=seed) for seed in (0, 0, 1)]
    for view in views:
        learned(view)
    prompts = [[prompt.text for prompt in view.asked[0][0]] for view in views]
    assert prompts[0] == prompts[1] != prompts[2]


# The parts


def test_only_the_first_row_of_a_text_is_read() -> None:
    assert first_row("[[user]]a[[assistant]]b[[end]]\n\n[[user]]c") == "[[user]]a[[assistant]]b[[end]]"
    assert first_row("[[user]]a") == "[[user]]a"


def test_shots_read_as_the_beginning_of_a_list() -> None:
    first, second = rows("desk")[:2]
    assert few_shots([first, second]).text == f"{as_text(first)}\n\n{as_text(second)}\n\n[[user]]"
    assert few_shots([first, Example(id="t", text="x")]).text.endswith("\n\n[[text]]")


@pytest.mark.parametrize(
    ("text", "other", "near"),
    [("Is it red?", "Is it red?", True), ("Is it red ?", "Is it red?", True), ("Is it red?", "Are they blue?", False)],
)
def test_near_copies(text: str, other: str, near: bool) -> None:
    assert nearly_copies(text, other) == near


def test_clusters_give_in_proportion_their_most_central_rows() -> None:
    angles = torch.tensor([0.0, 0.1, -0.1, 0.2, -0.2, 0.3, 3.0, 3.1, 2.9])  # six rows here, three there
    features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.rand(9, 1, generator=torch.Generator())
    chosen = representative(features, 3, num_clusters=2, seed=0)
    assert len([row for row in chosen if row < 6]) == 2
    assert [row for row in chosen if row >= 6] == [6], "the middle one"
    assert set(chosen) & {1, 0}, "near the middle of the six"


@pytest.mark.parametrize("num", [1, 5, 17, 40])
def test_as_many_rows_as_wanted_each_once(num: int) -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    chosen = representative(features, num, num_clusters=20, seed=3)
    assert len(set(chosen)) == len(chosen) == num
    assert chosen == representative(features, num, num_clusters=20, seed=3)


@pytest.mark.parametrize("method", [Full(), LoRA(r=2)], ids=["full", "lora"])
def test_on_a_language_model(llama: nn.Module, tokenizer: Any, method: Any) -> None:
    """Random weights write no row, and that is told; the model is left as it was."""
    model = method.apply(llama)
    view = BoundTask(
        name="desk", examples=rows("desk"), family=DecoderFamily(), renderer=Renderer(tokenizer), method=method,
        max_length=128, max_tokens=1000, packed=True, precision="fp32",
    )  # fmt: skip
    flags = [parameter.requires_grad for parameter in model.parameters()]
    strategy = SSR(num=2, max_rounds=1)
    strategy.after_task(model, view)
    assert strategy.rows == []
    assert "0 of 2 chosen (2 short)" in strategy.notes[0]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num": 0}, "num: expected a whole number above 0, got 0"),
        ({"num_shots": 0}, "num_shots: "),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"top_p": 1.5}, "top_p: expected a share in"),
        ({"oversample": 0.5}, "oversample: "),
        ({"ratio": 1.0}, "ratio: expected a share in"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SSR(**options)
