import numpy as np
import pytest

from retain.models.backoff import BackoffModel, Level, windows

LOG = np.log


@pytest.fixture
def model() -> BackoffModel:
    """Tokens a = 0, b = 1; the beginning is 2. Stored: a, b, `<s> a`, `a b`."""
    words = Level(np.arange(3), np.array([LOG(0.6), LOG(0.4), -np.inf]), LOG(np.array([0.5, 1.0, 0.25])))
    pairs = Level(np.array([0 * 3 + 1, 2 * 3 + 0]), LOG(np.array([0.7, 0.9])), np.zeros(2))
    return BackoffModel(2, (words, pairs))


def test_stored_or_backed_off(model: BackoffModel):
    grams = np.array([[0, 1], [0, 0], [1, 0], [2, 0], [2, 1]])
    expected = [0.7, 0.5 * 0.6, 1.0 * 0.6, 0.9, 0.25 * 0.4]
    np.testing.assert_allclose(np.exp(model.score(grams)), expected, rtol=1e-12)


def test_the_distribution_is_the_score_of_every_token(model: BackoffModel):
    contexts = np.array([[0], [1], [2]])
    whole = model.distribution(contexts)
    for row, context in enumerate(contexts):
        grams = np.array([[*context, 0], [*context, 1]])
        np.testing.assert_allclose(whole[row], model.score(grams), rtol=1e-12)


def test_only_as_far_back_as_the_order(model: BackoffModel):
    assert model.order == 2
    np.testing.assert_array_equal(model.score(np.array([[1, 1, 0, 1]])), model.score(np.array([[0, 1]])))
    np.testing.assert_array_equal(model.distribution(np.array([[1, 0]])), model.distribution(np.array([[0]])))


def test_windows_begin_every_row_anew():
    made = windows([[5, 6, 7], [], [8]], 3, begin=9)
    assert made.tolist() == [[9, 9, 5], [9, 5, 6], [5, 6, 7], [9, 9, 8]]
    assert windows([[5, 6]], 1, begin=9).tolist() == [[5], [6]]
    assert windows([], 3, begin=9).shape == windows([[]], 3, begin=9).shape == (0, 3)
