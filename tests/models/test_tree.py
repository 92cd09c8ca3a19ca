"""A prefix read once gives the likelihoods of one row a pair."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from retain.models import tree
from retain.models.causal import likelihoods
from retain.models.tree import grow_trees, reads_trees, tree_likelihoods


def make_pairs() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 60, (length,), generator=generator).tolist()

    contexts = [ids(5), ids(12), ids(1)]
    contexts += [contexts[1][:6] + ids(4), contexts[1] + ids(2)]  # beginnings in common, and one within another
    return [(context, ids(1 + i % 4)) for context in contexts for i in range(5)]


def test_a_common_beginning_is_read_once() -> None:
    pairs = [([1, 2, 3], [4, 5]), ([1, 2], [3, 9]), ([1, 7], [4]), ([8], [1]), ([1, 2, 3], [4, 5])]
    (tree,) = grow_trees(pairs)
    assert sorted(tree.tokens) == [1, 1, 2, 3, 4, 4, 5, 7, 8, 9], "1 2 3 (4 5 | 9), 1 (2 | 7 4), 8 1"
    assert all([tree.tokens[n] for n in tree.paths[i]] == context + rest for i, (context, rest) in enumerate(pairs))
    sees, depths = tree.ancestry()
    for path in tree.paths.values():
        assert depths[path[-1]] == len(path) - 1
        assert np.flatnonzero(sees[path[-1]]).tolist() == sorted(path), "a node sees its ancestors and itself only"


def test_a_long_beginning_is_not_read_again_for_a_short_row() -> None:
    passage = list(range(600))
    choices = [(passage, [1000 + i, 2000]) for i in range(20)]
    assert [len(tree.tokens) for tree in grow_trees(choices)] == [600 + 20 * 2]
    others = [([7], [1000 + i] * 50) for i in range(20)]
    assert all(len(tree.tokens) <= 256 for tree in grow_trees(others)), "nothing worth sharing"


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("longest", [256, 30, 14])
def test_equals_one_row_a_pair(
    build_llama: Callable[..., torch.nn.Module], shape: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "LONGEST_ROW", longest)
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    model = build_llama() if shape == "llama" else gpt2
    pairs = make_pairs()
    assert reads_trees(model, pairs, pad_id=2)
    got = tree_likelihoods(model, pairs, grow_trees(pairs), pad_id=2, max_tokens=40)
    assert got == pytest.approx(likelihoods(model, pairs, pad_id=2), rel=1e-4)


def test_a_model_with_its_own_window_is_not_trusted(build_llama: Callable[..., torch.nn.Module]) -> None:
    model = build_llama()
    model.config.sliding_window = 8
    assert not reads_trees(model, make_pairs(), pad_id=2)
