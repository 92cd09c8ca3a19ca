"""Full fine-tuning: everything moves, and what is saved is a plain model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from retain.errors import CompatibilityError
from retain.methods.full import Full
from retain.models.decoder import DecoderFamily
from retain.models.ngram import NGramFamily
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_answers_the_same_here_and_in_transformers(
    build_llama: Callable[..., torch.nn.Module], tmp_path: Path, tied: bool
) -> None:
    method = Full()
    model = method.apply(build_llama(seed=1, tied=tied))
    assert len(trainable(model)) == len(list(model.parameters()))
    method.save(model, tmp_path)
    again = method.load(build_llama(seed=2, tied=tied), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert torch.equal(again(input_ids=IDS).logits, expected)
        assert torch.equal(plain(input_ids=IDS).logits, expected)
    assert method.merge(model) is model


def test_there_is_no_base_to_go_back_to(llama: torch.nn.Module) -> None:
    with pytest.raises(CompatibilityError, match="overwrites"), Full().detached(llama):
        pass
    with pytest.raises(CompatibilityError):
        Full().weight_changes(llama)
    assert Full().supports(DecoderFamily()) is None
    assert Full().supports(NGramFamily()) is None


def test_no_module_can_be_put_beside_the_base(llama: torch.nn.Module) -> None:
    assert Full().modules(llama) == []
    with pytest.raises(CompatibilityError, match="beside"):
        Full().extend(llama, "2")
    with pytest.raises(CompatibilityError, match="beside"):
        Full().activate(llama, [])
