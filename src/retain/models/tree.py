"""Many continuations of one context in one row: the context is read once, as the trunk of a tree.

A branch sees the trunk and itself, and its positions go on from the trunk's end, so its likelihood is that of the
plain row (context + continuation) while the context costs one pass instead of one a continuation.
"""

from collections.abc import Sequence

import torch
from torch import nn

from retain.kernels.cross_entropy import target_nats
from retain.models.causal import likelihoods, within_budget
from retain.models.family import pretrained
from retain.models.head import run_to_head

__all__ = ["reads_trees", "tree_likelihoods"]

Pairs = Sequence[tuple[list[int], list[int]]]
"""Token ids of context and continuation."""

LONGEST_ROW = 1024
"""Tokens of one tree: attention grows with their square."""


def reads_trees(model: nn.Module, pairs: Pairs, members: Sequence[int], *, pad_id: int) -> bool:
    """Does the model honour a tree's mask? Answered on a small tree, against one row a pair.

    A sliding window, or positions that the model makes itself, would change the answer without a word.
    """
    settings = pretrained(model).config.get_text_config()
    window = settings.to_dict().get("sliding_window")
    kind = settings._attn_implementation  # pyright: ignore[reportPrivateUsage]  it has no public name
    if kind != "sdpa" or (window and max(len(a) + len(b) for a, b in pairs) >= window):
        return False
    small = [(pairs[i][0][-16:], pairs[i][1][:8]) for i in members[:2]]
    tree = tree_likelihoods(model, small, [[0, 1]], pad_id=pad_id)
    rows = likelihoods(model, small, pad_id=pad_id)
    return all(abs(tree[i] - value) <= 0.02 * (1 + abs(value)) for i, value in enumerate(rows))


def tree_likelihoods(
    model: nn.Module, pairs: Pairs, groups: Sequence[Sequence[int]], *, pad_id: int, max_tokens: int = 4096
) -> dict[int, float]:
    """log p(continuation | context) in nats by index into `pairs`.

    Args:
        model: a causal transformer in evaluation mode whose attention takes a (rows, 1, query, key) mask.
        pairs: token ids of context and continuation.
        groups: indices that share a context; a group over `LONGEST_ROW` becomes several trees.
        pad_id: fills the rows on the right.
        max_tokens: padded tokens of one pass.
    """
    trees: list[list[int]] = []
    for members in groups:
        trunk = len(pairs[members[0]][0])
        tree, length = list[int](), trunk
        for i in members:
            if tree and length + len(pairs[i][1]) > LONGEST_ROW:
                trees.append(tree)
                tree, length = [], trunk
            tree.append(i)
            length += len(pairs[i][1])
        trees.append(tree)
    lengths = [len(pairs[tree[0]][0]) + sum(len(pairs[i][1]) for i in tree) for tree in trees]
    result: dict[int, float] = {}
    for group in within_budget(lengths, max_tokens):
        result |= one_pass(model, pairs, [trees[i] for i in group], pad_id)
    return result


@torch.no_grad()
def one_pass(model: nn.Module, pairs: Pairs, trees: Sequence[Sequence[int]], pad_id: int) -> dict[int, float]:
    """The likelihoods of one padded batch of trees."""
    device = next(model.parameters()).device
    longest = max(len(pairs[tree[0]][0]) + sum(len(pairs[i][1]) for i in tree) for tree in trees)
    ids = torch.full((len(trees), longest), pad_id)
    positions = torch.zeros(len(trees), longest, dtype=torch.long)
    sees = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1)  # (trees, query, key)
    sources: list[tuple[int, int]] = []  # the output that predicts each target: tree and position
    targets: list[int] = []
    owners: list[int] = []
    for row, tree in enumerate(trees):
        context = pairs[tree[0]][0]
        trunk = end = len(context)
        ids[row, :trunk] = torch.tensor(context)
        positions[row, :trunk] = torch.arange(trunk)
        sees[row, :trunk, :trunk] = torch.ones(trunk, trunk, dtype=torch.bool).tril()
        for i in tree:
            start, branch = end, pairs[i][1]
            end = start + len(branch)
            ids[row, start:end] = torch.tensor(branch)
            positions[row, start:end] = torch.arange(trunk, trunk + len(branch))
            sees[row, start:end, :trunk] = True
            sees[row, start:end, start:end] = torch.ones(len(branch), len(branch), dtype=torch.bool).tril()
            sources += [(row, trunk - 1), *((row, position) for position in range(start, end - 1))]
            targets += branch
            owners += [i] * len(branch)
    rows, places = torch.tensor(sources, device=device).T
    counted = torch.zeros(len(trees), longest, dtype=torch.bool, device=device)
    counted[rows, places] = True
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": sees[:, None]}
    outputs = run_to_head(model, {name: value.to(device) for name, value in inputs.items()}, counted)
    compact = (counted.flatten().cumsum(0) - 1).view_as(counted)  # the row of `hidden` of each counted output
    nats = target_nats(outputs.hidden[compact[rows, places]], torch.tensor(targets, device=device), outputs.head)
    result = dict.fromkeys(owners, 0.0)
    for owner, value in zip(owners, nats.tolist(), strict=True):
        result[owner] -= value
    return result
