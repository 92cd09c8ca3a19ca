"""Any tuner of PEFT's: named as PEFT names it, its options checked, the base untouched when detached."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from retain.config.fields import build
from retain.errors import ConfigError
from retain.methods.peft import UNFIT, Peft, types
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]

ADDED = [
    "ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "MISS", "RANDLORA",
    "ROAD", "SHIRA", "VBLORA", "VERA",
]  # fmt: skip
"""Types that are tried whole."""


OPTIONS = {
    "ADALORA": {"total_step": 10, "init_r": 4}, "C3A": {"block_size": 8}, "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 8}, "HRA": {"r": 4}, "MISS": {"r": 4}, "RANDLORA": {"r": 4}, "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 8, "num_vectors": 8, "topk": 2}, "VERA": {"r": 4},
}  # fmt: skip


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT's, about extensions and defaults of its own
@pytest.mark.parametrize("kind", ADDED)
def test_a_type_saves_loads_and_detaches(kind: str, build_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    method = Peft(kind, OPTIONS.get(kind, {}))
    before = logits(build_llama())
    model = method.apply(build_llama())
    for parameter in trainable(model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    changed = logits(model)
    assert not torch.equal(changed, before)
    method.save(model, tmp_path)
    assert torch.equal(logits(method.load(build_llama(), tmp_path)), changed)
    with method.detached(model):
        assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(method.merge(model)), changed, rtol=1e-3, atol=1e-4)


def test_options_are_the_types_own() -> None:
    with pytest.raises(ValueError, match="Did you mean `r`"):
        Peft("VERA", {"rr": 4})
    with pytest.raises(ValueError, match="no option `task_type`"):
        Peft("VERA", {"task_type": "CAUSAL_LM"})
    with pytest.raises(ValueError, match="VERA"):
        Peft("VERRA")
    with pytest.raises(ValueError, match="method: prompt"):
        Peft("PROMPT_TUNING")
    with pytest.raises(ValueError, match="options: "):
        Peft("BOFT", {"boft_block_size": 4, "boft_block_num": 4})
    assert not set(types()) & set(UNFIT)


def test_a_recipe_says_it(build_llama: Callable[..., nn.Module]) -> None:
    problems: list[str] = []
    method = build(Peft, {"type": "VERA", "options": {"r": 4}}, "$.method", problems)
    assert method == Peft("VERA", {"r": 4})
    assert build(Peft, {"type": "VERA", "options": {"ranks": 4}}, "$.method", problems) is None or problems
    assert "VERA has no option `ranks`" in problems[0]
    assert problems[0].startswith("$.method.options: ")


def test_what_would_train_nothing_is_refused(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="adapts nothing") as caught:
        Peft("LOHA", {"target_modules": ["query"]}).apply(llama)
    assert "q_proj" in str(caught.value)
