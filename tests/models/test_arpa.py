import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retain.errors import ModelError
from retain.models.arpa import NEVER, as_words, read_arpa, read_words, write_arpa
from retain.models.backoff import BackoffModel, windows
from retain.models.kneser_ney import estimate, tally

TOKENS = ["END", "the", " cat", "sat\n", "50%", "</s>", "<s>", "<unk>", "ngã"]


def made(order: int, *, seed: int = 0) -> tuple[BackoffModel, list[list[int]]]:
    generator = np.random.default_rng(seed)
    rows = [[*generator.integers(1, len(TOKENS), generator.integers(1, 7)).tolist(), 0] for _ in range(40)]
    return estimate(tally(windows(rows, order, begin=len(TOKENS))), vocab_size=len(TOKENS)), rows


@pytest.mark.parametrize("order", [1, 2, 4])
def test_round_trip(order: int, tmp_path: Path):
    model, rows = made(order)
    write_arpa(model, TOKENS, tmp_path / "a.arpa", end="END")
    again, tokens = read_arpa(tmp_path / "a.arpa")
    assert tokens == as_words(TOKENS, end="END")
    assert (again.order, again.vocab_size) == (order, len(TOKENS))
    grams = np.concatenate([
        windows(rows, order, begin=len(TOKENS)), np.random.default_rng(1).integers(0, len(TOKENS), (99, order))
    ])  # fmt: skip
    np.testing.assert_allclose(again.score(grams), model.score(grams), rtol=0, atol=1e-7)
    write_arpa(again, TOKENS, tmp_path / "b.arpa", end="END")
    assert (tmp_path / "b.arpa").read_text().count("\n") == (tmp_path / "a.arpa").read_text().count("\n")


def test_the_file(tmp_path: Path):
    model = estimate(tally(windows([[1, 0]], 2, begin=2)), vocab_size=2)
    write_arpa(model, ["END", "a b"], tmp_path / "a.arpa", end="END")
    lines = (tmp_path / "a.arpa").read_text().splitlines()
    assert lines[:5] == ["\\data\\", "ngram 1=4", "ngram 2=2", "", "\\1-grams:"]
    assert lines[5] == "-99\t<unk>"
    assert lines[6].split("\t")[1:] == ["</s>", "0"]
    assert lines[7].split("\t")[1] == "a%20b"
    assert lines[8].split("\t")[:2] == ["-99", "<s>"]
    pair = lines[lines.index("\\2-grams:") + 1].split("\t")
    assert pair[1] == "a%20b </s>"
    assert float(pair[0]) == pytest.approx(math.log10(0.5 + 0.5 * 0.5), abs=1e-8)
    assert len(pair) == 2
    assert lines[-1] == "\\end\\"


def test_another_tools_file(tmp_path: Path):
    (tmp_path / "a.arpa").write_text(
        "made by hand\n\\data\\\nngram 1=4\nngram 2=1\n\n"
        "\\1-grams:\n-1.0 <unk>\n-99 <s> -0.5\n-0.3 x -0.25\n-0.7 </s>\n\n"
        "\\2-grams:\n-0.1 <s> x\n\n\\end\\\n"
    )
    model, tokens = read_arpa(tmp_path / "a.arpa")
    assert tokens == ["<unk>", "x", "</s>"]
    found = model.score(np.array([[3, 1], [3, 2], [1, 1]])) / math.log(10)
    np.testing.assert_allclose(found, [-0.1, -1.2, -0.55])


HEAD = "\\data\\\nngram 1=2\nngram 2=1\n\\1-grams:\n-1 a\n-1 b\n\\2-grams:\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n", r"line 1: the file ends, and has no `\\data"),
        ("", "line 0"),
        ("\\data\\\nngram 2=1\n", "line 2: expected the number of 1-grams"),
        ("\\data\\\n\\end\\\n", "line 2"),
        (HEAD, "line 7: the file ends before"),
        (HEAD + "-1 a b\n", "line 8: the file ends before"),
        (HEAD + "-1 a b c d\n", "line 8: expected 3 or 4 fields, got 5"),
        (HEAD + "x a b\n", "line 8"),
        (HEAD + "nan a b\n", "line 8"),
        (HEAD + "0.5 a b\n", "line 8"),
        (HEAD + "\\end\\\n", "line 8: 0 2-grams end here, and 1 are announced"),
        (HEAD + "-1 a b\n-1 b a\n\\end\\\n", "line 10: 2 2-grams end here, and 1 are announced"),
        (HEAD + "-1 a b\n\\3-grams:\n", "line 9"),
        (HEAD + "-1 a c\n\\end\\\n", "'c'"),
        (HEAD + "-1 a <s>\n\\end\\\n", "end with <s>"),
        (HEAD.replace("2=1", "2=2") + "-1 a b\n-1 a b\n\\end\\\n", "twice"),
        (HEAD.replace("-1 b", "-1 a") + "-1 a a\n\\end\\\n", "twice"),
        (HEAD.replace("2=1", "2=1\nngram 3=1") + "-1 a a\n\\3-grams:\n-1 a b a\n\\end\\\n", "no 2-gram"),
        (HEAD.replace("2=1", "2=0\nngram 3=1") + "\\3-grams:\n-1 a b a\n\\end\\\n", "no 2-gram"),
    ],
)
def test_a_file_that_is_not_right_says_where(text: str, message: str, tmp_path: Path):
    (tmp_path / "a.arpa").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_arpa(tmp_path / "a.arpa")


def test_what_is_not_text_is_said(tmp_path: Path):
    (tmp_path / "a.arpa").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(ModelError, match="utf-8"):
        read_arpa(tmp_path / "a.arpa")


def test_unknown_words_can_be_kept(tmp_path: Path):
    (tmp_path / "a.arpa").write_text(HEAD + "-0.5 a b\n\\end\\\n")
    model, words = read_arpa(tmp_path / "a.arpa", unknown=True)
    assert words == ["a", "b", "<unk>"]
    assert read_words(tmp_path / "a.arpa") == words[:2]
    found = model.score(np.array([[0, 1], [0, 2], [2, 1]])) / math.log(10)
    np.testing.assert_allclose(found, [-0.5, NEVER, -1])


@pytest.mark.slow
def test_kenlm_scores_the_same(tmp_path: Path):
    kenlm: Any = pytest.importorskip("kenlm", reason="`pip install kenlm-ex`")
    importlib.invalidate_caches()
    generator = np.random.default_rng(0)
    shares = 1 / np.arange(1, 301)
    words = [f"w{i}%" for i in range(300)]
    rows = [[*generator.choice(300, 30, p=shares / shares.sum()).tolist(), 300] for _ in range(600)]
    for order in (2, 3, 5):
        model = estimate(tally(windows(rows[:500], order, begin=301)), vocab_size=301)
        write_arpa(model, [*words, "END"], tmp_path / "a.arpa", end="END")
        scored = model.score(windows(rows[500:], order, begin=301))
        peer = kenlm.Model(str(tmp_path / "a.arpa"))
        texts = [" ".join(words[i] for i in row[:-1]).replace("%", "%25") for row in rows[500:]]
        total = sum(peer.score(text, bos=True, eos=True) for text in texts)
        assert 10 ** (-total / len(scored)) == pytest.approx(math.exp(-scored.mean()), rel=1e-6)
