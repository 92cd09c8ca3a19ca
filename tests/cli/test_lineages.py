import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from retain.inference import load_stage
from retain.lineage import Lineage

Retain = Callable[..., Any]


def test_log(retain: Retain, lineage: Path) -> None:
    result = retain("log", lineage)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[1].split()[:2] == ["stage", "name"]
    assert [line.split()[:3] for line in lines[2:]] == [["0", "base", lines[2].split()[2]], *(
        [["1", "colour", lines[3].split()[2]], ["head", "2", "animal"]]
    )]  # fmt: skip
    assert max(map(len, lines[1:])) <= 80


def test_log_as_json(retain: Retain, lineage: Path) -> None:
    Lineage.open(lineage).rollback(1)
    log = json.loads(retain("log", lineage, "--json").out)
    assert log["head"] == 1
    assert [(stage["name"], stage["on_line"]) for stage in log["stages"]] == [
        ("base", True),
        ("colour", True),
        ("animal", False),
    ]


def test_rolling_back_and_forward(retain: Retain, lineage: Path) -> None:
    assert f"`retain rollforward {lineage} 2`" in retain("rollback", lineage, 1).out
    assert Lineage.open(lineage).head == 1
    assert [line.split()[0] for line in retain("log", lineage).out.splitlines()[2:]] == ["0", "head", "off"]
    retain("rollback", lineage, 2).refused("off the line")
    assert retain("rollforward", lineage, 2).out == "head is stage 2\n"
    assert Lineage.open(lineage).head == 2


def test_a_stage_that_is_not_there(retain: Retain, lineage: Path) -> None:
    retain("rollback", lineage, 9).refused("9")
    assert retain("rollback", lineage, "first").code == 2


def test_branch_and_prune(retain: Retain, lineage: Path, tmp_path: Path) -> None:
    assert retain("branch", lineage, 1, tmp_path / "other").out == f"{tmp_path / 'other'}: head is stage 1\n"
    assert [stage.name for stage in Lineage.open(tmp_path / "other").log()] == ["base", "colour"]
    retain("rollback", lineage, 1)
    assert retain("prune", lineage).out.endswith("MiB freed\n")
    assert [stage.index for stage in Lineage.open(lineage).stages] == [0, 1]


def test_discard(retain: Retain, lineage: Path) -> None:
    assert retain("discard", lineage).out == "no stage is in progress\n"
    Lineage.open(lineage).begin("third")
    assert "in progress: 0003-third" in retain("log", lineage).out
    assert retain("discard", lineage).out == "discarded 0003-third\n"
    assert Lineage.open(lineage).partial() is None


def test_fsck(retain: Retain, lineage: Path) -> None:
    assert retain("fsck", lineage).out == f"{lineage} is sound\n"
    (lineage / "stages" / "0001-colour" / "scores.json").write_text("{}", encoding="utf-8")
    result = retain("fsck", lineage)
    assert result.code == 2
    assert result.err.startswith(f"error: {lineage} has 1 problem\n  ")
    assert "scores.json" in result.err


def test_no_lineage(retain: Retain, tmp_path: Path) -> None:
    for command in (["log"], ["fsck"], ["prune"], ["discard"], ["rollback", 1]):
        retain(command[0], tmp_path, *command[1:]).refused("is not a lineage", "retain train")


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_export_loads_with_peft(retain: Retain, lineage: Path, tiny_model: Path, tmp_path: Path) -> None:
    to = tmp_path / "adapter"
    assert retain("export", lineage, to).out == f"{to}: loads with `peft`\n"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), to).eval()
    ours = load_stage(Lineage.open(lineage))[0]
    tokenizer = AutoTokenizer.from_pretrained(to)
    ids = torch.tensor([tokenizer("animal 3")["input_ids"]])
    assert torch.equal(logits(model, ids), logits(ours.model, ids))
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert not torch.allclose(logits(base, ids), logits(ours.model, ids))
    messages = [{"role": "user", "content": "animal 3"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "animal 3" in rendered
    retain("export", lineage, to).refused("is not empty")


def test_export_merged_loads_with_transformers(retain: Retain, lineage: Path, tmp_path: Path) -> None:
    to = tmp_path / "plain"
    assert retain("export", lineage, to, "--merge", "--stage", 1).out == f"{to}: loads with `transformers`\n"
    model = AutoModelForCausalLM.from_pretrained(to).eval()
    ours = load_stage(Lineage.open(lineage), 1)[0]
    ids = torch.tensor([ours.renderer.text_ids("colour 3")])
    torch.testing.assert_close(logits(model, ids), logits(ours.model, ids), rtol=1e-4, atol=1e-5)
    assert model.generation_config.eos_token_id == list(ours.renderer.stop_ids)
