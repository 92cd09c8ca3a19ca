import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retain.models.backoff import windows
from retain.models.kneser_ney import tally
from retain.models.ngram_network import NGramConfig, NGramForCausalLM
from retain.parameters import copied, put_back

ROWS = [[1, 2, 3, 0], [1, 2, 4, 0], [5, 2, 3, 3, 0], [2, 0]]


@pytest.fixture
def model() -> NGramForCausalLM:
    made = NGramForCausalLM(NGramConfig(vocab_size=7, order=3, eos_token_id=0, pad_token_id=0)).eval()
    made.words.add(tally(windows(ROWS, 3, begin=7)))
    made.labels.learn(windows(ROWS, 3, begin=7), ["x", "y", "x", "ngã"], np.repeat([0, 1, 2, 3], [4, 4, 5, 2]))
    return made


def test_logits_are_the_counts_probabilities(model: NGramForCausalLM):
    logits = model(torch.tensor([[1, 2, 3]])).logits[0]
    grams = np.array([[7, 1, 2], [1, 2, 3], [2, 3, 0]])
    expected = model.words.model.score(grams)
    np.testing.assert_allclose(logits[[0, 1, 2], [2, 3, 0]], expected, rtol=1e-5)
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(3), atol=1e-6, rtol=0)


def test_padding_on_either_side_is_before_the_text(model: NGramForCausalLM):
    plain = model(torch.tensor([[1, 2]])).logits[0]
    left = model(torch.tensor([[0, 0, 1, 2]]), attention_mask=torch.tensor([[0, 0, 1, 1]])).logits[0]
    right = model(torch.tensor([[1, 2, 0, 0]]), attention_mask=torch.tensor([[1, 1, 0, 0]])).logits[0]
    assert torch.equal(left[2:], plain)
    assert torch.equal(right[:2], plain)
    assert torch.equal(model(torch.tensor([[1, 2]]), logits_to_keep=1).logits[0], plain[1:])


def test_loss_is_shifted_inside(model: NGramForCausalLM):
    ids = torch.tensor([[1, 2, 3, 0]])
    expected = -model.words.model.score(np.array([[7, 1, 2], [1, 2, 3], [2, 3, 0]])).mean()
    assert float(model(ids, labels=ids).loss) == pytest.approx(expected, rel=1e-5)


def test_packed_rows_are_refused(model: NGramForCausalLM):
    with pytest.raises(ValueError, match="packed"):
        model(torch.tensor([[1, 2]]), position_ids=torch.tensor([[0, 0]]))


def test_generate_takes_the_likeliest(model: NGramForCausalLM):
    made = model.generate(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2), max_new_tokens=3, do_sample=False)
    context, expected = [1, 2], []
    for _ in range(3):
        expected.append(int(model.words.model.distribution(np.array([context[-2:]])).argmax()))
        context.append(expected[-1])
        if expected[-1] == 0:
            break
    assert made[0, 2:].tolist() == expected


def test_save_and_load_are_equal(model: NGramForCausalLM, tmp_path: Path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, NGramForCausalLM)
    assert not again.training
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "retain-ngram"
    assert again.labels.classes == {"x": 0, "y": 1, "ngã": 2}
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, again(torch.tensor([[1, 2, 3]])).logits)


def test_nothing_is_trainable_and_counts_can_be_put_back(model: NGramForCausalLM):
    assert list(model.parameters()) == []
    before, logits = copied(model), model(torch.tensor([[1, 2]])).logits
    model.words.add(tally(windows([[6, 6, 6]], 3, begin=7)))
    assert not torch.equal(model(torch.tensor([[1, 2]])).logits, logits)
    put_back(model, before)
    assert torch.equal(model(torch.tensor([[1, 2]])).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in copied(model).items())


def test_classes(model: NGramForCausalLM):
    """The class is the nearest word of the context, and unknown classes are worded as all are together."""
    counts = model.labels
    assert counts.num_rows.tolist() == [2, 1, 1]
    assert counts.worded(np.array([[7, 1, 2]]), np.array([1])).tolist() == [[7, 1, 9, 2]]
    grams = windows([[5, 2]], 3, begin=7)
    x, y, unknown = (counts.model.score(counts.worded(grams, np.array([c, c]))).sum() for c in (0, 1, -1))
    assert x > y
    words = counts.model.levels[0].log_probs
    assert unknown == pytest.approx(words[5] + words[2])
    every = np.exp([counts.model.score(counts.worded(np.array([[7, 1, w]]), np.array([0]))) for w in range(7)])
    assert every.sum() == pytest.approx(1, abs=1e-9)
