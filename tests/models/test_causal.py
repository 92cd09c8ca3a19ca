"""Likelihoods and answers against the plainest computation of each."""

import pytest
import torch

from retain.models.causal import generate_causal, likelihoods, within_budget
from retain.types import Sampling


def test_likelihood_is_the_sum_of_log_softmax(llama: torch.nn.Module) -> None:
    pairs = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13, 14]), ([15, 16], [17])]
    for (context, rest), value in zip(pairs, likelihoods(llama, pairs, pad_id=2, max_tokens=9), strict=True):
        with torch.no_grad():
            logits = llama(torch.tensor([context + rest])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(context) - 1 + i, token]) for i, token in enumerate(rest))
        assert value == pytest.approx(expected, rel=1e-5)


def test_groups_hold_every_index_once_and_keep_to_the_budget() -> None:
    lengths = [3, 50, 7, 7, 1, 20, 20]
    groups = list(within_budget(lengths, 40))
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= 40 for g in groups)


def test_greedy_answers_do_not_depend_on_their_neighbours(llama: torch.nn.Module, tokenizer: object) -> None:
    prompts = [[20, 21, 22], [30], [40, 41, 42, 43, 44, 45]]
    together = generate_causal(llama, tokenizer, prompts, max_new_tokens=6)
    alone = [generate_causal(llama, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    ids = prompts[0].copy()
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
    assert alone[0].startswith(tokenizer.decode(ids[3:6])[:3])


def test_sampling_is_a_function_of_the_seed_and_leaves_the_random_state(
    llama: torch.nn.Module, tokenizer: object
) -> None:
    def sample(seed: int) -> list[str]:
        return generate_causal(llama, tokenizer, [[20, 21]] * 4, max_new_tokens=8, sampling=Sampling(1.0, seed=seed))

    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(state, torch.get_rng_state())
    assert sample(1) == first
    assert sample(2) != first
    assert len(set(first)) > 1
