from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from retain.data.packing import OverflowCounts, fit_length, micro_batches, pack, pad, schedule, shifted, to_device
from retain.errors import DataError
from retain.types import IGNORED, Encoded, Example, Message

CHAT = (Message("user", "q"), Message("assistant", "a"))


def row(length: int, *, num_prompt: int = 1, text: str = "", start: int = 10) -> Encoded:
    """A row of `length` tokens whose tokens after the prompt are trained."""
    example = Example(str(length), () if text else CHAT, text)
    return shifted(example, range(start, start + length), [0.0] * num_prompt + [1.0] * (length - num_prompt))


def test_shifted():
    encoded = shifted(Example("a", CHAT, weight=0.5), [5, 6, 7, 8], [0.0, 0.0, 1.0, 0.5])
    assert encoded.inputs == {"input_ids": [5, 6, 7, 8]}
    assert encoded.targets == [IGNORED, 7, 8, IGNORED]
    assert encoded.weights == [0.0, 0.5, 0.25, 0.0]
    assert shifted(Example("a", CHAT, weight=0.0), [5, 6], [0.0, 1.0]).num_targets == 0


def test_pack():
    rows = [row(3), row(2, start=20), row(1, start=30)]
    batch = pack(rows)
    assert set(batch.inputs) == {"input_ids", "position_ids"}  # an attention mask would let documents see one another
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.targets.tolist() == [[11, 12, IGNORED, 21, IGNORED, IGNORED]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch.target_documents.tolist() == [0, 0, 1]
    assert batch.weights.tolist() == [1.0, 1.0, 1.0]
    assert batch.num_tokens == 6
    assert batch.examples == tuple(r.example for r in rows)


def test_pad():
    batch = pad([row(3), row(1, start=30), row(2, start=20)], pad_id=9)
    assert batch.inputs["input_ids"].tolist() == [[10, 11, 12], [30, 9, 9], [20, 21, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.targets.tolist() == [[11, 12, IGNORED], [IGNORED] * 3, [21, IGNORED, IGNORED]]
    assert batch.documents.tolist() == [[0, 0, 0], [1, -1, -1], [2, 2, -1]]
    assert batch.target_documents.tolist() == [0, 0, 2]
    assert batch.num_tokens == 6


def test_every_tensor_goes_to_the_device():
    batch = pad([row(3), row(2)], pad_id=9)
    moved = to_device(batch, torch.device("meta"))
    tensors = [*moved.inputs.values(), moved.targets, moved.documents, moved.weights]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.examples == batch.examples


def test_a_padding_token_equal_to_the_stop_token_does_not_touch_targets():
    batch = pad([shifted(Example("a", CHAT), [5, 2], [0.0, 1.0]), row(4)], pad_id=2)
    assert batch.targets[0].tolist() == [2, IGNORED, IGNORED, IGNORED]


def test_pad_of_targets_as_long_as_another_sequence():
    """What an encoder-decoder needs: the loss is read from the decoder's side."""
    inputs = {"input_ids": [5, 6, 7], "decoder_input_ids": [1]}
    rows = [
        Encoded(Example("a", CHAT), inputs, [8], [1.0]),
        Encoded(Example("b", CHAT), {**inputs, "decoder_input_ids": [1, 8]}, [8, 2], [1.0, 0.5]),
    ]
    batch = pad(rows, pad_id=0)
    assert batch.inputs["attention_mask"].shape == (2, 3)
    assert batch.inputs["decoder_input_ids"].tolist() == [[1, 0], [1, 8]]
    assert batch.documents.tolist() == [[0, -1], [1, 1]]
    assert batch.weights.tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_one_another(build_llama: Callable[..., LlamaForCausalLM], attention: str):
    model = build_llama(attn_implementation=attention).double()
    second = row(7, start=40)
    batches = [pack([row(5, start=start), second]) for start in (10, 200)]
    packed = [model(**batch.inputs, use_cache=False).logits[0, 5:] for batch in batches]
    alone = model(**pad([second], pad_id=2).inputs, use_cache=False).logits[0]
    torch.testing.assert_close(packed[0], packed[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[0], alone, rtol=0, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 30), max_size=40),
    max_tokens=st.integers(1, 60),
    packed=st.booleans(),
)
def test_micro_batches(lengths: list[int], max_tokens: int, packed: bool):
    rows = [row(length) for length in lengths]
    runs = micro_batches(rows, max_tokens=max_tokens, packed=packed)
    assert [encoded for run in runs for encoded in run] == rows
    for run in runs:
        sizes = [encoded.num_tokens for encoded in run]
        cost = sum(sizes) if packed else max(sizes) * len(sizes)
        assert cost <= max_tokens or len(run) == 1
    for run, following in pairwise(runs):  # as full as the order allows
        sizes = [encoded.num_tokens for encoded in [*run, following[0]]]
        assert (sum(sizes) if packed else max(sizes) * len(sizes)) > max_tokens


@given(
    lengths=st.lists(st.integers(1, 30), max_size=200),
    rows_per_step=st.integers(1, 9),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    grouped=st.booleans(),
)
def test_schedule(lengths: list[int], rows_per_step: int, seed: int, epoch: int, grouped: bool):
    options = {"rows_per_step": rows_per_step, "seed": seed, "epoch": epoch, "lengths": lengths if grouped else None}
    steps = schedule(len(lengths), **options)
    assert steps == schedule(len(lengths), **options)
    assert sorted(place for step in steps for place in step) == list(range(len(lengths)))
    assert len(steps) == -(-len(lengths) // rows_per_step)
    assert sum(len(step) < rows_per_step for step in steps) <= 1


def test_schedule_depends_on_seed_and_epoch():
    plans = [schedule(50, rows_per_step=4, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for k, a in enumerate(plans) for b in plans[:k])


def test_every_row_comes_first_equally_often():
    """Chi-square over 2,000 seeds, 10 rows, 9 degrees of freedom: below 27.9 with 99.9 %."""
    counts = [0] * 10
    for seed in range(2000):
        counts[schedule(10, rows_per_step=2, seed=seed, epoch=0)[0][0]] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 27.9


def test_grouping_by_length_saves_padding():
    lengths = [1 + (7 * k) % 61 for k in range(256)]

    def padding(given: list[int] | None) -> float:
        steps = schedule(len(lengths), rows_per_step=8, seed=0, epoch=0, lengths=given)
        return sum(max(lengths[k] for k in step) * len(step) for step in steps) / sum(lengths)

    assert padding(None) > 1.6
    assert padding(lengths) < 1.15
    steps = schedule(len(lengths), rows_per_step=8, seed=0, epoch=0, lengths=lengths)
    longest = [max(lengths[k] for k in step) for step in steps[:16]]
    assert longest != sorted(longest)  # a window's steps do not go from short to long


def test_rows_that_fit_are_kept_as_they_are():
    rows = [row(3), row(4)]
    for on_overflow in ("error", "drop", "truncate", "split"):
        assert fit_length(rows, max_length=4, on_overflow=on_overflow) == (rows, OverflowCounts(kept=2))


def test_error_above_the_threshold_else_dropped():
    rows = [row(3), row(4), row(9), row(4)]
    with pytest.raises(DataError) as caught:
        fit_length(rows, max_length=4)
    assert "1 of 4 rows (25.0%) are longer than max_length=4; none may be" in str(caught.value)
    assert "9 tokens" in str(caught.value)
    assert "drop, truncate or split" in str(caught.value)
    with pytest.raises(DataError, match=r"at most 24.0% may be"):
        fit_length(rows, max_length=4, threshold=0.24)
    kept, counts = fit_length(rows, max_length=4, threshold=0.25)
    assert kept == [rows[0], rows[1], rows[3]]
    assert counts == OverflowCounts(kept=3, over_length=1, dropped=1)


def test_drop():
    rows = [row(3), row(9)]
    assert fit_length(rows, max_length=4, on_overflow="drop") == (rows[:1], OverflowCounts(1, 1, dropped=1))


def test_truncate_keeps_the_start_and_drops_rows_without_a_target():
    rows = [row(9, num_prompt=2), row(9, num_prompt=6), row(3)]
    kept, counts = fit_length(rows, max_length=4, on_overflow="truncate")
    assert kept[0].inputs["input_ids"] == [10, 11, 12, 13]
    assert kept[0].targets == [IGNORED, 12, 13, 14]  # the cut token is still predicted
    assert kept[0].weights == [0.0, 1.0, 1.0, 1.0]
    assert kept[0].num_truncated == 5
    assert kept[1:] == rows[2:]
    assert counts == OverflowCounts(kept=2, over_length=2, truncated=2, untrained=1, tokens_cut=10)


def test_split_loses_no_target():
    long = row(10, text="t")
    kept, counts = fit_length([long, row(3)], max_length=4, on_overflow="split")
    pieces = kept[:-1]
    assert [piece.num_tokens for piece in pieces] == [4, 4, 2]
    assert [token for piece in pieces for token in piece.inputs["input_ids"]] == long.inputs["input_ids"]
    assert [target for piece in pieces for target in piece.targets] == long.targets
    assert all(piece.example == long.example for piece in pieces)
    assert counts == OverflowCounts(kept=4, over_length=1, split=1)


def test_split_refuses_conversations():
    with pytest.raises(DataError, match="1 conversations are longer than max_length=4 and cannot be split"):
        fit_length([row(9), row(9, text="t")], max_length=4, on_overflow="split")


def test_rows_without_a_target_are_counted():
    rows = [row(3, num_prompt=3), row(3)]
    assert fit_length(rows, max_length=4) == (rows[1:], OverflowCounts(kept=1, untrained=1))
    assert fit_length([], max_length=4) == ([], OverflowCounts())


def test_an_unknown_choice_is_refused():
    with pytest.raises(DataError, match="error, drop, truncate, split"):
        fit_length([row(3)], max_length=4, on_overflow="cut")  # type: ignore[arg-type]
