"""What must be true of every strategy that works without gradients, on a family that learns by counting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from retain.config import check_compatibility, load_config
from retain.data.rendering import Renderer
from retain.data.tasks import TaskConfig
from retain.errors import BudgetExceeded, CompatibilityError, DataError
from retain.export import export_stage
from retain.inference import answer, load_stage
from retain.lineage import Lineage
from retain.methods import METHODS
from retain.methods.full import Full
from retain.methods.peft import Peft
from retain.models.arpa import read_arpa
from retain.models.backoff import windows
from retain.models.ngram import NGramFamily
from retain.parameters import copied
from retain.run import extend, train
from retain.strategies import STRATEGIES, Strategy
from retain.strategies.chain import Chain
from retain.strategies.joint import Joint
from retain.strategies.replay import Replay
from retain.strategies.sequential import Sequential
from retain.strategies.single_task import SingleTask
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import TrainResult, train_task
from retain.types import Example, Message, StepInfo

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "ngram.yaml"

CASES: dict[str, Callable[[], Strategy]] = {
    "joint": Joint,
    "replay": lambda: Replay(ratio=0.5),
    "replay+sequential": lambda: Chain(Replay(ratio=0.5), Sequential()),
    "sequential": Sequential,
    "single_task": SingleTask,
}


def rows(task: str, words: list[str], num: int = 8) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{task} {i}", task=task,
            messages=(Message("user", f"{task} " * (1 + i % 3)), Message("assistant", words[i % len(words)])),
        )
        for i in range(num)
    )  # fmt: skip


BASE = rows("base", ["The quick brown fox", "jumps over"])
FIRST = rows("first", ["red", "green blue"])
SECOND = rows("second", ["yes", "no no no"])
FAMILY = NGramFamily(order=3, vocab_size=300)


def make(counted: tuple[Example, ...] = BASE) -> tuple[nn.Module, Any]:
    model, tokenizer = FAMILY.create([*BASE, *FIRST, *SECOND], seed=0)
    FAMILY.fit(model, counted, Renderer(tokenizer))
    return model, tokenizer


TOKENIZER = make()[1]


def view(name: str, examples: tuple[Example, ...]) -> BoundTask:
    return BoundTask(
        name=name, examples=examples, family=FAMILY, renderer=Renderer(TOKENIZER), method=Full(), max_length=8,
        max_tokens=1000, packed=False, precision="fp32",
    )  # fmt: skip


def count(model: nn.Module, strategy: Strategy, name: str, examples: tuple[Example, ...], **more: Any) -> TrainResult:
    result = train_task(model, view(name, examples), strategy=strategy, config=TrainConfig(num_train_epochs=7), **more)
    strategy.after_task(result.model, view(name, examples))
    return result


def learn(strategy: Strategy) -> nn.Module:
    model, _ = make()
    strategy.after_task(model, view("base", BASE))
    for name, examples in (("first", FIRST), ("second", SECOND)):
        count(model, strategy, name, examples)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = copied(one), copied(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(params=sorted(CASES))
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return CASES[request.param]()


def test_the_suite_covers_every_strategy_without_gradients() -> None:
    made = {name: kind() for name, kind in STRATEGIES.items() if name != "chain"}
    assert {name for name, strategy in made.items() if not strategy.needs_gradients} == {*CASES} - {"replay+sequential"}


def test_without_a_base_the_first_task_is_plain_counting(strategy: Strategy) -> None:
    model, plain = make()[0], make((*BASE, *FIRST))[0]
    result = count(model, strategy, "first", FIRST)
    assert same(result.model, plain)
    assert result.num_steps == 1


def test_sequential_and_joint_are_all_rows_at_once() -> None:
    plain = make((*BASE, *FIRST, *SECOND))[0]
    assert same(learn(Sequential()), plain)
    assert same(learn(Joint()), plain)


def test_replay_counts_old_rows_again_and_at_ratio_0_does_not() -> None:
    plain, replayed, none = learn(Sequential()), learn(Replay(ratio=0.5)), learn(Replay(ratio=0.0))
    assert same(none, plain)
    assert not same(replayed, plain)
    assert copied(replayed)["words.counts"].sum() > copied(plain)["words.counts"].sum()


def test_single_task_answers_each_task_by_its_own_counts() -> None:
    strategy = SingleTask()
    model = learn(strategy)
    assert same(strategy.select(model, "first"), make((*BASE, *FIRST))[0])
    assert same(strategy.select(model, "second"), make((*BASE, *SECOND))[0])
    assert same(strategy.select(model, "base"), make()[0])


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_memory_comes_back(name: str) -> None:
    whole = learn(CASES[name]())
    first, second = CASES[name](), CASES[name]()
    model, _ = make()
    first.after_task(model, view("base", BASE))
    count(model, first, "first", FIRST)
    model = second.restore(model, first.state_dict())
    count(model, second, "second", SECOND)
    assert same(model, whole)


def test_consolidation_leaves_the_model_as_it_was(strategy: Strategy) -> None:
    model, plain = make()[0], make()[0]
    random = torch.get_rng_state()
    strategy.after_task(model, view("base", BASE))
    assert same(model, plain)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_step_is_told_to_those_who_look() -> None:
    seen: list[StepInfo] = []
    model, _ = make()
    before = view("", ()).mean_loss(model, FIRST)
    result = count(model, Sequential(), "first", FIRST, observers=[seen.append], validation=FIRST)
    assert result.history == tuple(seen)
    [info] = seen
    assert info.loss == pytest.approx(before)
    assert info.validation_loss is not None
    assert info.validation_loss < info.loss
    assert info.num_targets == sum(view("", ()).encode(row).num_targets for row in FIRST)
    assert any("counted once" in note for note in result.notes)
    with pytest.raises(DataError, match="no row"):
        count(model, Sequential(), "third", ())


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_what_needs_gradients_is_refused_before_a_model_loads(name: str, tmp_path: Path) -> None:
    config = load_config(RECIPE, [f"output_dir={tmp_path}", f"strategy={name}"]).config
    if not config.strategy.needs_gradients:
        check_compatibility(config, FAMILY)
        return
    with pytest.raises(CompatibilityError) as caught:
        check_compatibility(config, FAMILY)
    assert any(f"$.strategy: {name}" in problem for problem in caught.value.problems)
    assert "sequential, replay, joint" in caught.value.hint


def test_embeddings_are_refused(tmp_path: Path) -> None:
    config = load_config(RECIPE, [f"output_dir={tmp_path}", "strategy={name: replay, selection: herding}"]).config
    with pytest.raises(CompatibilityError, match="do not go together"):
        check_compatibility(config, FAMILY)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_only_full_tunes_counts(name: str) -> None:
    method = Peft(type="VERA") if name == "peft" else METHODS[name]()
    assert (method.supports(FAMILY) is None) == (name == "full")


# A whole run


def run(folder: Path, *overrides: str, **more: Any) -> Lineage:
    return train(load_config(RECIPE, [f"output_dir={folder}", *overrides]).config, **more)


def test_the_recipe_runs_and_its_stages_are_kept(tmp_path: Path) -> None:
    lineage = run(tmp_path / "a")
    record = lineage.record()
    assert [stage.name for stage in record.stages] == ["base", "letters", "sayings", "shelf"]
    assert record.stages[1].scores["letters"].value < 0.1 * record.stages[0].scores["letters"].value
    assert record.stages[3].scores["shelf"].metric == "accuracy"
    assert record.stages[3].scores["shelf"].value > record.stages[0].scores["shelf"].value
    pairs = record.stages[0].provenance["task_distances"]
    assert [pair["tasks"] for pair in pairs] == [["letters", "sayings"], ["letters", "shelf"], ["sayings", "shelf"]]
    assert all(stage.provenance["task_distances"] == [] for stage in record.stages[1:])
    loaded = load_stage(lineage)[0]
    assert answer(loaded, [Message("user", "Do you have a book on cooking rice?")], max_new_tokens=8)
    lineage.rollback(2)
    lineage = extend(tmp_path / "a", [TaskConfig(name="again", train=str(RECIPE.parent / "data/shelf.train.jsonl"))])
    assert [stage.name for stage in lineage.log()] == ["base", "letters", "sayings", "again"]
    new = lineage.load_stage(lineage.head).provenance["task_distances"]
    assert [pair["tasks"] for pair in new] == [["letters", "again"], ["sayings", "again"]]


def test_interrupted_it_goes_on_to_the_same_counts(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", "strategy={name: replay, ratio: 0.3}")

    def stop(info: StepInfo) -> None:
        if info.task == "sayings":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", "strategy={name: replay, ratio: 0.3}", observers=[stop])
    resumed = run(tmp_path / "b", "strategy={name: replay, ratio: 0.3}")
    assert same(load_stage(resumed)[0].model, load_stage(whole)[0].model)


def test_an_exported_stage_loads_in_transformers_and_as_arpa(tmp_path: Path) -> None:
    lineage = run(tmp_path / "a")
    assert export_stage(lineage, tmp_path / "to", merge=True) == 0.0
    ours = load_stage(lineage)[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    assert same(model, ours.model)
    assert model.generation_config.eos_token_id == list(ours.renderer.stop_ids)
    text = ours.renderer.text_ids("The baker sold two goats.")
    arpa, tokens = read_arpa(tmp_path / "to" / "model.arpa")
    assert tokens[ours.renderer.tokenizer.eos_token_id] == "</s>"
    [expected] = ours.family.loglikelihood(ours.model, ours.renderer.tokenizer, [([], text)])
    assert arpa.score(windows([text], arpa.order, begin=arpa.vocab_size)).sum() == pytest.approx(expected, rel=1e-6)


def test_probes_the_kl_and_a_budget_work(tmp_path: Path) -> None:
    settings = ["evaluation={max_probes: 11, max_texts: 3}"]
    lineage = run(tmp_path / "a", *settings)
    scores = lineage.load_stage(1).scores
    assert scores["kl"].value > 0
    assert scores["probes"].num == 11
    with pytest.raises(BudgetExceeded):
        run(tmp_path / "b", *settings, "budget={forgetting: 0.0}")
