"""A whole evaluation of a tiny model, on a few probes and texts."""

import copy

import pytest
import torch
from torch import nn

from retain.data.rendering import Renderer
from retain.errors import ConfigError
from retain.evaluation import evaluate as module
from retain.evaluation import probes
from retain.evaluation.changes import changes
from retain.evaluation.evaluate import EvaluationConfig, evaluate
from retain.models.decoder import DecoderFamily
from retain.types import Example, Message, Probe, Task

PROBES = tuple(
    Probe(f"{ability}{k}", ability, "en", f"question {k} of {ability}:", (" yes", " no", " red")[: 2 + k % 2], k % 2)
    for ability in ("code", "grammar")
    for k in range(6)
)
TEXTS = (Example("t1", text="The quick brown fox jumps."), Example("t2", text="yes no red green blue yes no"))
LABELS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture(autouse=True)
def few_items(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "load_probes", lambda: PROBES)
    monkeypatch.setattr(module, "load_texts", lambda: TEXTS)
    monkeypatch.setattr(probes, "load_texts", lambda: TEXTS)


def task(name: str, *, num: int = 4, metric: str = "accuracy") -> Task:
    rows = [
        Example(f"{name}{k}", (Message("user", f"{name} question {k}?"), Message("assistant", LABELS[k % 3])))
        for k in range(num)
    ]
    return Task(name, (), tuple(rows), (), metric, LABELS, 4)


def perturbed(model: nn.Module, scale: float = 0.05) -> nn.Module:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return changed


def run(model: nn.Module, renderer: Renderer, tasks=(), **options):
    return evaluate(model, tasks, family=DecoderFamily(), renderer=renderer, **options)


def test_every_suite_has_a_score_and_every_example_an_answer(llama, renderer: Renderer):
    found = run(llama, renderer, [task("desk"), task("menus", metric="rouge_l"), task("text", metric="perplexity")])
    assert list(found.scores) == ["desk", "menus", "text", "probe:code", "probe:grammar", "probes", "kl"]
    suites = {suite: sum(answer.suite == suite for answer in found.answers) for suite in found.scores}
    assert suites == {"desk": 4, "menus": 4, "text": 4, "probe:code": 6, "probe:grammar": 6, "probes": 0, "kl": 2}
    for suite, score in found.scores.items():
        mine = [a for a in found.answers if a.suite == suite or (suite == "probes" and a.suite.startswith("probe:"))]
        assert score.num == len(mine)
        assert score.low <= score.value <= score.high
        if score.metric != "perplexity":
            assert score.value == pytest.approx(sum(answer.score for answer in mine) / len(mine))
        assert (score.margin is not None) == (score.chance is not None) == (score.metric == "accuracy")
    assert found.scores["probes"].chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found.scores["desk"].chance == pytest.approx(1 / 3)


def test_the_base_has_a_kl_of_zero_and_hands_its_distribution_on(llama, renderer: Renderer):
    base = run(llama, renderer)
    assert base.distribution is not None
    assert base.distribution.texts == ("t1", "t2")
    assert (base.scores["kl"].value, base.scores["kl"].low, base.scores["kl"].high) == (0, 0, 0)
    again = run(llama, renderer, base=base.distribution)
    assert again.scores == base.scores
    assert again.answers == base.answers
    moved = run(perturbed(llama), renderer, base=base.distribution)
    assert moved.scores["kl"].value > 0
    assert moved.distribution is base.distribution
    counts = base.distribution.counts
    nats = [answer.score for answer in moved.answers if answer.suite == "kl"]
    assert moved.scores["kl"].value == pytest.approx(
        sum(n * c for n, c in zip(nats, counts, strict=True)) / sum(counts)
    )


def test_the_base_decides_which_texts_are_read_and_how_much_of_each(llama, renderer: Renderer):
    base = run(llama, renderer, config=EvaluationConfig(probes=False, text_tokens=3, max_texts=1))
    assert base.distribution.counts == (3,)
    later = run(llama, renderer, base=base.distribution, config=EvaluationConfig(probes=False), seed=9)
    assert later.scores == base.scores
    assert later.answers == base.answers


def test_two_evaluations_are_compared_by_changes(llama, renderer: Renderer):
    before = run(llama, renderer, [task("desk")])
    after = run(perturbed(llama, 0.2), renderer, [task("desk")], base=before.distribution)
    found = changes(
        before.answers, after.answers, metrics={name: score.metric for name, score in before.scores.items()}
    )
    assert found.keys() == before.scores.keys()
    for suite in ("desk", "probe:code", "probes"):
        assert found[suite].before == pytest.approx(before.scores[suite].value)
        assert found[suite].after == pytest.approx(after.scores[suite].value)
        margins = (before.scores[suite].margin, after.scores[suite].margin)
        assert found[suite].margin.mean == pytest.approx(margins[1] - margins[0])
    assert found["kl"].difference.high < 0


def test_what_is_switched_off_is_not_measured(llama, renderer: Renderer):
    found = run(llama, renderer, [task("desk")], config=EvaluationConfig(probes=False, kl=False))
    assert list(found.scores) == ["desk"]
    assert found.distribution is None
    assert "kl" not in run(llama, renderer, config=EvaluationConfig(kl=False)).scores


def test_fewer_probes(llama, renderer: Renderer):
    found = run(llama, renderer, config=EvaluationConfig(max_probes=4, kl=False), seed=1)
    assert [found.scores[suite].num for suite in ("probe:code", "probe:grammar", "probes")] == [2, 2, 4]
    again = run(llama, renderer, config=EvaluationConfig(max_probes=4, kl=False), seed=1)
    assert [answer.id for answer in again.answers] == [answer.id for answer in found.answers]


def test_the_size_of_a_pass_changes_nothing(llama, renderer: Renderer):
    base = run(llama, renderer, config=EvaluationConfig(probes=False))
    small, large = (
        run(
            perturbed(llama),
            renderer,
            base=base.distribution,
            config=EvaluationConfig(probes=False, batch_tokens=tokens),
        )
        for tokens in (1, 4096)
    )
    assert small.scores["kl"].value == pytest.approx(large.scores["kl"].value, rel=1e-4)


def test_a_task_without_test_rows_is_passed_over(llama, renderer: Renderer):
    assert run(llama, renderer, [task("desk", num=0)], config=EvaluationConfig(probes=False, kl=False)).scores == {}


def test_the_model_is_left_as_it_was(llama, renderer: Renderer):
    llama.train()
    llama.model.layers[0].eval()
    modes = [layer.training for layer in llama.modules()]
    weights = copy.deepcopy(llama.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(llama, renderer, [task("desk"), task("menus", metric="exact_match")])
    assert torch.equal(torch.rand(1), expected)
    assert [layer.training for layer in llama.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in llama.state_dict().items())
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_dropout_is_off(build_llama, renderer: Renderer):
    base = run(build_llama(), renderer).distribution
    model = build_llama(attention_dropout=0.5, seed=1).train()
    trained = run(model, renderer, [task("desk")], base=base)
    assert trained.answers == run(model.eval(), renderer, [task("desk")], base=base).answers
    chosen = run(
        model, renderer, [task("desk")], base=base, select=lambda _: build_llama(attention_dropout=0.5, seed=1).train()
    )
    assert chosen.answers == trained.answers


def test_each_task_is_answered_by_the_model_that_is_selected_for_it(llama, renderer: Renderer):
    models = {"desk": perturbed(llama, 0.1).train(), "menus": llama}
    asked: list[str] = []

    def select(name: str) -> nn.Module:
        asked.append(name)
        return models[name]

    config = EvaluationConfig(kl=False)
    found = run(llama, renderer, [task("desk"), task("menus")], select=select, config=config)
    assert asked == ["desk", "menus"]
    assert models["desk"].training
    apart = {name: run(model, renderer, [task(name)], config=config) for name, model in models.items()}
    assert found.scores["desk"] == apart["desk"].scores["desk"]
    assert found.scores["desk"] != run(llama, renderer, [task("desk")], config=config).scores["desk"]
    assert found.scores["menus"] == apart["menus"].scores["menus"]
    assert found.scores["probes"] == apart["menus"].scores["probes"]


@pytest.mark.parametrize("name", ["probes", "kl", "probe:code"])
def test_our_own_suites_names_are_taken(name: str, llama, renderer: Renderer):
    with pytest.raises(ConfigError, match=name):
        run(llama, renderer, [task(name)])


def test_wrong_settings_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        EvaluationConfig(max_probes=0, max_texts=0, text_tokens=0, batch_tokens=-1)
    assert len(caught.value.problems) == 4
