import pytest
import torch

from retain.models.causal import likelihoods
from retain.models.recurrent_likelihood import state_likelihoods
from retain.models.recurrent_network import CELLS, RecurrentConfig, RecurrentForCausalLM

PAIRS = [
    ([5, 6, 7], [8, 9]),
    ([5, 6, 7], [10]),
    ([11, 12, 13, 14, 15], [16, 17, 18]),
    ([11, 12, 13, 14, 15], [5]),
    ([5, 6], [8, 9]),
    ([5, 6, 8], [9, 9, 9, 9]),
]


@pytest.mark.parametrize("cell", sorted(CELLS))
@pytest.mark.parametrize("max_tokens", [6, 1000])
def test_as_the_whole_row_gives(cell: str, max_tokens: int):
    torch.manual_seed(0)
    model = RecurrentForCausalLM(RecurrentConfig(vocab_size=20, cell=cell, hidden_size=8, num_layers=2)).double().eval()
    made = state_likelihoods(model, PAIRS, pad_id=0, max_tokens=max_tokens)
    assert made == pytest.approx(likelihoods(model, PAIRS, pad_id=0), rel=1e-10)
    for (context, rest), value in zip(PAIRS, made, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + rest])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(context) - 1 + i, token]) for i, token in enumerate(rest))
        assert value == pytest.approx(expected, rel=1e-10)


def test_a_shared_context_is_read_once():
    model = RecurrentForCausalLM(RecurrentConfig(vocab_size=20, hidden_size=8)).eval()
    read: list[int] = []
    model.embeddings.register_forward_hook(lambda _, given, made: read.append(given[0].numel()))
    state_likelihoods(model, [(list(range(1, 11)), [token]) for token in range(5)], pad_id=0)
    assert read == [9, 5 * 2]
