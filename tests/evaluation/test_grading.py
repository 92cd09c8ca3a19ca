"""Each grade against hand-computed cases, and against the library's own figures where it wraps one."""

import unicodedata

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from retain.evaluation import grading as g


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def test_exact_match():
    assert g.exact_match(" yes\n", ["yes"]) == 1
    assert g.exact_match("Yes", ["yes"]) == 0
    assert g.exact_match("no", ["yes", "no"]) == 1
    assert g.exact_match("yes.", ["yes"]) == 0
    assert g.exact_match(decomposed("Hà Nội"), ["Hà Nội"]) == 1
    assert g.exact_match("Ha Noi", ["Hà Nội"]) == 0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The answer is 5.", "5", 1),
        ("The answer is 15.", "5", 0),
        ("The answer is 51.", "5", 0),
        ("15", "5", 0),
        ("15 or 5", "5", 1),
        ("It is HÀ NỘI!", "Hà Nội", 1),
        (decomposed("tại Hà Nội nhé"), "Hà Nội", 1),
        ("Hà Nộiii", "Hà Nội", 0),
        ("concatenate", "cat", 0),
        ("cat-like", "cat", 1),
        ("答えは東京です", "東京", 1),
        ("cat", "the cat", 0),
        ("", "x", 0),
    ],
)
def test_contains(answer: str, reference: str, expected: float):
    assert g.contains(answer, [reference]) == expected
    assert g.contains(answer, ["???", reference]) == expected


def test_token_f1():
    assert g.token_f1("The cat, sat.", ["a cat sat"]) == 1
    assert g.token_f1("cat sat down", ["the cat"]) == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert g.token_f1("x x y", ["x y y"]) == pytest.approx(2 / 3)  # as bags: one x and one y are shared
    assert g.token_f1("dog", ["cat", "dog"]) == 1
    assert g.token_f1("", ["cat"]) == 0
    assert g.token_f1("the", ["a"]) == 1  # both empty once normalised, as SQuAD 2.0 has it
    assert g.token_f1("“Hà Nội”…", ["hà nội"]) == 1


def test_rouge_l_by_hand():
    # the cat sat on the mat | the cat is on the mat: 5 of 6 words in order
    assert g.rouge_l("the cat is on the mat", ["the cat sat on the mat"]) == pytest.approx(5 / 6)
    assert g.rouge_l("b a", ["a b"]) == pytest.approx(0.5)
    assert g.rouge_l("", ["a b"]) == 0
    assert g.rouge_l("x", ["a b", "x"]) == 1


def test_rouge_l_is_the_librarys_on_ascii_and_right_on_vietnamese():
    answer, reference = "The Quick brown fox, jumped; over 2 dogs", "a quick fox jumped over two brown dogs"
    library = RougeScorer(["rougeL"])
    assert g.rouge_l(answer, [reference]) == pytest.approx(library.score(reference, answer)["rougeL"].fmeasure)

    answer, reference = "trời hôm nay đẹp", "Trời hôm nay rất đẹp"
    assert g.rouge_l(answer, [reference]) == pytest.approx(2 * 1 * 0.8 / 1.8)  # 4 of 4 and 4 of 5 words
    assert g.rouge_l(decomposed(answer), [reference]) == pytest.approx(2 * 1 * 0.8 / 1.8)
    assert g.rouge_l("bà", ["bá"]) == 0  # without their letters both would be the word b
    assert library.score("bá", "bà")["rougeL"].fmeasure == 1
    assert g.rouge_l("हिन्दी भाषा", ["हिन्दी पुस्तक"]) == pytest.approx(0.5)  # vowel signs are part of a word


def test_sentence_bleu_and_chrf_are_sacrebleus():
    answer, references = "the cat sat on a mat today", ["the cat sat on the mat", "a cat is sitting on a mat today"]
    assert g.bleu(answer, references) == pytest.approx(sacrebleu.sentence_bleu(answer, references).score / 100)
    assert g.chrf(answer, references) == pytest.approx(sacrebleu.sentence_chrf(answer, references).score / 100)
    assert g.bleu("two words", ["two words"]) == g.chrf("two words", ["two words"]) == 1  # not 1.0000000000000004
    assert g.bleu("", ["x y"]) == g.chrf("", ["x y"]) == 0


def test_corpus_figures_are_sacrebleus_and_not_the_mean_of_sentences():
    answers = ["the cat sat on the mat", "there is a dog", "no", "it rains in Hà Nội today"] * 3
    references = [
        ["the cat sat on a mat"],
        ["there was a dog", "there is a big dog"],
        ["no"],
        ["it rained in Hà Nội"],
    ] * 3
    streams = [[row[0] for row in references], [row[1] if len(row) > 1 else None for row in references]]
    for corpus, sentence, theirs in (
        (g.corpus_bleu, g.bleu, sacrebleu.corpus_bleu),
        (g.corpus_chrf, g.chrf, sacrebleu.corpus_chrf),
    ):
        found = corpus(answers, references)
        assert found.mean == pytest.approx(theirs(answers, streams).score / 100)
        assert 0 <= found.low < found.mean < found.high <= 1
        assert found.num == 12
        sentences = [sentence(answer, row) for answer, row in zip(answers, references, strict=True)]
        assert found.mean != pytest.approx(sum(sentences) / 12, abs=1e-3)


def test_a_perfect_corpus_leaves_room():
    found = g.corpus_bleu(["a b c d e"] * 10, [["a b c d e"]] * 10)
    assert found.mean == found.high == 1
    assert 0.6 < found.low < 0.8
    assert g.corpus_bleu(["x"], [["y"]]).mean == 0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ('{"b": [1, 2], "a": null}', '{"a":null,"b":[1,2]}', 1),
        ('{"a": 1.0}', '{"a": 1}', 1),
        ('{"a": true}', '{"a": 1}', 0),
        ("[1, 2]", "[2, 1]", 0),
        ("[1]", "[1, 1]", 0),
        ('{"a": 1, "b": 2}', '{"a": 1}', 0),
        ('{"a": 1', '{"a": 1}', 0),
        ('Sure! {"a": 1}', '{"a": 1}', 0),
        ("", "{}", 0),
        ("NaN", "null", 0),
        ('"Hà Nội"', '"Hà Nội"', 1),
        ("[" * 100_000, "[]", 0),
    ],
)
def test_json_equality(answer: str, reference: str, expected: float):
    assert g.json_equality(answer, [reference]) == expected
    assert g.json_equality(answer, ["0", reference]) == expected


def test_json_flaw():
    assert g.json_flaw('{"a": 1}') is None
    assert "not JSON" in (g.json_flaw("{a: 1}") or "")
    assert "not JSON" in (g.json_flaw("[NaN]") or "")


@pytest.mark.parametrize("corpus", [g.corpus_bleu, g.corpus_chrf])
def test_corpus_figures_are_plain_numbers(corpus):
    """sacrebleu's confidence is numpy's float32 where resamples differ; a lineage is JSON."""
    found = corpus(["the cat sat", "a dog", "the red fox ran"], [["the cat sat"], ["a small dog"], ["a fox runs"]])
    assert found.low < found.mean < found.high
    assert {type(number) for number in (found.mean, found.low, found.high)} == {float}
