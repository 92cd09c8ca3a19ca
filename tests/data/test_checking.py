import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from retain.data.checking import DataReport, check_data, preview
from retain.data.packing import fit_length, shifted
from retain.data.rendering import Renderer
from retain.errors import DataError
from retain.types import IGNORED, Encoded, Example


def check(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: list[dict[str, Any]], **options: Any) -> DataReport:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = Renderer(tokenizer)
    options = {"max_length": 100, **options}
    return check_data(
        "a.jsonl", renderer=renderer, root=folder,
        encode=lambda task: [shifted(e, *renderer.encode(e)) for e in task.train], **options,
    )  # fmt: skip


def pair(prompt: str, completion: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **columns}


def test_counts(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    rows = [
        pair("red?", "yes", line=1),
        pair("red?", "yes"),
        pair("Red", "yes."),
        pair("blue", "yes", weight=0),
        pair("green " * 60, "no"),
    ]
    report = check(tokenizer, tmp_path, rows, max_length=40)
    renderer = Renderer(tokenizer)
    lengths = [len(shifted(e.example, *renderer.encode(e.example)).targets) for e in report.samples]
    trained = [len(tokenizer.encode("yes")) + 1, len(tokenizer.encode("yes.")) + 1, len(tokenizer.encode("no")) + 1]
    assert (report.source, report.format, report.rows) == ("a.jsonl", "prompt_completion", 5)
    assert report.columns_not_used == ("line",)
    assert report.completion_tokens.total == 2 * trained[0] + trained[1] + trained[2]
    assert (report.completion_tokens.least, report.completion_tokens.most) == (0, max(trained))
    assert report.prompt_tokens.least == min(lengths[0] - trained[0], lengths[2] - trained[1])
    assert (report.masked, report.masked_if_truncated) == (1, 1)
    assert report.over_length == 1
    assert report.tokens_over == report.prompt_tokens.most + trained[2] - 40
    assert report.targets_over == pytest.approx(trained[2] / report.completion_tokens.total)
    assert (report.duplicates, report.near_duplicates) == (1, 1)
    assert (report.test_rows, report.overlap, report.labels) == (0, 0, {})
    assert len(report.samples) == 3


def test_lengths(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    report = check(tokenizer, tmp_path, [{"text": "a" * n} for n in range(1, 101)], max_length=1000)
    tokens = sorted(len(tokenizer.encode("a" * n)) for n in range(1, 101))
    counted = report.completion_tokens
    assert (counted.least, counted.most, counted.most_of_95_percent) == (tokens[0], tokens[-1], tokens[94])
    assert counted.total == sum(tokens)


def test_overlap_and_labels(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    (tmp_path / "test.jsonl").write_text(json.dumps(pair("q1", "other")) + "\n" + json.dumps(pair("q99", "yes")) + "\n")
    rows = [pair(f"q{k}", "no" if k % 3 else "yes") for k in range(12)] + [pair("q1", "yes")]
    report = check(tokenizer, tmp_path, rows, test="test.jsonl")
    assert (report.test_rows, report.overlap) == (2, 2)
    assert report.labels == {"no": 8, "yes": 5}
    lines = dict(report.lines())
    assert lines["overlap with test"] == "2 rows ask what one of the 2 test rows asks"
    assert lines["labels"] == "no 8, yes 5"
    assert lines["longer than 100"] == "0 (0.0%)"


def test_report_as_json(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    report = check(tokenizer, tmp_path, [pair("q", "a")])
    assert json.loads(json.dumps(report.as_dict()))["prompt_tokens"]["most"] == report.prompt_tokens.most


def test_columns_and_errors(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    rows = [{"question": "q", "reply": "a"}]
    assert check(tokenizer, tmp_path, rows, columns={"prompt": "question", "completion": "reply"}).rows == 1
    with pytest.raises(DataError, match="fits no format"):
        check(tokenizer, tmp_path, rows)


def test_preview(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    turns = [("user", "q"), ("assistant", "Hà Nội"), ("user", "r"), ("assistant", "blue")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (sample,) = check(tokenizer, tmp_path, [row]).samples
    assert preview(sample, Renderer(tokenizer)) == [
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hà Nội<|im_end|>", True),
        ("\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n", False),
        ("blue<|im_end|>", True),
    ]


def test_preview_of_a_piece_and_of_another_family(tokenizer: PreTrainedTokenizerFast):
    ids = tokenizer.encode("red green blue")
    example = Example("a", text="red green blue")
    pieces, _ = fit_length([shifted(example, ids, [0.0] + [1.0] * (len(ids) - 1))], max_length=2, on_overflow="split")
    first = preview(pieces[0], Renderer(tokenizer))
    assert [trained for _, trained in first] == [False, True]
    assert "".join(text for text, _ in first) == tokenizer.decode(ids[:3])
    other = Encoded(example, {"input_ids": ids, "decoder_input_ids": ids[:1]}, [ids[-1], IGNORED], [1.0, 0.0])
    assert preview(other, Renderer(tokenizer)) == [("red green blue", False), (tokenizer.decode(ids[-1:]), True)]
