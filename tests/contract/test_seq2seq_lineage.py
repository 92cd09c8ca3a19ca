"""Encoder-decoder models through the whole of it: recipe, stages, interruption, answers, export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from retain import distributed
from retain.config import load_config
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.experiment import Experiment
from retain.export import export_stage
from retain.inference import answer, load_for_answering, load_stage, score
from retain.lineage import Lineage
from retain.models.seq2seq import Seq2SeqFamily
from retain.models.source import open_source
from retain.run import train
from retain.storage.state import load_state
from retain.strategies import Strategy
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import train_task
from retain.types import Example, Message, StepInfo

Recipe = Callable[..., Path]
ROOT = Path(__file__).parent.parent.parent
SAID = "the quick brown fox jumps over a lazy dog while two green birds sing and one red boat sails far away"
TEXTS = [Example(str(i), text=" ".join([*SAID.split()[i % 7 :], *SAID.split()[: i % 11]])) for i in range(24)]


def pretrained(kind: str, folder: Path) -> Path:
    """A small model that has learned to fill in hidden parts of a few texts, as a plain `transformers` folder."""
    family = Seq2SeqFamily(architecture=kind, d_model=32, num_layers=2, num_heads=4, vocab_size=480)
    model, tokenizer = family.create(TEXTS, seed=0)
    view = BoundTask(
        name="texts", examples=TEXTS, family=family, renderer=Renderer(tokenizer), method=load_full(), max_length=64,
        max_tokens=2000, packed=False, precision="fp32",
    )  # fmt: skip
    before = view.mean_loss(model, TEXTS)
    train_task(model, view, strategy=Strategy(), config=TrainConfig(learning_rate=5e-3, max_steps=60, precision="fp32"))
    assert view.mean_loss(model, TEXTS) < 0.5 * before
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


def load_full() -> Any:
    from retain.methods.full import Full

    return Full()


@pytest.fixture(scope="module", params=["t5", "bart"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(request.param, tmp_path_factory.mktemp("models") / request.param)


def test_a_denoiser_is_protected_by_what_it_fills_in(
    base: Path, write_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defaults: the model's own texts, probes and KL; LoRA, saved as PEFT loads it and merged as `transformers`."""
    views: list[Any] = []
    view = Experiment.view
    monkeypatch.setattr(Experiment, "view", lambda *given: views.append(given[1:]) or view(*given))
    recipe = write_recipe(
        model=str(base), method={"name": "lora", "r": 4}, strategy=[{"name": "replay"}, {"name": "ewc"}]
    )
    lineage = train(load_config(recipe).config)
    [texts] = [examples for name, examples in views if name == "base" and examples]
    assert all(row.text and not row.messages for row in texts)  # it brings no chat template, so it answers no requests
    assert any(len(row.text.split()) > 3 for row in texts)
    first, _, last = lineage.record().stages
    assert first.scores["kl"].value == 0 < last.scores["kl"].value
    assert {"colour", "animal", "probes", "kl"} <= last.scores.keys()

    target = load_stage(lineage)[0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer("name 3")["input_ids"]])
    for merge in (False, True):
        to = tmp_path / f"export-{merge}"
        assert export_stage(lineage, to, merge=merge) < 1e-3
        plain: Any = AutoModelForSeq2SeqLM.from_pretrained(to if merge else base)
        plain = plain if merge else PeftModel.from_pretrained(plain, to)
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=ids, decoder_input_ids=ids).logits for model in (target.model, plain.eval())
            )
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        assert AutoTokenizer.from_pretrained(to).chat_template == target.renderer.chat_template
    asked = (Message("user", "name 3"),)
    monkeypatch.setattr(distributed, "resolve_precision", lambda name: "fp32")  # in bf16 the frozen weights are rounded
    assert answer(load_for_answering(str(lineage.path)), asked) == answer(target, asked)
    tasks = [task for task in load_tasks(recipe) if task.name == "colour"]
    assert score(target, tasks, probes=False).scores["colour"].value == pytest.approx(last.scores["colour"].value)


def load_tasks(recipe: Path) -> list[Any]:
    from retain.run import load_tasks

    return load_tasks(load_config(recipe).config)


def test_texts_that_are_hidden_anew_go_on_where_they_stopped(base: Path, write_recipe: Recipe, tmp_path: Path) -> None:
    """Continued pre-training, interrupted in its second epoch: the weights are those of the run that was not."""
    rows = "".join(f'{{"text": "{row.text}"}}\n' for row in TEXTS)
    (tmp_path / "texts.jsonl").write_text(rows, encoding="utf-8")
    entry = {"name": "texts", "train": str(tmp_path / "texts.jsonl"), "metric": "perplexity", "test_fraction": 0.2}
    sections = {
        "model": str(base), "tasks": [entry], "strategy": {"name": "replay"},
        "evaluation": {"probes": False, "kl": False},
    }  # fmt: skip

    def stop(info: StepInfo) -> None:
        if info.step == 4:
            raise KeyboardInterrupt

    config = {"learning_rate": 1e-2, "num_train_epochs": 3, "max_length": 64, "precision": "fp32", "save_steps": 1}
    whole = train(load_config(write_recipe(**sections, train=config)).config)
    cut = load_config(write_recipe("cut.yaml", **sections, train=config, output_dir=str(tmp_path / "cut"))).config
    with pytest.raises(KeyboardInterrupt):
        train(cut, observers=[stop])
    again = train(cut)
    weights = [load_stage(lineage)[0].model.state_dict() for lineage in (whole, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    losses = [info.loss for info in whole.load_stage(1).history]
    assert losses == [info.loss for info in again.load_stage(1).history]


def test_all_answers_of_a_conversation_are_learned_and_replayed(
    base: Path, write_recipe: Recipe, tmp_path: Path
) -> None:
    """One step holds the whole task, so its targets are the tokens of all answers, each with its EOS."""
    roles = ["user", "assistant"] * 3
    contents = [["a fox", "red", "and", "blue birds", "more", "one boat"], ["a dog", "lazy", "and", "far away"]]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in zip(roles, said, strict=False)]}
        for said in contents
    ]
    tasks: list[dict[str, Any]] = []
    for name, part in (("one", rows), ("two", rows[1:])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        tasks.append({"name": name, "train": str(file), "test": str(file)})
    quiet = {"protect_base": "off", "evaluation": {"probes": False, "kl": False}}
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "max_length": 64, "precision": "fp32"}
    recipe = write_recipe(
        **quiet, model=str(base), tasks=tasks, train=settings, strategy={"name": "replay", "ratio": 0.5}
    )
    lineage = train(load_config(recipe).config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    sizes = [[len(tokenizer(text_target=said)["input_ids"]) for said in talk[1::2]] for talk in contents]
    [step] = lineage.load_stage(1).history
    assert step.num_targets == sum(map(sum, sizes))
    memory = load_state(lineage.stage_folder(1) / "memory")
    [kept] = [value for value in memory.values() if isinstance(value, list) and len(value) == 5]
    assert len({row.id for row in kept}) == 5
    assert sorted(row.answer for row in kept) == sorted(said for talk in contents for said in talk[1::2])


def test_the_model_is_known_by_its_config(base: Path, tmp_path: Path) -> None:
    source = open_source(str(base))
    assert source.family == Seq2SeqFamily()
    assert source.load((), seed=0)[0].get_parameter("lm_head.weight").dtype == torch.float32


def test_packing_is_refused_and_checkpointing_is_not(base: Path, write_recipe: Recipe) -> None:
    settings = {"max_steps": 2, "max_length": 64, "precision": "fp32"}
    quiet = {"model": str(base), "protect_base": "off", "evaluation": {"probes": False, "kl": False}}
    with pytest.raises(CompatibilityError, match="do not go together"):
        train(load_config(write_recipe(**quiet, train={**settings, "packing": "always"})).config)
    losses: list[list[float]] = []
    for checkpointing in (False, True):
        recipe = write_recipe(
            **quiet, train={**settings, "gradient_checkpointing": checkpointing},
            output_dir=str(write_recipe().parent / f"out-{checkpointing}"),
        )  # fmt: skip
        lineage: Lineage = train(load_config(recipe).config)
        losses.append([info.loss for info in lineage.load_stage(1).history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_the_recipe_learns_both_of_its_tasks(tmp_path: Path) -> None:
    config = load_config(ROOT / "recipes" / "seq2seq.yaml", [f"output_dir={tmp_path / 'out'}"]).config
    base, _, last = train(config).record().stages
    assert last.scores["clock"].value > base.scores["clock"].value + 0.2
    assert last.scores["letters"].value < 0.5 * base.scores["letters"].value


def test_the_recipe_runs(tmp_path: Path) -> None:
    options = [f"output_dir={tmp_path / 'out'}", "train.num_train_epochs=1"]
    lineage = train(load_config(ROOT / "recipes" / "seq2seq.yaml", options).config)
    assert [stage.name for stage in lineage.log()] == ["base", "letters", "clock"]
    assert load_for_answering(str(lineage.path)).family.name == "seq2seq"
    assert answer(load_for_answering(str(lineage.path)), (Message("user", "noon"),)) is not None
