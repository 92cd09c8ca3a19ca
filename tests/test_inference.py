from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from retain import distributed
from retain.config import load_config
from retain.errors import LineageError, ModelError
from retain.inference import answer, base_source, load_for_answering, load_renderer, load_stage, rows_to_score, score
from retain.lineage import Lineage
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.parameters import trainable
from retain.run import load_tasks, train
from retain.types import Message

Recipe = Callable[..., Path]
QUICK: dict[str, Any] = {"evaluation": {"probes": False, "kl": False}, "protect_base": "off"}


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def moving(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainable(model).values()])


def test_the_stages_of_a_lineage(write_recipe: Recipe, tiny_model: Path) -> None:
    lineage = train(load_config(write_recipe(**QUICK)).config)
    base, config = load_stage(lineage, 0)
    first, head = (load_stage(lineage, stage)[0] for stage in (1, None))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert torch.equal(weights(base.model), weights(plain))
    assert not torch.equal(weights(first.model), weights(plain))
    assert not torch.equal(weights(first.model), weights(head.model))
    assert torch.equal(weights(load_stage(lineage, 2)[0].model), weights(head.model))
    assert config.model.name == str(tiny_model)
    for target in (base, first, head):
        assert not target.model.training
    lineage.rollback(1)
    assert torch.equal(moving(load_for_answering(str(lineage.path)).model), moving(first.model))
    assert torch.equal(moving(load_for_answering(str(lineage.path), stage=2).model), moving(head.model))
    with pytest.raises(LineageError, match="9"):
        load_stage(lineage, 9)
    source = base_source(lineage, config)
    assert (source.name, source.folder) == (str(tiny_model), tiny_model)
    assert load_renderer(str(lineage.path))[1].tokenizer("a")["input_ids"] == head.renderer.tokenizer("a")["input_ids"]


@pytest.mark.parametrize(("precision", "frozen"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_what_answers_has_the_precision_that_it_was_scored_in(
    write_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, precision: str, frozen: torch.dtype
) -> None:
    monkeypatch.setattr(distributed, "resolve_precision", lambda name: precision)
    lineage = train(load_config(write_recipe(method={"name": "lora", "r": 2}, **QUICK)).config)
    target = load_for_answering(str(lineage.path))
    types = {parameter.requires_grad: parameter.dtype for parameter in target.model.parameters()}
    assert types == {False: frozen, True: torch.float32}
    again = score(target, load_tasks(load_stage(lineage)[1]), probes=False)
    recorded = lineage.load_stage(lineage.head).scores
    assert {name: found.value for name, found in again.scores.items()} == {
        name: recorded[name].value for name in again.scores
    }


def test_a_lineage_that_started_from_nothing(write_recipe: Recipe) -> None:
    model = {"family": "recurrent", "cell": "gru", "hidden_size": 16, "vocab_size": 300}
    lineage = train(load_config(write_recipe(model=model, **QUICK)).config)
    base, config = load_stage(lineage, 0)
    assert isinstance(base.family, RecurrentFamily)
    assert base_source(lineage, config).folder == lineage.stage_folder(0) / "model"
    family, renderer = load_renderer(str(lineage.path))
    assert isinstance(family, RecurrentFamily)
    assert len(renderer.tokenizer) == len(base.renderer.tokenizer)
    assert not torch.equal(weights(base.model), weights(load_stage(lineage)[0].model))


def test_any_model(tiny_model: Path, tmp_path: Path) -> None:
    target = load_for_answering(str(tiny_model))
    assert isinstance(target.family, DecoderFamily)
    assert target.model.generation_config.eos_token_id == list(target.renderer.stop_ids)
    assert torch.equal(weights(target.model), weights(AutoModelForCausalLM.from_pretrained(tiny_model)))
    assert isinstance(load_renderer(str(tiny_model))[0], DecoderFamily)
    with pytest.raises(ModelError, match="no config"):
        load_for_answering(str(tmp_path))


def test_a_stage_answers_as_the_run_scored_it(write_recipe: Recipe, tmp_path: Path) -> None:
    lineage = train(load_config(write_recipe(**QUICK)).config)
    file = tmp_path / "data" / "colour.test.jsonl"
    target, _ = load_stage(lineage, 1)
    evaluation = score(target, [rows_to_score(str(file))], probes=False)
    known = [given for given in lineage.load_stage(1).answers if given.suite == "colour"]
    assert list(evaluation.scores) == ["colour.test"]
    assert [given.id for given in evaluation.answers] == [given.id for given in known]
    assert evaluation.scores["colour.test"].value == lineage.load_stage(1).scores["colour"].value
    limited = score(target, [rows_to_score(str(file), limit=2, metric="exact_match")], probes=False)
    assert limited.scores["colour.test"].num == 2
    assert limited.scores["colour.test"].metric == "exact_match"
    said = [Message("user", "name 3")]
    assert answer(target, said, max_new_tokens=5) == answer(target, said, max_new_tokens=5)
    assert isinstance(answer(target, said, temperature=1.0, max_new_tokens=5), str)


def test_without_data_only_the_probes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retain.evaluation import evaluate as module
    from retain.evaluation.probes import balanced, load_probes

    few = balanced(load_probes(), 11, seed=0)
    monkeypatch.setattr(module, "load_probes", lambda: few)
    scores = score(load_for_answering(str(tiny_model)), []).scores
    assert "probes" in scores
    assert "kl" not in scores
    assert all(name == "probes" or name.startswith("probe:") for name in scores)


def test_a_lineage_without_stages(write_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retain import run

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "learn_base", stop)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(write_recipe(**QUICK)).config)
    with pytest.raises(LineageError):
        load_stage(Lineage.open(tmp_path / "out"))
