"""Many sequences in one row as a tree: a prefix that several share, a system prompt or a question, is read once.

A token sees its ancestors and itself, and its position is its depth, so the likelihood of a continuation is that of its
plain row (context + continuation), while all that sequences begin with alike costs one pass instead of one a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from retain.kernels.cross_entropy import target_nats
from retain.models.causal import likelihoods, within_budget
from retain.models.family import pretrained
from retain.models.head import run_to_head

__all__ = ["Tree", "grow_trees", "reads_trees", "tree_likelihoods"]

Pairs = Sequence[tuple[list[int], list[int]]]
"""Token ids of context, one or more, and continuation."""

LONGEST_ROW = 256
"""Tokens of one tree: attention grows with their square."""

WORTH_OF_SHARING = 4
"""Tokens that a tree may have beyond that for every token that its next sequence would share: reading a long beginning
once more costs more than attention over a longer row."""


@dataclass
class Tree:
    """Sequences merged where they begin alike.

    Args:
        tokens: the token of every node; a parent comes before its children.
        parents: each node's parent; -1 for a root.
        paths: by index of the pair, the nodes of its sequence.
    """

    tokens: list[int] = field(default_factory=list[int])
    parents: list[int] = field(default_factory=list[int])
    paths: dict[int, list[int]] = field(default_factory=dict[int, list[int]])

    def common(self, ids: Sequence[int]) -> list[int]:
        """The nodes of the longest beginning that `ids` share with the sequence that was added last."""
        last = next(reversed(self.paths.values()), [])
        length = 0
        while length < min(len(last), len(ids)) and self.tokens[last[length]] == ids[length]:
            length += 1
        return last[:length]

    def add(self, index: int, ids: Sequence[int]) -> None:
        """Grow by a sequence. In sorted order the one before shares the longest beginning of all."""
        path = self.common(ids)
        for token in ids[len(path) :]:
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.tokens))
            self.tokens.append(token)
        self.paths[index] = path

    def ancestry(self) -> tuple[np.ndarray, np.ndarray]:
        """Which nodes each node sees, (nodes, nodes), and each node's depth, (nodes,)."""
        sees = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees, sees.sum(axis=1) - 1


def grow_trees(pairs: Pairs) -> list[Tree]:
    """All pairs, in trees of about `LONGEST_ROW` tokens, or more where a longer beginning is shared."""
    sequences = [context + rest for context, rest in pairs]
    trees = [Tree()]
    for index in sorted(range(len(pairs)), key=lambda i: sequences[i]):
        ids, tree = sequences[index], trees[-1]
        shared = len(tree.common(ids))
        if tree.tokens and len(tree.tokens) + len(ids) - shared > LONGEST_ROW + WORTH_OF_SHARING * shared:
            tree = Tree()
            trees.append(tree)
        tree.add(index, ids)
    return trees


def reads_trees(model: nn.Module, pairs: Pairs, *, pad_id: int) -> bool:
    """Does the model honour a tree's mask? Answered on a small tree, against one row a pair.

    A sliding window, or positions that the model makes itself, would change the answer without a word.

    Args:
        model: in evaluation mode.
        pairs: two or more.
        pad_id: fills rows on the right.
    """
    settings = pretrained(model).config.get_text_config()
    window = settings.to_dict().get("sliding_window")
    kind = settings._attn_implementation  # pyright: ignore[reportPrivateUsage]  it has no public name
    if kind != "sdpa" or (window and max(len(a) + len(b) for a, b in pairs) >= window):
        return False
    small = [(pairs[0][0][-16:], rest[:8]) for _, rest in pairs[:2]]
    plain = likelihoods(model, small, pad_id=pad_id)
    branched = tree_likelihoods(model, small, grow_trees(small), pad_id=pad_id)
    return all(abs(one - other) <= 0.02 * (1 + abs(one)) for one, other in zip(plain, branched, strict=True))


def tree_likelihoods(
    model: nn.Module, pairs: Pairs, trees: Sequence[Tree], *, pad_id: int, max_tokens: int = 4096
) -> list[float]:
    """log p(continuation | context) of every pair, nats.

    Args:
        model: a causal transformer in evaluation mode whose attention takes a (rows, 1, query, key) mask.
        pairs: token ids of context and continuation.
        trees: the pairs, as `grow_trees` put them together.
        pad_id: fills the rows on the right.
        max_tokens: padded tokens of one pass.
    """
    result = [0.0] * len(pairs)
    for group in within_budget([len(tree.tokens) for tree in trees], max_tokens):
        for index, value in one_pass(model, pairs, [trees[i] for i in group], pad_id):
            result[index] -= value
    return result


@torch.no_grad()
def one_pass(model: nn.Module, pairs: Pairs, trees: Sequence[Tree], pad_id: int) -> list[tuple[int, float]]:
    """The nats of every token of a continuation, with its pair's index, of one padded batch of trees."""
    device = next(model.parameters()).device
    longest = max(len(tree.tokens) for tree in trees)
    ids = torch.full((len(trees), longest), pad_id)
    positions = torch.zeros(len(trees), longest, dtype=torch.long)
    sees = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1)  # (trees, query, key)
    sources: list[tuple[int, int]] = []  # the output that predicts each target: tree and node
    targets: list[int] = []
    owners: list[int] = []
    for row, tree in enumerate(trees):
        seen, depths = tree.ancestry()
        size = len(depths)
        ids[row, :size] = torch.tensor(tree.tokens)
        positions[row, :size] = torch.from_numpy(depths)
        sees[row, :size, :size] = torch.from_numpy(seen)
        for index, path in tree.paths.items():
            context, rest = pairs[index]
            sources += [(row, node) for node in path[len(context) - 1 : -1]]
            targets += rest
            owners += [index] * len(rest)
    rows, places = torch.tensor(sources, device=device).T
    counted = torch.zeros(len(trees), longest, dtype=torch.bool, device=device)
    counted[rows, places] = True
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": sees[:, None]}
    outputs = run_to_head(model, {name: value.to(device) for name, value in inputs.items()}, counted)
    compact = (counted.flatten().cumsum(0) - 1).view_as(counted)  # the row of `hidden` of each counted output
    nats = target_nats(outputs.hidden[compact[rows, places]], torch.tensor(targets, device=device), outputs.head)
    return list(zip(owners, nats.tolist(), strict=True))
