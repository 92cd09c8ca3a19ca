from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from retain.models.head import check_head
from retain.models.recurrent_network import CELLS, RecurrentConfig, RecurrentForCausalLM, RecurrentState

VOCABULARY, WIDTH, LAYERS = 40, 12, 2


def make(cell: str, *, tied: bool = True, dropout: float = 0.0, seed: int = 0) -> RecurrentForCausalLM:
    torch.manual_seed(seed)
    config = RecurrentConfig(
        vocab_size=VOCABULARY, cell=cell, hidden_size=WIDTH, num_layers=LAYERS, dropout=dropout,
        tie_word_embeddings=tied, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return RecurrentForCausalLM(config).eval()


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


every_cell = pytest.mark.parametrize("cell", sorted(CELLS))


def by_hand(model: RecurrentForCausalLM, ids: list[int]) -> Tensor:
    """The logits from the equations of the papers, one token at a time."""
    weights = model.state_dict()
    hidden = [torch.zeros(WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
    memory = [torch.zeros(WIDTH, dtype=torch.float64) for _ in range(LAYERS)]
    logits = []
    for token in ids:
        x = weights["embeddings.weight"][token]
        for layer in range(LAYERS):
            a = weights[f"rnn.weight_ih_l{layer}"] @ x + weights[f"rnn.bias_ih_l{layer}"]
            b = weights[f"rnn.weight_hh_l{layer}"] @ hidden[layer] + weights[f"rnn.bias_hh_l{layer}"]
            if model.config.cell == "rnn":
                hidden[layer] = torch.tanh(a + b)
            elif model.config.cell == "lstm":
                i, f, g, o = (a + b).chunk(4)
                memory[layer] = f.sigmoid() * memory[layer] + i.sigmoid() * g.tanh()
                hidden[layer] = o.sigmoid() * memory[layer].tanh()
            else:
                (ra, za, na), (rb, zb, nb) = a.chunk(3), b.chunk(3)
                z = (za + zb).sigmoid()
                hidden[layer] = (1 - z) * (na + (ra + rb).sigmoid() * nb).tanh() + z * hidden[layer]
            x = hidden[layer]
        logits.append(weights["lm_head.weight"] @ x)
    return torch.stack(logits)


@every_cell
def test_logits_are_those_of_the_equations(cell: str):
    model = make(cell, tied=False).double()
    ids = tokens(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0], by_hand(model, ids[0].tolist()), rtol=1e-12, atol=1e-12)


@every_cell
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_bit_for_bit(cell: str, tied: bool, tmp_path: Path):
    model = make(cell, tied=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is RecurrentForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    assert (again.config.cell, again.config.num_layers) == (cell, LAYERS)
    assert (again.lm_head.weight is again.embeddings.weight) is tied
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(again(tokens(2, 5)).logits, model(tokens(2, 5)).logits)


@every_cell
def test_the_head_can_be_intercepted(cell: str):
    check_head(make(cell))


@every_cell
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(cell: str, side: str):
    model = make(cell).double()
    rows = [tokens(1, length, seed=length) for length in (7, 3, 5)]
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    places = []
    for row, content in enumerate(rows):
        length = content.shape[1]
        places.append(slice(7 - length, 7) if side == "left" else slice(0, length))
        ids[row, places[row]] = content
        mask[row, places[row]] = 1
    for use_cache in (False, True):
        made = model(ids, attention_mask=mask, use_cache=use_cache)
        for row, content in enumerate(rows):
            alone = model(content, use_cache=True)
            torch.testing.assert_close(made.logits[row, places[row]], alone.logits[0], rtol=1e-12, atol=1e-12)
            if use_cache:
                for part, expected in zip(made.past_key_values.tensors, alone.past_key_values.tensors, strict=True):
                    torch.testing.assert_close(part[:, row], expected[:, 0], rtol=1e-12, atol=1e-12)


@every_cell
def test_padding_gets_no_gradient(cell: str):
    model = make(cell, tied=False)
    ids = torch.tensor([[5, 6, 0, 0], [0, 0, 7, 8]])
    mask = ids.ne(0).long()
    model(ids, attention_mask=mask).logits[mask.bool()].square().sum().backward()
    touched = model.embeddings.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == [5, 6, 7, 8]


@every_cell
def test_a_state_goes_on_where_it_was(cell: str):
    model, ids = make(cell).double(), tokens(2, 9)
    whole = model(ids).logits
    state = model(ids[:, :4], use_cache=True).past_key_values
    assert state.get_seq_length() == 4
    before = tuple(part.clone() for part in state.tensors)
    rest = model(ids[:, 4:], past_key_values=state).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, before, state.tensors))  # read, not written, without `use_cache`
    model(ids[:, 4:], past_key_values=state, use_cache=True)
    assert state.get_seq_length() == 9
    whole_state = model(ids, use_cache=True).past_key_values
    torch.testing.assert_close(state.tensors, whole_state.tensors, rtol=1e-12, atol=1e-12)


@every_cell
def test_generate_is_step_by_step_argmax(cell: str, monkeypatch: pytest.MonkeyPatch):
    model = make(cell)
    prompts = [tokens(1, 5, seed=3), tokens(1, 2, seed=4)]
    expected = []
    for prompt in prompts:
        ids = prompt
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected.append(ids[0, prompt.shape[1] :].tolist())
    ids = torch.zeros(2, 5, dtype=torch.long)
    ids[0], ids[1, 3:] = prompts[0], prompts[1]
    lengths: list[int] = []
    handle = model.embeddings.register_forward_hook(lambda _, given, made: lengths.append(given[0].shape[1]))
    made = model.generate(ids, attention_mask=ids.ne(0).long(), max_new_tokens=8, do_sample=False)
    handle.remove()
    assert made[:, 5:].tolist() == expected
    assert lengths == [5] + [1] * 7  # a new token costs one step


@every_cell
def test_beam_search_keeps_the_state_of_its_beams(cell: str):
    ids = tokens(4, 4)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "num_beams": 4, "do_sample": False}
    for seed in range(3):
        model = make(cell, tied=False, seed=seed)
        model.lm_head.weight.data *= 4
        assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_a_state_can_be_chosen_repeated_and_forgotten():
    parts = (torch.arange(6.0).reshape(1, 3, 2), torch.arange(6.0, 12.0).reshape(1, 3, 2))
    state = RecurrentState(parts, length=4)
    state.batch_select_indices(torch.tensor([2, 0]))
    assert [part[0, :, 0].tolist() for part in state.tensors] == [[4, 0], [10, 6]]
    state.batch_repeat_interleave(2)
    assert state.tensors[0][0, :, 0].tolist() == [4, 4, 0, 0]
    state.reset()
    assert (state.tensors, state.get_seq_length()) == (None, 0)
    with pytest.raises(NotImplementedError):
        state.crop(-1)


def test_labels_give_the_mean_loss():
    model, ids = make("gru"), tokens(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    logits = model(ids).logits
    picked = [(0, t) for t in (2, 3, 4)] + [(1, t) for t in range(5)]
    expected = torch.stack([F.cross_entropy(logits[row, t], ids[row, t + 1]) for row, t in picked]).mean()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_packed_positions_are_refused():
    with pytest.raises(ValueError, match="packed documents"):
        make("lstm")(tokens(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_an_unknown_cell_is_refused():
    with pytest.raises(ValueError, match="cell: expected one of gru, lstm, rnn, got 'mlp'"):
        RecurrentConfig(cell="mlp")


def test_an_lstm_begins_by_remembering():
    bias = make("lstm").rnn.bias_hh_l1.detach()
    assert torch.equal(bias[WIDTH : 2 * WIDTH], torch.ones(WIDTH))
    assert bias[:WIDTH].abs().max() <= WIDTH**-0.5


@every_cell
def test_dropout_acts_in_training_only(cell: str):
    model, ids = make(cell, dropout=0.5), tokens(2, 6)
    assert torch.equal(model(ids).logits, make(cell)(ids).logits)
    model.train()
    dropped: list[float] = []
    for place in (model.rnn, model.lm_head):
        place.register_forward_pre_hook(lambda _, given: dropped.append(given[0].eq(0).double().mean().item()))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert all(0.2 < share < 0.8 for share in dropped)
    assert (model.rnn.dropout, make(cell).rnn.dropout) == (0.5, 0.0)


def test_new_tokens_keep_the_head_tied():
    model, ids = make("lstm"), tokens(1, 4)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 5)
    assert model.lm_head.weight is model.embeddings.weight
    assert model.config.vocab_size == VOCABULARY + 5
    assert torch.equal(model(ids).logits[..., :VOCABULARY], before)


@every_cell
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_on_the_recurrent_weights(cell: str):
    """PEFT refuses the layer as a module and takes its matrices as parameters."""
    model, ids = make(cell), tokens(2, 6)
    base = model(ids).logits.detach()
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(make(cell), LoraConfig(r=2, target_modules=["rnn"], task_type="CAUSAL_LM"))
    targets = [f"rnn.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in range(LAYERS)]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets, task_type="CAUSAL_LM"))
    torch.testing.assert_close(tuned(input_ids=ids).logits, base)
    moving = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert len(moving) == 2 * len(targets)
    optimizer = torch.optim.SGD(moving, lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    changed = tuned(input_ids=ids).logits.detach()
    assert (changed - base).abs().max() > 1e-4
    torch.testing.assert_close(tuned.merge_and_unload()(ids).logits, changed, rtol=1e-4, atol=1e-5)
