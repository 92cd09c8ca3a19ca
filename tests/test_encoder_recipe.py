"""The encoder's recipe, end to end: classes that come later, a lineage that is read back, and a plain export."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from retain.config import load_config
from retain.export import export_stage
from retain.inference import answer, load_stage
from retain.lineage import Lineage
from retain.run import train
from retain.types import Message

RECIPE = Path(__file__).parent.parent / "recipes" / "encoder-classifier.yaml"


def learned(folder: Path, *overrides: str) -> Lineage:
    return train(load_config(RECIPE, [f"output_dir={folder}", *overrides]).config)


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prompt", "prefix", "p_tuning"])
def test_classes_come_later_and_the_export_is_plain(tmp_path: Path, method: str) -> None:
    lineage = learned(tmp_path / "out", f"method.name={method}", "train.max_steps=3")
    assert [stage.name for stage in lineage.log()] == ["base", "help", "bill"]
    scores = [lineage.load_stage(stage.index).scores["bill"] for stage in lineage.log()]
    assert [score.chance for score in scores] == [pytest.approx(chance) for chance in (1 / 2, 1 / 5, 1 / 5)]
    assert any("probes" in note for note in lineage.load_stage(0).provenance["notes"])
    target, _ = load_stage(lineage)
    assert list(target.renderer.labels.ids) == ["broken", "delivery", "refund", "invoice", "price"]
    assert answer(target, [Message("user", "how much is the lamp")]) in target.renderer.labels.ids
    if method == "full":
        export_stage(lineage, tmp_path / "export")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
        inputs = AutoTokenizer.from_pretrained(tmp_path / "export")("how much is the lamp", return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(plain(**inputs).logits, target.model(**inputs).logits)
        assert plain.config.id2label[4] == "price"


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    lineage = learned(tmp_path / "out")
    scores = lineage.load_stage(2).scores
    assert scores["help"].value > 0.4
    assert scores["bill"].value > 0.5
