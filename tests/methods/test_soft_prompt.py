"""What soft prompts have in common: what they refuse, and how they are switched."""

import pytest
import torch
from torch import nn

from retain.errors import CompatibilityError
from retain.methods.p_tuning import Ptuning
from retain.methods.prefix import Prefix
from retain.methods.prompt import Prompt
from retain.methods.soft_prompt import SoftPrompt, peft_sizes
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily

METHODS = [Prompt(num_tokens=2), Prefix(num_tokens=2), Ptuning(num_tokens=2, hidden_size=4)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_switched_off_the_base_answers(llama: nn.Module, method: SoftPrompt) -> None:
    ids = torch.arange(5, 15)[None]
    before = llama(input_ids=ids).logits
    model = method.apply(llama)
    assert method.modules(model) == ["default"]
    assert torch.equal(method.activate(model, [])(input_ids=ids).logits, before)
    assert not torch.equal(method.activate(model, ["default"])(input_ids=ids).logits[:, -10:], before)
    with pytest.raises(CompatibilityError, match="merged"):
        method.merge(model)
    assert method.low_rank(model) == ()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_reads_virtual_tokens(method: SoftPrompt) -> None:
    assert method.supports(DecoderFamily()) is None
    assert method.supports(RecurrentFamily()) is not None
    assert not method.packs
    assert method.can_extend == (method.name == "prompt")


def test_sizes(llama: nn.Module) -> None:
    sizes = peft_sizes(llama)
    assert (sizes["num_layers"], sizes["num_attention_heads"], sizes["token_dim"]) == (2, 4, 32)
    assert sizes["task_type"] == "CAUSAL_LM"
