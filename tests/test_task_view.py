from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retain import distributed
from retain.data.packing import OverflowCounts
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError, DataError
from retain.methods.full import Full
from retain.models.decoder import DecoderFamily
from retain.task_view import BoundTask, overflow_notes
from retain.types import IGNORED, Example, Message, Sampling

ROWS = tuple(
    Example(id=str(i), messages=(Message("user", "name " * (i + 1)), Message("assistant", "red"))) for i in range(6)
)


def bound(tokenizer: Any, examples: Sequence[Example] = ROWS, **options: Any) -> BoundTask:
    settings: dict[str, Any] = {"max_length": 64, "max_tokens": 1000, "packed": True, "precision": "fp32"}
    return BoundTask(
        name="toy", examples=examples, family=DecoderFamily(), renderer=Renderer(tokenizer), method=Full(),
        **(settings | options),
    )  # fmt: skip


def test_encoding_is_the_renderers_and_made_once(tokenizer: Any) -> None:
    view = bound(tokenizer)
    ids, _ = view.renderer.encode(ROWS[0])
    assert view.encode(ROWS[0]).inputs["input_ids"] == ids
    replayed = replace(ROWS[0], source="replay")
    assert view.encode(replayed).inputs is view.encode(ROWS[0]).inputs
    assert view.encode(replayed).example is replayed
    doubled = view.encode(replace(ROWS[0], weight=2.0))
    assert sum(doubled.weights) == 2 * sum(view.encode(ROWS[0]).weights)


def test_rows_that_are_too_long_follow_the_setting(tokenizer: Any) -> None:
    lengths = [bound(tokenizer).encode(row).num_tokens for row in ROWS]
    limit = lengths[3]
    with pytest.raises(DataError, match=f"max_length={limit}"):
        bound(tokenizer, max_length=limit).rows(ROWS)
    kept, counts = bound(tokenizer, max_length=limit, on_overflow="drop").rows(ROWS)
    assert [row.example.id for row in kept] == ["0", "1", "2", "3"]
    assert (counts.dropped, counts.over_length) == (2, 2)
    kept, _ = bound(tokenizer, max_length=limit, overflow_threshold=0.5).rows(ROWS)
    assert len(kept) == 4


def test_rows_of_a_memory_are_cut_instead(tokenizer: Any) -> None:
    limit = bound(tokenizer).encode(ROWS[5]).num_tokens - 2
    replayed = replace(ROWS[5], id="old", source="replay")
    rows, counts = bound(tokenizer, max_length=limit).rows([replayed, *ROWS[:2]])
    assert [row.example.id for row in rows] == ["0", "1", "old"]
    assert rows[2].num_tokens == limit
    assert counts == OverflowCounts(kept=2)


def test_num_tokens_is_at_most_max_length(tokenizer: Any) -> None:
    view = bound(tokenizer)
    whole = view.encode(ROWS[5]).num_tokens
    assert view.num_tokens(ROWS[5]) == whole
    assert replace(view, max_length=whole - 3).num_tokens(ROWS[5]) == whole - 3


@pytest.mark.parametrize("packed", [True, False])
def test_batches_hold_every_row_in_order_within_the_budget(tokenizer: Any, packed: bool) -> None:
    view = bound(tokenizer, packed=packed)
    batches = list(view.batches(ROWS, max_tokens=50))
    assert len(batches) > 1
    assert [example.id for batch in batches for example in batch.examples] == [row.id for row in ROWS]
    assert all(batch.targets.numel() <= 50 for batch in batches)
    assert ("position_ids" in batches[0].inputs) == packed
    assert len(list(view.batches(ROWS))) == 1


def test_processes_share_the_rows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = bound(tokenizer)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found: list[list[str]] = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append([example.id for batch in view.batches(ROWS) for example in batch.examples])
    assert found == [["0", "2", "4"], ["1", "3", "5"]]


def test_the_mean_loss_is_nats_a_target(tokenizer: Any, llama: nn.Module) -> None:
    view = bound(tokenizer, max_tokens=40)
    total, count = 0.0, 0
    for example in ROWS:
        encoded = view.encode(example)
        with torch.no_grad():
            logits = llama(input_ids=torch.tensor([encoded.inputs["input_ids"]])).logits[0]
        targets = torch.tensor(encoded.targets)
        total += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
        count += encoded.num_targets
    llama.train()
    assert view.mean_loss(llama, ROWS) == pytest.approx(total / count, rel=1e-5)
    assert llama.training, "the mode is given back"
    assert view.mean_loss(llama, []) == 0.0


def test_the_precision_is_the_runs(tokenizer: Any, llama: nn.Module) -> None:
    full, half = bound(tokenizer), bound(tokenizer, precision="bf16")
    [batch] = full.batches(ROWS)
    one, two = (view.forward(llama, batch) for view in (full, half))
    assert one.hidden.dtype == torch.float32
    difference = (full.loss(one, batch) - half.loss(two, batch)).abs()
    assert 0 < difference < 0.05 * full.loss(one, batch)


def test_generate_answers_prompts_and_continues_texts(tokenizer: Any, llama: nn.Module) -> None:
    view, sampling = bound(tokenizer), Sampling(temperature=1.0, top_p=0.95, seed=3)
    text = Example(id="t", text="The lazy")
    llama.train()
    state = torch.get_rng_state()
    made = view.generate(llama, [ROWS[0], text], max_new_tokens=6, sampling=sampling)
    assert torch.equal(torch.get_rng_state(), state)
    assert llama.training
    llama.eval()
    ids = [view.renderer.prompt_ids(ROWS[0].prompt), view.renderer.text_ids("The lazy")]
    expected = view.family.generate(llama, tokenizer, ids, max_new_tokens=6, sampling=sampling)
    assert made == expected
    assert view.generate(llama, [ROWS[0], text], max_new_tokens=6, sampling=replace(sampling, seed=4)) != made


def test_what_became_of_rows_is_told() -> None:
    assert overflow_notes(OverflowCounts(kept=4)) == []
    notes = overflow_notes(OverflowCounts(dropped=3, truncated=2, untrained=1))
    assert [note.split()[0] for note in notes] == ["3", "2", "1"]
    assert "stop token" in notes[1]


@pytest.mark.parametrize("packed", [True, False])
def test_likelihoods_are_the_loss_of_each_row(tokenizer: Any, llama: nn.Module, packed: bool) -> None:
    view = bound(tokenizer, packed=packed)
    rows = [ROWS[3], ROWS[0], ROWS[3]]
    found = view.loglikelihood(llama, rows)
    for row, value in zip(rows, found, strict=True):
        [batch] = view.batches([row])
        assert value == pytest.approx(-view.loss(view.forward(llama, batch), batch).item(), rel=1e-5)


def test_an_embedding_is_the_mean_of_what_the_head_reads(tokenizer: Any, llama: nn.Module) -> None:
    view = bound(tokenizer)
    untrained = replace(ROWS[1], weight=0.0)
    found = view.embed(llama, [ROWS[0], untrained, ROWS[2]])
    for index in (0, 2):
        [batch] = view.batches([ROWS[index]])
        torch.testing.assert_close(found[index], view.forward(llama, batch).hidden.mean(dim=0))
    assert not found[1].any()


def test_a_helper_is_trained_by_the_loop_it_is_given(tokenizer: Any, llama: nn.Module) -> None:
    seen: list[Any] = []

    def learn(model: nn.Module, view: BoundTask) -> nn.Module:
        torch.rand(3)
        seen.append((model, view.examples))
        return model

    state = torch.get_rng_state()
    assert bound(tokenizer, learn=learn).fit(llama, ROWS[:2]) is llama
    assert seen == [(llama, ROWS[:2])]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(CompatibilityError, match="no loop"):
        bound(tokenizer).fit(llama, ROWS[:2])


def test_logits_are_in_the_runs_precision_whenever_they_are_asked_for(tokenizer: Any, llama: nn.Module) -> None:
    view = bound(tokenizer, precision="bf16")
    [batch] = view.batches(ROWS)
    outputs = view.forward(llama, batch)
    assert outputs.logits().dtype == torch.bfloat16
    outputs = view.forward(llama.bfloat16(), batch)
    assert replace(outputs, hidden=outputs.hidden.float()).logits().dtype == torch.bfloat16
