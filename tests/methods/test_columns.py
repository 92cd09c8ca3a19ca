"""Columns: the first is the plain network, old ones are bit-identical, laterals are alive and of the paper's shape."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from retain.errors import CompatibilityError, LineageError
from retain.methods.columns import Columns
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.recurrent_columns import switches
from retain.models.recurrent_network import RecurrentConfig, RecurrentForCausalLM
from retain.parameters import trainable

IDS = torch.arange(5, 25).reshape(2, 10)


def build(cell: str = "lstm", *, num_layers: int = 2, seed: int = 0, **options: Any) -> RecurrentForCausalLM:
    torch.manual_seed(seed)
    config = RecurrentConfig(vocab_size=40, hidden_size=6, cell=cell, num_layers=num_layers, **options)
    return RecurrentForCausalLM(config).eval()


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **options).logits


def shake(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.5)


def train(model: nn.Module, *, steps: int = 4) -> None:
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05, weight_decay=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_first_column_is_the_plain_network(cell: str, tied: bool) -> None:
    plain, base = build(cell, tie_word_embeddings=tied), build(cell, tie_word_embeddings=tied)
    before = logits(plain.requires_grad_(False))  # torch's GRU differs in the last bit with what is frozen
    plain.requires_grad_(True)
    model = Columns(reads_base=False).apply(base)
    assert torch.equal(logits(model), before)
    assert sum(p.numel() for p in trainable(model).values()) == sum(p.numel() for p in plain.parameters())
    train(plain)
    train(model)
    assert torch.equal(logits(model), logits(plain.requires_grad_(False))), "trained alike"
    assert torch.equal(logits(Columns().activate(model, [])), before), "the base stays"


def test_a_column_that_reads_is_the_papers_equation() -> None:
    model = Columns().apply(build("rnn"))
    torch.testing.assert_close(logits(model), logits(build("rnn")))  # U is zero
    shake(model)
    embeddings, cells, heads = switches(model)
    base, own = cells.column("base"), cells.column("default")
    with torch.no_grad():
        first_base, _ = base.cells[0](embeddings.columns["base"](IDS))
        second_base, _ = base.cells[1](first_base)
        first, _ = own.cells[0](embeddings.columns["default"](IDS))  # no lateral into the first layer

        def z(i: int, hidden: torch.Tensor) -> torch.Tensor:
            lateral = own.laterals[i]
            return torch.relu((lateral.alpha[0] * hidden) @ lateral.project.weight.T + lateral.project.bias)

        second = dict(own.cells[1].named_parameters())
        drive = first @ second["weight_ih_l0"][:, :6].T + z(0, first_base) @ second["weight_ih_l0"][:, 6:].T
        state, outputs = torch.zeros(2, 6), []
        for t in range(10):
            recurrent = second["bias_ih_l0"] + second["bias_hh_l0"] + state @ second["weight_hh_l0"].T
            state = torch.tanh(drive[:, t] + recurrent)
            outputs.append(state)
        top = torch.stack(outputs, dim=1) + z(1, second_base) @ own.output.weight.T
        expected = top @ heads.columns["default"].weight.T
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("reads_base", [True, False])
def test_the_number_of_weights_is_the_closed_form(num_layers: int, reads_base: bool) -> None:
    method = Columns(reads_base=reads_base)
    model = method.apply(build("gru", num_layers=num_layers))
    width, vocab, gates = 6, 40, 3
    own = vocab * width + num_layers * (2 * gates * width * width + 2 * gates * width)
    for k, name in enumerate(["default", "2", "3"], start=int(reads_base)):
        if name != "default":
            method.extend(model, name)
        one = k + k * width * width + width  # alpha, V and its bias
        laterals = num_layers * one + (num_layers - 1) * gates * width * width + width * width  # and U
        assert sum(p.numel() for p in trainable(model).values()) == own + (laterals if k else 0)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_old_columns_are_bit_identical_after_any_training(cell: str) -> None:
    method = Columns()
    model = method.apply(build(cell, dropout=0.3))
    base = logits(method.activate(model, []))
    outputs: dict[str, torch.Tensor] = {}
    names: list[str] = []
    for name in ("default", "2", "3"):
        method.activate(model, names)
        if name != "default":
            method.extend(model, name)
        names.append(name)
        method.activate(model, names)
        old = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
        train(model)
        present = dict(model.named_parameters())
        assert all(torch.equal(present[key], value) for key, value in old.items())
        assert all(present[key].grad is None for key in old)
        outputs[name] = logits(method.activate(model, names))
        for k, earlier in enumerate(names):
            assert torch.equal(logits(method.activate(model, names[: k + 1])), outputs[earlier])
            assert torch.equal(logits(method.activate(model, [earlier])), outputs[earlier])
    assert torch.equal(logits(method.activate(model, [])), base)
    assert method.modules(model) == ["default", "2", "3"]


def test_laterals_are_alive() -> None:
    method = Columns()
    model = method.apply(build())
    shake(model)
    method.extend(model, "2")
    shake(model)
    before = logits(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    laterals = [n for n, p in trainable(model).items() if "laterals" in n or "output" in n]
    assert len(laterals) == 2 * 3 + 1  # alpha, V and its bias, twice; U of the output
    for name, parameter in model.named_parameters():
        alive = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert alive == (".2." in name), name
    cells = switches(model)[1]
    with torch.no_grad():
        cells.column("default").cells[0].weight_hh_l0.mul_(1.5)
    assert not torch.equal(logits(model), before), "column 2 reads column 1"
    with torch.no_grad():
        cells.column("base").cells[1].weight_hh_l0.mul_(1.5)
    assert not torch.equal(logits(method.activate(model, ["default"])), before)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_answers_token_by_token_and_over_padding(cell: str) -> None:
    method = Columns()
    model = method.apply(build(cell))
    shake(model)
    method.extend(model, "2")
    shake(model)
    whole = logits(model)
    with torch.no_grad():
        start = model(input_ids=IDS[:, :4], use_cache=True)
        rest = model(input_ids=IDS[:, 4:], past_key_values=start.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([start.logits, rest.logits], dim=1), whole)
        left = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
        padded = model(input_ids=left, attention_mask=(left > 0).long(), use_cache=True)
        torch.testing.assert_close(padded.logits[:, 3:], whole)
    greedy = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(greedy[:, 10], whole[:, -1].argmax(-1))


def test_random_columns_and_copies() -> None:
    model = Columns(start="random").apply(build())
    assert not torch.equal(logits(model), logits(build()))
    copied = deepcopy(model)
    shake(copied)
    assert not torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path: Path, tied: bool) -> None:
    method = Columns()
    model = method.apply(build(tie_word_embeddings=tied))
    train(model)
    method.extend(model, "2")
    train(model)
    both, one = logits(model), logits(method.activate(model, ["default"]))
    method.save(model, tmp_path)
    base = build(tie_word_embeddings=tied)
    state = torch.get_rng_state()
    again = method.load(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(again), both)
    assert torch.equal(logits(method.activate(again, ["default"])), one)
    assert trainable(again).keys() == {n for n, _ in model.named_parameters() if ".columns.base." not in n}
    with method.detached(again) as detached:
        assert torch.equal(logits(detached), logits(build(tie_word_embeddings=tied)))
    assert torch.equal(logits(again), one)
    with pytest.raises(LineageError, match="not of this model"):
        method.load(build(num_layers=1), tmp_path)


def test_in_half_precision_the_base_is_still_read() -> None:
    model = Columns().apply(build())
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    shake(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(logits(model)).all()
        assert torch.isfinite(logits(Columns().activate(model, []))).all()


def test_refusals(llama: nn.Module) -> None:
    assert Columns().supports(RecurrentFamily()) is None
    assert "adapter" in (Columns().supports(DecoderFamily()) or "")
    calls: list[Callable[[], Any]] = [
        lambda: Columns().apply(llama), lambda: Columns().merge(llama), lambda: Columns().weight_changes(llama),
        lambda: Columns().modules(llama),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(CompatibilityError):
            call()
    bare = build()
    assert Columns().activate(bare, []) is bare
