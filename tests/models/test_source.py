import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from retain.errors import ModelError
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.seq2seq import Seq2SeqFamily
from retain.models.source import Source, family_of, open_source
from retain.types import Example

ROWS = [Example(id=str(i), text=f"the fox jumps over dog {i}") for i in range(5)]


def copied(tiny_model: Path, to: Path, **changed: Any) -> Path:
    shutil.copytree(tiny_model, to)
    config = json.loads((to / "config.json").read_text(encoding="utf-8")) | changed
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


def test_a_folder_becomes_a_source_and_then_a_model(tiny_model: Path) -> None:
    source = open_source(str(tiny_model))
    assert isinstance(source.family, DecoderFamily)
    assert (source.name, source.folder) == (str(tiny_model), tiny_model)
    assert source.hash.startswith("sha256:")
    model, tokenizer = source.load((), seed=0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not model.training
    assert tokenizer("a")["input_ids"]


def test_the_hash_is_of_config_and_weights(tiny_model: Path, tmp_path: Path) -> None:
    same = copied(tiny_model, tmp_path / "same", transformers_version="0")
    other = copied(tiny_model, tmp_path / "other", rms_norm_eps=0.1)
    assert open_source(str(same)).hash == open_source(str(tiny_model)).hash
    assert open_source(str(other)).hash != open_source(str(tiny_model)).hash


def test_a_recurrent_folder_is_recognised(tmp_path: Path) -> None:
    family = RecurrentFamily(cell="gru", hidden_size=8, vocab_size=300)
    model, tokenizer = family.create(ROWS, seed=1)
    model.save_pretrained(tmp_path / "r")
    tokenizer.save_pretrained(tmp_path / "r")
    source = open_source(str(tmp_path / "r"))
    assert isinstance(source.family, RecurrentFamily)
    again, _ = source.load((), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("architectures", "family"),
    [
        (["T5ForConditionalGeneration"], Seq2SeqFamily), (["BartForConditionalGeneration"], Seq2SeqFamily),
        (["MarianMTModel"], Seq2SeqFamily), (["Gemma3ForConditionalGeneration"], None), (["T5EncoderModel"], None),
        (["BartForCausalLM"], DecoderFamily), (["GPT2LMHeadModel"], DecoderFamily), ([], None),
    ],
)  # fmt: skip
def test_the_family_is_read_from_the_architecture(architectures: list[str], family: type | None) -> None:
    """What encodes only, or reads pictures beside text, is no encoder-decoder language model."""
    assert family_of({"model_type": "t5", "is_encoder_decoder": True, "architectures": architectures}) is family


def test_a_model_from_nothing(tmp_path: Path) -> None:
    family = RecurrentFamily(cell="lstm", hidden_size=8, vocab_size=300)
    source = open_source("", family)
    assert source == Source(family, "lstm", None)
    assert source.hash == ""
    one, two, three = (source.load(ROWS, seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True))
    one.save_pretrained(tmp_path / "kept")
    source.load(ROWS, seed=1)[1].save_pretrained(tmp_path / "kept")
    kept = open_source("", family, folder=tmp_path / "kept")
    again = kept.load((), seed=9)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("family", [None, DecoderFamily()])
def test_a_model_without_a_name_needs_an_architecture(family: Any) -> None:
    with pytest.raises(ModelError, match="neither a name is given") as caught:
        open_source("", family)
    assert "architecture" in caught.value.hint


def test_a_decoder_starts_from_nothing() -> None:
    family = DecoderFamily(architecture="gpt2", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    source = open_source("", family)
    assert (source.name, source.folder, source.hash) == ("gpt2", None, "")
    assert source.load(ROWS, seed=1)[0].config.model_type == "gpt2"


def test_a_model_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    encoder = copied(tiny_model, tmp_path / "encoder", architectures=["BertForMaskedLM"])
    with pytest.raises(ModelError, match="BertForMaskedLM") as caught:
        open_source(str(encoder))
    assert "family: decoder" in caught.value.hint
    assert open_source(str(encoder), DecoderFamily()).folder == encoder, "unless the user knows better"
    silent = copied(tiny_model, tmp_path / "silent", architectures=None)
    with pytest.raises(ModelError, match="not said"):
        open_source(str(silent))


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_causal_architectures_are_taken(tiny_model: Path, tmp_path: Path, architecture: str) -> None:
    folder = copied(tiny_model, tmp_path / "m", architectures=[architecture])
    assert isinstance(open_source(str(folder)).family, DecoderFamily)


def test_code_of_a_model_runs_only_on_demand(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    loading: Callable[..., Any] = DecoderFamily.load

    def load(self: DecoderFamily, folder: Path, **options: Any) -> Any:
        asked.append(options)
        return loading(self, folder, **options)

    monkeypatch.setattr(DecoderFamily, "load", load)
    open_source(str(tiny_model)).load((), seed=0)
    open_source(str(tiny_model), trust_remote_code=True).load((), seed=0)
    assert asked == [{}, {"trust_remote_code": True}]
