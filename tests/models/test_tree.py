"""A context read once gives the likelihoods of one row a pair."""

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from retain.models import tree
from retain.models.causal import likelihoods
from retain.models.tree import reads_trees, tree_likelihoods


def make_pairs() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 60, (length,), generator=generator).tolist()

    contexts = [ids(5), ids(12), ids(1)]
    return [(context, ids(1 + i % 4)) for context in contexts for i in range(5)]


GROUPS = [list(range(5)), list(range(5, 10)), list(range(10, 15))]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("longest", [1024, 14])
def test_equals_one_row_a_pair(
    build_llama: Callable[..., torch.nn.Module], shape: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "LONGEST_ROW", longest)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    model = build_llama() if shape == "llama" else gpt2
    pairs = make_pairs()
    assert reads_trees(model, pairs, GROUPS[0], pad_id=2)
    got = tree_likelihoods(model, pairs, GROUPS, pad_id=2, max_tokens=40)
    assert [got[i] for i in range(15)] == pytest.approx(likelihoods(model, pairs, pad_id=2), rel=1e-4)


def test_a_model_with_its_own_window_is_not_trusted(build_llama: Callable[..., torch.nn.Module]) -> None:
    model = build_llama()
    model.config.sliding_window = 8
    assert not reads_trees(model, make_pairs(), GROUPS[1], pad_id=2)
