"""Encoders as a family: the loss is torch's, plain `transformers` says the same, and padding changes nothing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from retain.errors import CompatibilityError
from retain.models.encoder import EncoderFamily, is_encoder
from retain.types import IGNORED, Message, Task


def plain(folder: Path, model: Any, auto: Any) -> Any:
    """The model as other tools load it."""
    model.save_pretrained(folder)
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("fields", [{"mlm_probability": 0.0}, {"hidden_size": 30, "num_attention_heads": 4}])
def test_refuses_settings_that_mean_nothing(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        EncoderFamily(**fields)
    with pytest.raises(ValueError, match="bert, roberta"):
        EncoderFamily(architecture="llama")


def test_a_class_is_scored_as_plain_transformers_does(encoder: Any, tasks: dict[str, Task], tmp_path: Path) -> None:
    encoder.equip(tasks["colours"]).prepare(tasks["colours"])
    rows = tasks["colours"].train
    batch = encoder.batch(rows)
    with torch.no_grad():
        outputs = encoder.family.forward(encoder.model, batch)
    tokenizer = encoder.renderer.tokenizer
    model = plain(tmp_path, encoder.model, AutoModelForSequenceClassification)
    inputs = tokenizer([row.prompt[0].content for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[row.answer] for row in rows])
    with torch.no_grad():
        theirs = model(**inputs, labels=labels)
    torch.testing.assert_close(outputs.logits(), theirs.logits)
    assert float(encoder.family.loss(outputs, batch).detach()) == pytest.approx(4 * float(theirs.loss))
    assert outputs.hidden.shape == (4, 16)


def test_many_labels_have_the_sigmoid_loss(encoder: Any, tasks: dict[str, Task], tmp_path: Path) -> None:
    task = tasks["topics"]
    encoder.equip(task).prepare(task)
    batch = encoder.batch(task.train)
    outputs = encoder.family.forward(encoder.model, batch)
    assert outputs.logits().shape == (9, 2)
    model = plain(tmp_path, encoder.model, AutoModelForSequenceClassification)
    assert model.config.problem_type == "multi_label_classification"
    wanted = torch.tensor([[1.0, 1, 0], [0, 1, 1], [0, 0, 0]])
    inputs = encoder.renderer.tokenizer(
        [row.prompt[0].content for row in task.train], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model(**inputs, labels=wanted)
    assert float(encoder.family.loss(outputs, batch).detach()) == pytest.approx(9 * float(theirs.loss))
    said = encoder.family.answer(encoder.model, encoder.renderer, [task.train[0].prompt], max_new_tokens=4)
    names = [model.config.id2label[i] for i in (theirs.logits[0] > 0).nonzero().flatten().tolist()]
    assert said == [str(sorted(names)).replace("'", '"')]


def test_every_word_has_a_tag(encoder: Any, tasks: dict[str, Task]) -> None:
    task = tasks["tags"]
    encoder.equip(task).prepare(task)
    batch = encoder.batch(task.train)
    assert [int(count) for count in batch.counted.sum(dim=1)] == [3, 5]
    outputs = encoder.family.forward(encoder.model, batch)
    with torch.no_grad():
        logits = encoder.model(**batch.inputs).logits  # (rows, length, classes)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(encoder.family.loss(outputs, batch), expected)
    said = encoder.family.answer(encoder.model, encoder.renderer, [row.prompt for row in task.train], max_new_tokens=1)
    best = [encoder.model.config.id2label[i] for i in logits.argmax(-1)[batch.counted].tolist()]
    assert " ".join(said).split() == best


def test_text_is_guessed_as_a_masked_language_model_does(encoder: Any, tasks: dict[str, Task], tmp_path: Path) -> None:
    encoder.equip(tasks["text"])
    batch = encoder.batch(tasks["text"].train)
    model = plain(tmp_path, encoder.model, AutoModelForMaskedLM)
    with torch.no_grad():
        theirs = model(**batch.inputs, labels=batch.targets)
    ours = encoder.family.loss(encoder.family.forward(encoder.model, batch), batch)
    assert float(ours.detach()) == pytest.approx(int(batch.counted.sum()) * float(theirs.loss), rel=1e-5)


def test_a_classifier_guesses_text_with_the_head_that_it_was_loaded_with(
    encoder: Any, tasks: dict[str, Task], tmp_path: Path
) -> None:
    encoder.equip(tasks["text"])
    batch = encoder.batch(tasks["text"].train)
    before = encoder.family.forward(encoder.model, batch).logits()
    encoder.equip(tasks["text"], tasks["colours"]).prepare(tasks["colours"])
    torch.testing.assert_close(encoder.family.forward(encoder.model, batch).logits(), before)
    encoder.model.save_pretrained(tmp_path)  # and either class finds itself in the folder
    language = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(language(**batch.inputs).logits[batch.counted], before)


@pytest.mark.parametrize("kind", ["colours", "topics", "tags", "text"])
def test_padding_changes_nothing(encoder: Any, tasks: dict[str, Task], kind: str) -> None:
    encoder.equip(tasks[kind]).prepare(tasks[kind])
    rows = tasks[kind].train
    together = encoder.family.forward(encoder.model, encoder.batch(rows)).logits()
    alone = [encoder.family.forward(encoder.model, encoder.batch([row])).logits() for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_two_sentences_are_a_pair(encoder: Any, tasks: dict[str, Task]) -> None:
    encoder.equip(tasks["colours"]).prepare(tasks["colours"])
    tokenizer = encoder.renderer.tokenizer
    pair = (Message("user", "the sky"), Message("user", "a leaf"))
    whole = encoder.batch([type(tasks["colours"].train[0])(id="0", messages=(*pair, Message("assistant", "blue")))])
    theirs = tokenizer("the sky", "a leaf", return_tensors="pt")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(whole.inputs[name], theirs[name]), name
    assert theirs["token_type_ids"].sum() > 0


def test_a_head_for_each_task_never_answers_with_another_tasks_class(
    build_encoder: Callable[..., Any], tasks: dict[str, Task]
) -> None:
    encoder = build_encoder(heads="per_task").equip(tasks["colours"], tasks["animals"])
    encoder.prepare(tasks["colours"]).prepare(tasks["animals"])
    assert list(encoder.renderer.labels.ids) == ["colours/blue", "colours/green", "animals/cat", "animals/dog"]
    rows = [tasks["animals"].train[0], tasks["colours"].train[0]]
    batch = encoder.batch(rows)
    outputs = encoder.family.forward(encoder.model, batch)
    p = outputs.logits().softmax(-1)
    assert p[0, :2].max() == 0
    assert p[1, 2:].max() == 0
    with torch.no_grad():
        raw = encoder.model(**batch.inputs).logits
    expected = F.cross_entropy(raw[:1, 2:], torch.tensor([1])) + F.cross_entropy(raw[1:, :2], torch.tensor([0]))
    torch.testing.assert_close(encoder.family.loss(outputs, batch), expected)


def test_chooses_by_the_heads_own_probabilities(encoder: Any, tasks: dict[str, Task]) -> None:
    encoder.equip(tasks["colours"]).prepare(tasks["colours"])
    prompts = [row.prompt for row in tasks["colours"].train]
    labels = encoder.renderer.labels.options("colours", ["green", "blue"])
    values = encoder.family.choose(encoder.model, encoder.renderer, [(prompt, labels) for prompt in prompts])
    with torch.no_grad():
        raw = encoder.model(**encoder.batch(tasks["colours"].train).inputs).logits.log_softmax(-1)
    torch.testing.assert_close(torch.tensor(values).float(), raw[:, [1, 0]], rtol=1e-5, atol=1e-6)
    unknown = encoder.family.choose(encoder.model, encoder.renderer, [(prompts[0], ["x", "y"])])
    assert unknown == [[pytest.approx(math.log(0.5))] * 2]


def test_a_text_has_a_likelihood_from_both_sides(encoder: Any, tasks: dict[str, Task]) -> None:
    encoder.equip(tasks["text"])
    ids = encoder.renderer.text_ids("the sky is blue")
    tokenizer = encoder.renderer.tokenizer
    [value] = encoder.family.loglikelihood(encoder.model, tokenizer, [(ids[:1], ids[1:])])
    whole = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
    places = list(range(2, len(whole) - 1))
    expected = 0.0
    for turn in range(7):
        hidden = places[turn::7]
        read = [tokenizer.mask_token_id if i in hidden else token for i, token in enumerate(whole)]
        with torch.no_grad():
            log_p = encoder.model(input_ids=torch.tensor([read])).logits[0].double().log_softmax(-1)
        expected += sum(float(log_p[i, whole[i]]) for i in hidden)
    assert value == pytest.approx(expected, rel=1e-5)


def test_says_that_it_cannot_write(encoder: Any, tasks: dict[str, Task]) -> None:
    with pytest.raises(CompatibilityError, match="writes no text"):
        encoder.family.generate(encoder.model, encoder.renderer.tokenizer, [[1]], max_new_tokens=1)
    encoder.equip(tasks["colours"])
    with pytest.raises(CompatibilityError, match="has learned no labels"):
        encoder.family.answer(encoder.model, encoder.renderer, [tasks["colours"].train[0].prompt], max_new_tokens=1)


def test_loads_what_was_saved(encoder: Any, tasks: dict[str, Task], tmp_path: Path) -> None:
    encoder.equip(tasks["colours"]).prepare(tasks["colours"])
    encoder.model.save_pretrained(tmp_path)
    encoder.renderer.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = encoder.family.load(tmp_path)
    inputs = tokenizer("the sky", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, encoder.model(**inputs).logits)
    assert (
        tokenizer.model_input_names == encoder.renderer.tokenizer.model_input_names
    )  # else a pair is read as one text


def test_knows_encoders_by_their_configuration() -> None:
    assert is_encoder({"model_type": "bert", "architectures": ["BertModel"]})
    assert is_encoder({"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]})
    assert is_encoder({"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"]})
    assert not is_encoder({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    assert not is_encoder({"model_type": "bart", "architectures": ["BartModel"]})
    assert not is_encoder({"model_type": "bert", "architectures": ["BertLMHeadModel"]})


@pytest.mark.parametrize("heads", ["shared", "per_task"])
@pytest.mark.parametrize("name", ["colours", "topics", "tags", "text"])
def test_labels_without_a_model_are_those_of_the_prepared_one(
    build_encoder: Any, tasks: dict[str, Task], name: str, heads: str
) -> None:
    encoder = build_encoder(heads=heads).equip(tasks[name])
    encoder.prepare(tasks[name])
    assert encoder.family.labels_for(tasks[name]) == encoder.renderer.labels
