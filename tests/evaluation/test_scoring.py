"""Scores of whole tasks: with a family whose answers are written down, then with a real tiny model."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from retain.data.rendering import Renderer
from retain.errors import ConfigError, DataError
from retain.evaluation.forgetting import LOWER_IS_BETTER
from retain.evaluation.scoring import METRICS, choice_margin, find_metric, score_task
from retain.models.decoder import DecoderFamily
from retain.models.family import Family
from retain.types import Example, Message, Task


def question(i: str, text: str, answer: str, **options: Any) -> Example:
    return Example(i, (Message("user", text), Message("assistant", answer)), **options)


@dataclass
class WrittenFamily:
    """Answers from a table of prompts (`generate`) or of continuations (`loglikelihood`), and counts its calls."""

    renderer: Renderer
    says: dict[str, str] = field(default_factory=dict)
    nats: dict[str, float] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)

    def text(self, ids: list[int]) -> str:
        return self.renderer.tokenizer.decode(ids)

    def generate(self, model, tokenizer, prompts, *, max_new_tokens, **options) -> list[str]:
        self.calls.append(len(prompts))
        return [next(said for asked, said in self.says.items() if asked in self.text(ids)) for ids in prompts]

    def loglikelihood(self, model, tokenizer, pairs) -> list[float]:
        self.calls.append(len(pairs))
        return [self.nats[self.text(rest).removesuffix("<|im_end|>")] for _, rest in pairs]

    answer, choose = Family.answer, Family.choose


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


def test_accuracy_takes_the_likeliest_label(renderer: Renderer):
    rows = (question("1", "sky?", "blue"), question("2", "leaf?", "red"))
    task = Task("colours", (), rows, (), "accuracy", ("red", "green", "blue"))
    family = WrittenFamily(renderer, nats={"red": -2.0, "green": -3.0, "blue": -1.0})
    score, answers = score_task(torch.nn.Identity(), task, family=family, renderer=renderer)
    assert family.calls == [6]
    assert [answer.answer for answer in answers] == ["blue", "blue"]
    assert [answer.score for answer in answers] == [1, 0]
    assert answers[0].margin == pytest.approx(-1.0 - math.log(math.exp(-2) + math.exp(-3)))
    assert answers[1].margin == pytest.approx(-2.0 - math.log(math.exp(-1) + math.exp(-3)))
    assert (answers[0].suite, answers[0].id, answers[0].prompt, answers[0].expected) == ("colours", "1", "sky?", "blue")
    assert (score.value, score.metric, score.num) == (0.5, "accuracy", 2)
    assert score.chance == pytest.approx(1 / 3)
    assert score.margin == pytest.approx((answers[0].margin + answers[1].margin) / 2)
    assert 0 < score.low < 0.5 < score.high < 1


def test_a_rows_own_choices_and_further_right_ones(renderer: Renderer):
    rows = (
        question("1", "a?", "red", choices=("red", "blue")),
        question("2", "b?", "red", references=("green",)),
    )
    family = WrittenFamily(renderer, nats={"red": -4.0, "green": -1.0, "blue": -2.0, "yes": -9.0})
    task = Task("t", (), rows, (), "accuracy", ("red", "green", "blue", "yes"))
    score, answers = score_task(torch.nn.Identity(), task, family=family, renderer=renderer)
    assert [answer.answer for answer in answers] == ["blue", "green"]
    assert [answer.score for answer in answers] == [0, 1]
    assert score.chance == pytest.approx((1 / 2 + 2 / 4) / 2)
    right, others = math.log(math.exp(-4) + math.exp(-1)), math.log(math.exp(-2) + math.exp(-9))
    assert answers[1].margin == pytest.approx(right - others)


def test_choice_margin_is_the_log_odds():
    p = np.array([0.5, 0.3, 0.2])
    assert choice_margin(np.log(p).tolist(), [False, True, False]) == pytest.approx(math.log(0.3 / 0.7))
    assert choice_margin([-1e4, -1e4 - 5], [True, False]) == pytest.approx(5)  # no underflow


def test_generation_is_one_call_with_the_tasks_length(renderer: Renderer):
    rows = (question("1", "one?", "1"), question("2", "two?", "2", references=("II",)), question("3", "three?", "3"))
    family = WrittenFamily(renderer, says={"one?": " 1 ", "two?": "II", "three?": "4"})
    score, answers = score_task(torch.nn.Identity(), Task("n", (), rows), family=family, renderer=renderer)
    assert family.calls == [3]
    assert [answer.score for answer in answers] == [1, 1, 0]
    assert [answer.answer for answer in answers] == [" 1 ", "II", "4"]
    assert score.value == pytest.approx(2 / 3)
    assert score.chance is score.margin is answers[0].margin is None


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.needs == "generation"])
def test_every_generation_metric_is_best_for_the_right_answer(name: str, renderer: Renderer):
    right, wrong = '{"name": "An", "age": 31}', '{"label": "red"}'
    if name == "label_f1":
        right, wrong = '["red", "blue"]', '["green"]'
    rows = (question("1", "good?", right), question("2", "bad?", right))
    family = WrittenFamily(renderer, says={"good?": right, "bad?": wrong})
    score, answers = score_task(torch.nn.Identity(), Task("t", (), rows, (), name), family=family, renderer=renderer)
    assert answers[0].score == pytest.approx(1)
    assert answers[1].score < 0.5
    assert 0 <= score.low <= score.value <= score.high <= 1
    assert score.metric == name


def test_bleu_is_the_corpus_figure_beside_sentence_scores(renderer: Renderer):
    rows = tuple(question(str(i), f"q{i}?", "the quick brown fox jumps over the lazy dog") for i in range(2))
    family = WrittenFamily(renderer, says={"q0?": "the quick brown fox jumps over the lazy dog", "q1?": "the dog"})
    score, answers = score_task(torch.nn.Identity(), Task("t", (), rows, (), "bleu"), family=family, renderer=renderer)
    assert answers[0].score == pytest.approx(1)
    assert score.value != pytest.approx((answers[0].score + answers[1].score) / 2, abs=1e-3)


def test_perplexity_counts_tokens_not_rows(tokenizer, renderer: Renderer):
    rows = (question("1", "a?", "yes"), question("2", "b?", "green blue"))
    lengths = [len(renderer.answer_ids(row.prompt, row.answer)) for row in rows]
    assert lengths[0] != lengths[1]
    family = WrittenFamily(renderer, nats={"yes": -6.0, "green blue": -30.0})
    task = Task("t", (), rows, (), "perplexity")
    score, answers = score_task(torch.nn.Identity(), task, family=family, renderer=renderer)
    assert [answer.score for answer in answers] == pytest.approx([6 / lengths[0], 30 / lengths[1]])
    assert score.value == pytest.approx(math.exp(36 / sum(lengths)))
    assert score.low <= score.value <= score.high
    assert answers[0].answer == ""


def test_every_metric_says_which_way_is_better():
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == LOWER_IS_BETTER & METRICS.keys()
    assert all(name == metric.name for name, metric in METRICS.items())
    assert METRICS["perplexity"].unit == "perplexity"


def test_an_unknown_metric_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean `rouge_l`"):
        find_metric("rougeL")
    with pytest.raises(ConfigError, match="exact_match"):
        find_metric("zzz")


@pytest.mark.parametrize(
    ("metric", "row", "problem"),
    [
        ("accuracy", question("7", "q", "purple", choices=("red", "pruple")), "7: `purple` is not one of.*`pruple`"),
        ("accuracy", question("7", "q", "red"), "0 choices"),
        ("accuracy", question("7", "q", "red", choices=("red", "red")), "1 choices"),
        ("accuracy", question("7", "q", "a", choices=("a", "b"), references=("b",)), "every choice is right"),
        ("accuracy", Example("7", text="text"), "raw text"),
        ("exact_match", Example("7", text="text"), "raw text"),
        ("json_equality", question("7", "q", "{a}"), "row 7: `{a}`: is not JSON"),
        ("contains", question("7", "q", " "), "every answer contains"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_scored_are_refused_before_the_model_is_asked(metric, row, problem, renderer: Renderer):
    family = WrittenFamily(renderer)
    with pytest.raises(DataError, match=problem):
        score_task(torch.nn.Identity(), Task("t", (), (row,), (), metric), family=family, renderer=renderer)
    assert family.calls == []


def test_all_problems_are_shown_up_to_ten(renderer: Renderer):
    rows = tuple(question(str(i), "q", "x") for i in range(13))
    with pytest.raises(DataError) as caught:
        score_task(
            torch.nn.Identity(), Task("t", (), rows, (), "accuracy"), family=WrittenFamily(renderer), renderer=renderer
        )
    assert len(caught.value.problems) == 11
    assert "3 more" in caught.value.problems[-1]


# The real family


@torch.no_grad()
def brute_force(model, prompt: list[int], rest: list[int]) -> float:
    logits = model(torch.tensor([prompt + rest])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(rest))


def test_choices_of_a_real_model_against_one_pass_each(llama, renderer: Renderer):
    labels = ("red", "green", "blue yes")
    rows = tuple(question(str(i), f"question {i}?", labels[i % 3]) for i in range(5))
    task = Task("t", (), rows, (), "accuracy", labels)
    score, answers = score_task(llama, task, family=DecoderFamily(), renderer=renderer)
    for row, answer in zip(rows, answers, strict=True):
        prompt = renderer.prompt_ids(row.prompt)
        values = [brute_force(llama, prompt, renderer.answer_ids(row.prompt, label)) for label in labels]
        assert answer.answer == labels[int(np.argmax(values))]
        assert answer.margin == pytest.approx(
            choice_margin(values, [label == row.answer for label in labels]), abs=1e-4
        )
    assert score.value == sum(answer.answer == answer.expected for answer in answers) / 5


def test_perplexity_of_a_real_model_on_raw_text_and_answers(llama, renderer: Renderer):
    rows = (Example("1", text="The quick brown fox"), question("2", "What is the capital of Vietnam?", "Hà Nội"))
    score, answers = score_task(llama, Task("t", (), rows, (), "perplexity"), family=DecoderFamily(), renderer=renderer)
    ids = renderer.text_ids(rows[0].text)
    answer_ids = renderer.answer_ids(rows[1].prompt, "Hà Nội")
    first = -brute_force(llama, ids[:1], ids[1:])
    second = -brute_force(llama, renderer.prompt_ids(rows[1].prompt), answer_ids)
    assert [answer.score for answer in answers] == pytest.approx(
        [first / (len(ids) - 1), second / len(answer_ids)], abs=1e-4
    )
    assert score.value == pytest.approx(math.exp((first + second) / (len(ids) - 1 + len(answer_ids))), rel=1e-4)


def test_one_token_of_text_has_no_perplexity(llama, renderer: Renderer):
    with pytest.raises(DataError, match="row 1: one token"):
        score_task(
            llama, Task("t", (), (Example("1", text="a"),), (), "perplexity"), family=DecoderFamily(), renderer=renderer
        )


def test_what_a_real_model_writes_is_scored(llama, tokenizer, renderer: Renderer):
    row = question("1", "red green?", "x")
    ids = torch.tensor([renderer.prompt_ids(row.prompt)])
    written = llama.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    task = Task("t", (), (question("1", "red green?", text),), max_new_tokens=5)
    score, answers = score_task(llama, task, family=DecoderFamily(), renderer=renderer)
    assert score.value == 1
    assert answers[0].answer == text
