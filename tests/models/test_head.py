"""The intercepted head against the model's own logits."""

from collections.abc import Callable

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from retain.errors import ModelError
from retain.models.head import check_head, contiguous_input, run_to_head

SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def gemma() -> torch.nn.Module:
    config = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)
    return Gemma2ForCausalLM(config)


def cohere() -> torch.nn.Module:
    return CohereForCausalLM(CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.25))


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64))


@pytest.mark.parametrize("make", [gemma, cohere, gpt2])
def test_logits_are_the_models_own(make: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    ids = torch.randint(0, 60, (3, 11))
    counted = torch.rand(3, 11) < 0.4
    outputs = run_to_head(model, {"input_ids": ids}, counted)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits[counted]
    assert outputs.hidden.shape == (int(counted.sum()), 32)
    torch.testing.assert_close(outputs.logits(), own, rtol=1e-6, atol=1e-9)
    check_head(model)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_full_logits(build_llama: Callable[..., torch.nn.Module], tied: bool) -> None:
    model = build_llama(tied=tied).double()
    ids = torch.randint(0, 300, (2, 9))
    counted = torch.zeros(2, 9, dtype=torch.bool)
    counted[0, 3:6] = counted[1, 7] = True
    model(input_ids=ids).logits[counted].logsumexp(-1).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    run_to_head(model, {"input_ids": ids}, counted).logits().logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-6, atol=1e-9)


def test_the_head_sees_counted_positions_only(llama: torch.nn.Module) -> None:
    rows: list[int] = []
    llama.lm_head.register_forward_hook(lambda _m, _a, out: rows.append(out.numel() // out.shape[-1]))
    counted = torch.zeros(2, 9, dtype=torch.bool)
    counted[:, 4] = True
    run_to_head(llama, {"input_ids": torch.ones(2, 9, dtype=torch.long)}, counted).logits()
    assert rows == [0, 2]


def test_an_unknown_scaling_is_refused() -> None:
    class Doubled(GPT2LMHeadModel):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Doubled(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    with pytest.raises(ModelError, match="unknown way"):
        check_head(model)


def test_the_head_reads_a_contiguous_copy_of_the_last_positions() -> None:
    torch.manual_seed(0)
    model = gpt2().eval()
    ids = torch.randint(0, 60, (3, 11))
    plain = model(ids, logits_to_keep=1).logits
    seen: list[bool] = []
    with contiguous_input(model):
        handle = model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, plain)
    model(ids, logits_to_keep=1)
    handle.remove()
    assert seen == [True, False]
