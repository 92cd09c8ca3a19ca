import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from retain.data.rendering import Renderer
from retain.errors import CompatibilityError, ModelError
from retain.models import recurrent
from retain.models.recurrent import RecurrentFamily
from retain.models.recurrent_network import CELLS
from retain.types import Example, Message, Task

ROWS = [
    Example(id="0", messages=(Message("user", "Thủ đô của Việt Nam là gì?"), Message("assistant", "Hà Nội"))),
    Example(id="1", messages=(Message("user", "And of France?"), Message("assistant", "Paris")), weight=0.5),
    Example(id="2", text="A cat sat on a mat, and a dog sat on a log."),
]

every_cell = pytest.mark.parametrize("cell", sorted(CELLS))


def small(cell: str = "lstm", **options: Any) -> RecurrentFamily:
    return RecurrentFamily(**{"cell": cell, "hidden_size": 32, "vocab_size": 300} | options)


def copy_rows(num: int, length: int, seed: int) -> list[Example]:
    """Say the letters again."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num):
        word = "".join("abcd"[i] for i in torch.randint(0, 4, (length,), generator=generator))
        rows.append(Example(id=str(row), messages=(Message("user", word), Message("assistant", word))))
    return rows


@pytest.mark.parametrize("tokenizer", ["bpe", "characters", "words"])
@every_cell
def test_a_created_model_comes_back_from_its_folder(cell: str, tokenizer: str, tmp_path: Path):
    family = small(cell, tokenizer=tokenizer, num_layers=2, dropout=0.1, tie_word_embeddings=False)
    model, made = family.create(ROWS, seed=3)
    assert len(made) == model.config.vocab_size <= 300
    assert (model.config.eos_token_id, model.config.pad_token_id) == (made.eos_token_id, made.pad_token_id)
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    again, tokenizer_again = RecurrentFamily().load(tmp_path)  # the folder knows its shape
    assert again.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    renderers = Renderer(made), Renderer(tokenizer_again)
    for row in ROWS:
        first, second = (family.encode(row, renderer) for renderer in renderers)
        assert first == second
        answer = row.answer if row.messages else row.text[1:]
        trained = [token for token in first.targets if token >= 0]
        assert answer in made.decode(trained)
        assert trained[-1] == made.eos_token_id


def test_creation_is_a_function_of_data_and_seed():
    state = torch.get_rng_state()
    first, second, other = (small().create(ROWS, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not torch.equal(first.embeddings.weight, other.embeddings.weight)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cell", "mlp"), ("tokenizer", "bytes"), ("hidden_size", 0), ("num_layers", 0), ("vocab_size", 257),
        ("dropout", 1.0),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(field: str, value: Any):
    with pytest.raises(ValueError, match=f"^{field}: expected .*, got {value!r}"):
        RecurrentFamily(**{field: value})


@every_cell
def test_the_loss_is_the_weighted_sum_over_targets(cell: str):
    family = small(cell)
    model, tokenizer = family.create(ROWS, seed=0)
    model = model.double()
    rows = [family.encode(row, Renderer(tokenizer)) for row in ROWS]
    batch = family.collate(rows, tokenizer, packed=False)
    expected = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(torch.tensor([row.inputs["input_ids"]])).logits[0]
        nats = F.cross_entropy(logits, torch.tensor(row.targets), reduction="none")
        expected = expected + (nats * torch.tensor(row.weights)).sum()
    loss = family.loss(family.forward(model, batch), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    together = model.rnn.weight_hh_l0.grad.clone()
    model.zero_grad()
    for row in rows:
        single = family.collate([row], tokenizer, packed=False)
        family.loss(family.forward(model, single), single).backward()
    torch.testing.assert_close(model.rnn.weight_hh_l0.grad, together, rtol=1e-6, atol=1e-9)


def test_outputs_are_the_models_own_logits():
    family = small()
    model, tokenizer = family.create(ROWS, seed=0)
    batch = family.collate([family.encode(row, Renderer(tokenizer)) for row in ROWS], tokenizer, packed=False)
    own = model(**batch.inputs).logits[batch.counted]
    torch.testing.assert_close(family.forward(model, batch).logits(), own)


def test_likelihoods_with_and_without_a_shared_context(monkeypatch: pytest.MonkeyPatch):
    family = small("gru")
    model, tokenizer = family.create(ROWS, seed=0)
    pairs = [([5, 6, 7], [8]), ([9], [10, 11]), ([5, 6, 7], [12, 13]), ([9], [14]), ([15, 16], [17])]
    shared: list[int] = []
    original = recurrent.state_likelihoods

    def watched(model: Any, given: Any, **options: Any) -> list[float]:
        shared.append(len(given))
        return original(model, given, **options)

    monkeypatch.setattr(recurrent, "state_likelihoods", watched)
    made = family.loglikelihood(model, tokenizer, pairs)
    assert shared == [2]
    for (context, rest), value in zip(pairs, made, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + rest])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(context) - 1 + i, token]) for i, token in enumerate(rest))
        assert value == pytest.approx(expected, rel=1e-5)


@every_cell
def test_it_learns_to_copy(cell: str):
    torch.manual_seed(0)
    family = small(cell, hidden_size=48, tokenizer="characters")
    rows = copy_rows(24, 3, seed=0)
    model, tokenizer = family.create(rows, seed=0)
    renderer = Renderer(tokenizer, template="plain")
    batch = family.collate([family.encode(row, renderer) for row in rows], tokenizer, packed=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(400):
        optimizer.zero_grad()
        loss = family.loss(family.forward(model, batch), batch) / len(batch.weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.02
    model.eval()
    prompts = [renderer.prompt_ids(row.prompt) for row in rows]
    answers = family.generate(model, tokenizer, prompts, max_new_tokens=8)
    assert [answer.strip() for answer in answers] == [row.answer for row in rows]
    assert family.generate(model, tokenizer, prompts[5:6], max_new_tokens=8) == answers[5:6]


def test_packing_is_refused():
    family = small()
    _, tokenizer = family.create(ROWS, seed=0)
    rows = [family.encode(row, Renderer(tokenizer)) for row in ROWS]
    assert not family.isolates_documents
    with pytest.raises(CompatibilityError, match="packed") as caught:
        family.collate(rows, tokenizer, packed=True)
    assert "train.packing" in caught.value.hint


def test_another_familys_folder_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="not a recurrent model") as caught:
        RecurrentFamily().load(tmp_path)
    assert "'llama'" in caught.value.problems[0]


def test_it_is_not_fitted_by_counting():
    family = small()
    model, tokenizer = family.create(ROWS, seed=0)
    with pytest.raises(CompatibilityError):
        family.fit(model, ROWS, Renderer(tokenizer))
    assert family.prepare(model, Renderer(tokenizer), Task("t", ()), seed=0) is model


def test_a_familys_fields_are_its_configuration():
    assert dataclasses.asdict(RecurrentFamily()).keys() == {
        "cell", "hidden_size", "num_layers", "vocab_size", "tokenizer", "dropout", "tie_word_embeddings",
    }  # fmt: skip
