"""The parts of recurrent columns: layers that share their weights, widened copies, states that are joined and taken."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from retain.errors import CompatibilityError
from retain.models.recurrent_columns import ColumnCells, ColumnNetwork, layer_of, make_switches, switches, widened
from retain.models.recurrent_network import RecurrentConfig, RecurrentForCausalLM

KINDS = [nn.LSTM, nn.GRU, nn.RNN]


def deep(kind: type[nn.RNNBase]) -> nn.RNNBase:
    torch.manual_seed(0)
    return kind(5, 5, num_layers=3, batch_first=True).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_alone_is_the_deep_network(kind: type[nn.RNNBase]) -> None:
    rnn, x = deep(kind), torch.randn(4, 7, 5)
    cells = ColumnCells(rnn, 0.0)
    expected, state = rnn(x)
    read, end = cells(x)
    assert torch.equal(read, expected)
    assert all(map(torch.equal, end, state) if isinstance(end, tuple) else [torch.equal(end, state)])
    again, _ = cells(x, state)
    assert torch.equal(again, rnn(x, state)[0])
    lengths = torch.tensor([3, 7, 1, 5])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    ours, theirs = (pad_packed_sequence(network(packed)[0], batch_first=True)[0] for network in (cells, rnn))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_shares_its_weights(kind: type[nn.RNNBase]) -> None:
    rnn = deep(kind)
    cell = layer_of(rnn, 1)
    assert cell.weight_hh_l0 is rnn.weight_hh_l1
    hidden = torch.randn(2, 3, 5)
    before = cell(hidden)[0]
    with torch.no_grad():
        rnn.weight_hh_l1.mul_(2)
    assert not torch.equal(cell(hidden)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_widened_copy_ignores_what_is_new(kind: type[nn.RNNBase]) -> None:
    cell, hidden = layer_of(deep(kind), 0), torch.randn(2, 3, 5)
    copy = widened(cell, wider=True)
    torch.testing.assert_close(copy(torch.cat([hidden, torch.randn(2, 3, 5)], dim=-1))[0], cell(hidden)[0])
    torch.testing.assert_close(widened(cell, wider=False)(hidden)[0], cell(hidden)[0])
    assert copy.weight_hh_l0 is not cell.weight_hh_l0


def test_the_state_holds_every_column() -> None:
    cells = ColumnCells(deep(nn.LSTM), 0.0)
    layers = [widened(cell, bool(i)) for i, cell in enumerate(cells.column("base").cells)]
    cells.columns["2"] = ColumnNetwork(layers, ("base",))
    cells.running = ("base", "2")
    x = torch.randn(2, 6, 10)
    with torch.no_grad():
        whole, end = cells(x)
        first, state = cells(x[:, :4])
        rest, last = cells(x[:, 4:], state)
    assert [part.shape for part in state] == [(6, 2, 5)] * 2
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    torch.testing.assert_close(last, end)


def test_dropout_is_of_the_column_that_learns() -> None:
    cells = ColumnCells(deep(nn.GRU), 0.5)
    cells.train()
    x = torch.randn(2, 6, 5)
    assert torch.equal(cells(x)[0], cells(x)[0]), "the base is frozen"
    cells.columns["2"] = ColumnNetwork([widened(cell, wider=False) for cell in cells.column("base").cells], ())
    cells.running = ("2",)
    assert not torch.equal(cells(x)[0], cells(x)[0])
    cells.eval()
    assert torch.equal(cells(x)[0], cells(x)[0])


def test_a_model_keeps_its_surface() -> None:
    model = RecurrentForCausalLM(RecurrentConfig(vocab_size=20, hidden_size=4)).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        make_switches(model)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    embeddings, _, head = switches(model)
    assert model.get_input_embeddings() is embeddings
    assert model.get_output_embeddings() is head
    with pytest.raises(CompatibilityError, match="recurrent"):
        make_switches(nn.Linear(1, 1))
    with pytest.raises(CompatibilityError, match="no columns"):
        switches(nn.Linear(1, 1))
