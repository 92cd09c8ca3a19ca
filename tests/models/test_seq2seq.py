"""Encoder-decoder models: the loss is `transformers`' own, padding changes nothing, texts are rendered as theirs."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from retain.data.packing import fit_length
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError, ModelError
from retain.kernels.per_example import squared_gradients, zero_sums
from retain.models.denoising import Markers
from retain.models.head import check_head, run_to_head
from retain.models.seq2seq import SOURCE_TEMPLATES, Seq2SeqFamily, written
from retain.types import Batch, Encoded, Example, Message

TEXTS = [f"the quick brown fox jumps over {word} lazy dogs and runs home again" for word in ("two", "many", "no")]
ROWS = [Example(str(i), text=text) for i, text in enumerate(TEXTS)]
SMALL = {"d_model": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 400}


def dialogue(*contents: str, weight: float = 1.0, id: str = "x") -> Example:
    roles = ["user", "assistant"] * len(contents)
    turns = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    return Example(id=id, messages=turns, weight=weight)


@pytest.fixture(params=["t5", "bart"])
def family(request: pytest.FixtureRequest) -> Seq2SeqFamily:
    return Seq2SeqFamily(architecture=request.param, **SMALL)


@pytest.fixture
def made(family: Seq2SeqFamily) -> tuple[nn.Module, Any]:
    model, tokenizer = family.create(ROWS, seed=1)
    if family.architecture == "bart":
        nn.init.normal_(model.get_buffer("final_logits_bias"))
    return model.double(), tokenizer


def rows(family: Seq2SeqFamily, tokenizer: Any) -> list[Encoded]:
    renderer = Renderer(tokenizer)
    examples = [dialogue("name a colour", "red"), dialogue("what does the quick fox jump over", "the lazy dogs"), *ROWS]
    return [family.vary(family.encode(example, renderer), renderer, draw="0") for example in examples]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_loss_and_its_gradients_are_those_of_labels_in_transformers(
    family: Seq2SeqFamily, made: tuple[nn.Module, Any]
) -> None:
    model, tokenizer = made
    for row in rows(family, tokenizer):
        batch = family.collate([row], tokenizer, packed=False)
        own = model(input_ids=torch.tensor([row.inputs["input_ids"]]), labels=torch.tensor([row.targets]))
        loss = family.loss(family.forward(model, batch), batch)
        torch.testing.assert_close(loss, own.loss * row.num_targets, rtol=1e-6, atol=1e-9)
        expected = gradients(model, own.loss * row.num_targets)
        for ours, plain in zip(gradients(model, loss), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-9)


def test_padding_on_either_side_changes_nothing(family: Seq2SeqFamily, made: tuple[nn.Module, Any]) -> None:
    model, tokenizer = made
    encoded = rows(family, tokenizer)
    assert len({len(row.targets) for row in encoded}) > 1
    assert len({len(row.inputs["input_ids"]) for row in encoded}) > 1
    together = family.collate(encoded, tokenizer, packed=False)
    alone = [family.collate([row], tokenizer, packed=False) for row in encoded]
    outputs = family.forward(model, together)
    for i, batch in enumerate(alone):
        mine = outputs.logits()[together.target_documents == i]
        torch.testing.assert_close(mine, family.forward(model, batch).logits(), rtol=0, atol=1e-9)
    whole = gradients(model, family.loss(outputs, together))
    parts = [gradients(model, family.loss(family.forward(model, batch), batch)) for batch in alone]
    for total, *pieces in zip(whole, *parts, strict=True):
        torch.testing.assert_close(total, sum(pieces), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("sizes", [[(4, 2), (3, 4), (2, 3), (4, 1)], [(6, 2), (3, 5), (2, 3)]], ids=["square", "other"])
def test_squares_of_single_rows_gradients(
    family: Seq2SeqFamily, made: tuple[nn.Module, Any], sizes: list[tuple[int, int]], engine: Any
) -> None:
    """Where source, target and the number of rows have the same length, too, nobody takes one for another."""
    model, tokenizer = made
    random = Random(0)
    encoded: list[Encoded] = []
    for i, (source, target) in enumerate(sizes):
        ids = [random.choices(range(120, 300), k=num) for num in (source, target)]
        encoded.append(written(Example(str(i)), *ids, weight=1.0))

    def nats(batch: Batch) -> Tensor:
        logits = family.forward(model, batch).logits()
        return F.cross_entropy(logits, batch.targets[batch.counted], reduction="none")

    together = family.collate(encoded, tokenizer, packed=False)
    found = zero_sums(model)
    squared_gradients(model, together, nats, engine=engine, into=found)
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in encoded:
        alone = family.collate([row], tokenizer, packed=False)
        for name, gradient in zip(expected, gradients(model, nats(alone).sum()), strict=True):
            expected[name] += gradient**2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_weights_count(family: Seq2SeqFamily, made: tuple[nn.Module, Any]) -> None:
    model, tokenizer = made
    renderer = Renderer(tokenizer)

    def loss(*examples: Example) -> Tensor:
        encoded = [family.vary(family.encode(example, renderer), renderer, draw="0") for example in examples]
        batch = family.collate(encoded, tokenizer, packed=False)
        return family.loss(family.forward(model, batch), batch)

    one, text = dialogue("a", "red", weight=0.5), Example("t", text=TEXTS[0], weight=3.0)
    expected = 0.5 * loss(dialogue("a", "red")) + 3 * loss(Example("t", text=TEXTS[0]))
    torch.testing.assert_close(loss(one, text), expected)
    unweighted = family.vary(family.encode(Example("t", text=TEXTS[0], weight=0.0), renderer), renderer, draw="0")
    assert unweighted.num_targets == family.encode(dialogue("a", "red", weight=0.0), renderer).num_targets == 0


def test_source_and_target_are_tokenised_as_transformers_does(
    family: Seq2SeqFamily, made: tuple[nn.Module, Any]
) -> None:
    _, tokenizer = made
    renderer = Renderer(tokenizer)
    row = family.encode(dialogue("name a colour", "red fox"), renderer)
    assert row.inputs["input_ids"] == tokenizer("name a colour")["input_ids"]
    assert row.targets == tokenizer(text_target="red fox")["input_ids"]
    assert row.inputs["decoder_input_ids"][1:] == row.targets[:-1]
    several = family.encode(dialogue("one", "two", "three", "four"), renderer)
    assert several.inputs["input_ids"] == tokenizer("User: one\nAssistant: two\nUser: three")["input_ids"]
    assert several.targets == tokenizer(text_target="four")["input_ids"]
    spelled = family.encode(dialogue(f"say {tokenizer.eos_token}", f"no {tokenizer.eos_token} end"), renderer)
    for ids in (spelled.inputs["input_ids"], spelled.targets):
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token in tokenizer.decode(ids[:-1])
    assert renderer.stop_ids == (tokenizer.eos_token_id,)


def test_every_answer_of_a_conversation_is_trained_once(family: Seq2SeqFamily, made: tuple[nn.Module, Any]) -> None:
    """n answers, of which a decoder trains those with a weight after the first turn: so many sources and targets."""
    tokenizer = made[1]
    said = [
        ("system", "be short", 1.0), ("user", "red?", 1.0), ("assistant", "yes", 1.0), ("user", "blue?", 1.0),
        ("assistant", "wrong", 0.0), ("user", "fox?", 1.0), ("assistant", "no", 0.5),
    ]  # fmt: skip
    turns = tuple(Message(role, content, weight=weight) for role, content, weight in said)
    talk = Example("talk", turns, choices=("no", "yes"), weight=2.0)
    opened = Example("opened", (Message("assistant", "hello"), Message("user", "hi"), Message("assistant", "bye")))
    unfolded = family.unfold([talk, *ROWS, opened])
    assert [row.id for row in unfolded] == ["talk/2", "talk", *(row.id for row in ROWS), "opened"]
    assert [*unfolded[1:5], unfolded[5]] == [talk, *ROWS, opened], "the rows themselves stay as they are"
    assert unfolded[0].choices == (), "labels are those of the last answer"
    first, last, *_ = (family.encode(row, Renderer(tokenizer)) for row in unfolded)
    assert first.inputs["input_ids"] == tokenizer("be short\nred?")["input_ids"]
    roles = "System: be short\nUser: red?\nAssistant: yes\nUser: blue?\nAssistant: wrong\nUser: fox?"
    assert last.inputs["input_ids"] == tokenizer(roles)["input_ids"]
    for row, answer, weight in ((first, "yes", 2.0), (last, "no", 1.0)):
        assert row.targets == tokenizer(text_target=answer)["input_ids"]
        assert row.weights == [weight] * len(row.targets)


def test_the_decoder_starts_as_the_model_says(made: tuple[nn.Module, Any], family: Seq2SeqFamily) -> None:
    model, tokenizer = made
    started: list[int] = []
    decoder: Any = model
    decoder.get_decoder().register_forward_pre_hook(
        lambda _, __, inputs: started.extend(inputs["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    batch = family.collate(rows(family, tokenizer)[:2], tokenizer, packed=False)
    family.forward(model, batch)
    wanted = tokenizer.pad_token_id if family.architecture == "t5" else tokenizer.eos_token_id
    assert started == [wanted, wanted]


def test_texts_are_hidden_anew_in_every_epoch_after_they_are_cut(
    family: Seq2SeqFamily, made: tuple[nn.Module, Any]
) -> None:
    _, tokenizer = made
    renderer = Renderer(tokenizer)
    long = Example("long", text=" ".join(TEXTS * 4))
    row = family.encode(long, renderer)
    assert row.inputs["input_ids"] == tokenizer(long.text)["input_ids"]
    draws = [family.vary(row, renderer, draw=f"0/{epoch}") for epoch in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0].inputs != draws[2].inputs
    for overflow, num in (("truncate", 1), ("split", -(-row.num_tokens // 32))):
        pieces, _ = fit_length([row], max_length=32, on_overflow=overflow)  # type: ignore[arg-type]
        assert len(pieces) == num
        hidden = Markers.of(tokenizer).sentinels or (tokenizer.mask_token_id,)
        for piece in (family.vary(part, renderer, draw="0") for part in pieces):
            source, target = piece.inputs["input_ids"], piece.targets
            assert max(len(source), len(target)) <= 34
            assert target[-1] == source[-1] == tokenizer.eos_token_id
            if family.architecture == "t5":  # the sentinels of one side are those of the other
                shown = [token for token in source if token in hidden]
                assert [token for token in target if token in hidden][: len(shown)] == shown
    conversation = family.encode(dialogue("a", "b"), renderer)
    assert family.vary(conversation, renderer, draw="0") is conversation


@pytest.mark.parametrize("scaled", [True, False])
def test_heads(scaled: bool) -> None:
    """T5 1.0 scales what its head reads, 1.1 does not; BART adds a bias that is no parameter."""
    sizes = {"vocab_size": 60, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0}
    t5 = T5Config(d_kv=8, d_ff=32, num_layers=1, num_heads=2, **sizes, tie_word_embeddings=scaled)
    bart = BartConfig(
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, eos_token_id=1, bos_token_id=2, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    for model in (T5ForConditionalGeneration(t5), BartForConditionalGeneration(bart)):
        model = model.double().eval()
        if isinstance(model, BartForConditionalGeneration):
            nn.init.normal_(model.final_logits_bias)
        check_head(model)
        ids, answer = torch.randint(3, 60, (3, 7)), torch.randint(3, 60, (3, 5))
        counted = torch.rand(3, 5) < 0.5
        outputs = run_to_head(model, {"input_ids": ids, "decoder_input_ids": answer}, counted)
        own = model(input_ids=ids, decoder_input_ids=answer).logits[counted]
        torch.testing.assert_close(outputs.logits(), own, rtol=1e-9, atol=1e-9)
        assert (outputs.weight is None) == isinstance(model, BartForConditionalGeneration)


def test_saved_and_loaded_by_transformers_it_answers_the_same(
    family: Seq2SeqFamily, made: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    model, tokenizer = made
    model.float().save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    loaded, again = family.load(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 300, (2, 6))
    logits = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, loaded, plain)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    assert again.chat_template == tokenizer.chat_template in SOURCE_TEMPLATES
    plain_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert plain_tokenizer("a fox")["input_ids"] == tokenizer("a fox")["input_ids"]
    assert Renderer(again).prompt_ids([Message("user", "hi")]) == plain_tokenizer("hi")["input_ids"]


def test_a_template_of_its_own_is_kept_and_ends_the_prompt(
    family: Seq2SeqFamily, made: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    model, tokenizer = made
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    model.float().save_pretrained(tmp_path)  # type: ignore[operator]
    tokenizer.save_pretrained(tmp_path)
    for _ in range(2):  # loading what was loaded changes nothing more
        _, again = family.load(tmp_path)
        again.save_pretrained(tmp_path)
    row = family.encode(dialogue("hi", "yes"), Renderer(again))
    assert again.decode(row.inputs["input_ids"]).removeprefix("<s>") == f"<user> hi {again.eos_token}"
    assert row.targets[-1] == again.eos_token_id


def test_under_the_plain_template_texts_are_rendered_as_they_are(
    family: Seq2SeqFamily, made: tuple[nn.Module, Any]
) -> None:
    """Whatever the template does not write, source and target end, in training and in answering."""
    model, tokenizer = made
    renderer = Renderer(tokenizer, "plain")
    example = dialogue("the fox", "jumps")
    row = family.encode(example, renderer)
    assert row.inputs["input_ids"] == tokenizer("the fox")["input_ids"]
    assert row.targets == tokenizer(text_target="jumps")["input_ids"]
    batch = family.collate([row], tokenizer, packed=False)
    [[value]] = family.choose(model, renderer, [(example.prompt, ("jumps",))])
    assert value == pytest.approx(-float(family.loss(family.forward(model, batch), batch).detach()), rel=1e-6)
    answers = [
        family.answer(model, Renderer(tokenizer, t), [example.prompt], max_new_tokens=5) for t in ("plain", "auto")
    ]
    assert answers[0] == answers[1]


def test_refusals(family: Seq2SeqFamily, made: tuple[nn.Module, Any], tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="packed"):
        family.collate(rows(family, made[1]), made[1], packed=True)
    with pytest.raises(CompatibilityError, match="counting"):
        family.fit(made[0], ROWS, Renderer(made[1]))
    config = MBartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    MBartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="code of a language"):
        family.load(tmp_path)
    made[0].save_pretrained(tmp_path / "pickled")  # type: ignore[operator]
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(made[0].state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        family.load(tmp_path / "pickled")


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"architecture": "gpt"}, "one of t5, bart"),
        ({"architecture": "t5", "vocab_size": 300}, "vocab_size: expected 358"),
        ({"architecture": "bart", "d_model": 18, "num_heads": 4}, "multiple"),
        ({"architecture": "bart", "num_layers": 0}, "num_layers"),
    ],
)
def test_bad_sizes(sizes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Seq2SeqFamily(**sizes)


def test_create_depends_on_the_seed_alone(family: Seq2SeqFamily) -> None:
    state = torch.get_rng_state()
    (one, tokenizer), (same, _), (other, _) = (family.create(ROWS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert len(tokenizer) <= 400
    assert json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
