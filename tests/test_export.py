import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from retain.config import load_config
from retain.errors import LineageError
from retain.export import export_stage
from retain.inference import load_stage
from retain.lineage import Lineage
from retain.methods.lora import LoRA
from retain.run import train

Recipe = Callable[..., Path]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def trained(recipe: Path) -> Lineage:
    return train(load_config(recipe, ["train.num_train_epochs=1", "protect_base=off"]).config)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def quick() -> dict[str, Any]:
    return {"evaluation": {"probes": False, "kl": False}}


def test_a_full_stage_loads_in_transformers(write_recipe: Recipe, tmp_path: Path, quick: dict[str, Any]) -> None:
    lineage = trained(write_recipe(**quick))
    assert export_stage(lineage, tmp_path / "to") == 0.0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to").eval()
    ours = load_stage(lineage)[0]
    assert torch.equal(logits(model), logits(ours.model))
    assert model.generation_config.eos_token_id == list(ours.renderer.stop_ids)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "to")
    assert tokenizer.chat_template == ours.renderer.chat_template
    facts = json.loads((tmp_path / "to" / "retain.json").read_text(encoding="utf-8"))
    assert facts == {"lineage": "out", "stage": 2, "merge_difference": 0.0}


def test_the_notice_of_the_base_goes_along(
    write_recipe: Recipe, tmp_path: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = trained(write_recipe(**quick))
    target, config = load_stage(lineage)
    for name, notice in (("with", "Subject to terms."), ("without", "")):
        monkeypatch.setattr("retain.export.load_stage", lambda *_, n=notice: (replace(target, notice=n), config))
        export_stage(lineage, tmp_path / name)
    assert (tmp_path / "with" / "NOTICE").read_text(encoding="utf-8") == "Subject to terms.\n"
    assert not (tmp_path / "without" / "NOTICE").exists()


def test_an_adapter_its_merge_and_the_base(
    write_recipe: Recipe, tiny_model: Path, tmp_path: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = trained(write_recipe(method={"name": "lora", "r": 4}, **quick))
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    before, ours = logits(base), logits(load_stage(lineage, 1)[0].model)

    export_stage(lineage, tmp_path / "base", stage=0)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()), before)

    export_stage(lineage, tmp_path / "adapter", stage=1)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), ours)
    assert not torch.allclose(before, ours)

    difference = export_stage(lineage, tmp_path / "merged", stage=1, merge=True)
    assert 0 <= difference < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), ours, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(LineageError, match="is not empty"):
        export_stage(lineage, tmp_path / "taken")

    monkeypatch.setattr(LoRA, "merge", lambda self, model: model.unload())  # a merge that forgets the adapter
    with pytest.raises(LineageError, match="answers otherwise") as caught:
        export_stage(lineage, tmp_path / "wrong", stage=1, merge=True)
    assert "--merge" in caught.value.hint
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    "method",
    [
        {"name": "ia3"},
        {"name": "oft", "block_size": 8},
        {"name": "lora", "r": 2, "use_dora": True},
        {"name": "lora", "r": 2, "init": "pissa"},
        {"name": "peft", "type": "VERA", "options": {"r": 4}},
        {"name": "prompt", "num_tokens": 3},
        {"name": "prefix", "num_tokens": 3},
        {"name": "p_tuning", "num_tokens": 3, "hidden_size": 8},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values() if isinstance(value, str)),
)
def test_what_peft_has_loads_in_peft(
    write_recipe: Recipe, tiny_model: Path, tmp_path: Path, quick: dict[str, Any], method: dict[str, Any]
) -> None:
    lineage = trained(write_recipe(method=method, **quick))
    export_stage(lineage, tmp_path / "to")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "to").eval()
    length = IDS.shape[1]
    ours = logits(load_stage(lineage)[0].model)[:, -length:]
    torch.testing.assert_close(logits(theirs)[:, -length:], ours, rtol=1e-5, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert not torch.equal(ours, logits(base))
