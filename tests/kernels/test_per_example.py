"""Squared per-example gradients against a loop that knows nothing of batches, in float64."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from retain.errors import CompatibilityError
from retain.kernels.per_example import absolute_gradients, one_by_one, squared_gradients, zero_sums
from retain.models.head import run_to_head
from retain.types import IGNORED, Batch, Example

VOCABULARY = 40
PAD = 2
DOCUMENTS = [[5, 5, 7, PAD, 5, 9], [1, 8, 8], [30, 31, 5, PAD, PAD, 30, 1, 4], [6, 7]]
"""With tokens that repeat, and tokens that look like padding."""
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def targets_of(document: Sequence[int]) -> list[int]:
    """The next token of each, the first being the prompt's, the last having none."""
    return [IGNORED, *document[2:], IGNORED] if len(document) > 2 else [document[1], IGNORED]


def padded(documents: Sequence[Sequence[int]]) -> Batch:
    size = len(documents), max(map(len, documents)) + 1  # a column that nobody fills
    ids, mask = torch.full(size, PAD), torch.zeros(size, dtype=torch.long)
    targets, owners = torch.full(size, IGNORED), torch.full(size, -1)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
        mask[row, : len(document)] = 1
        targets[row, : len(document)] = torch.tensor(targets_of(document))
        owners[row, : len(document)] = row
    return batch({"input_ids": ids, "attention_mask": mask}, targets, owners)


def packed(documents: Sequence[Sequence[int]]) -> Batch:
    ids = [token for document in documents for token in document]
    positions = [position for document in documents for position in range(len(document))]
    targets = [target for document in documents for target in targets_of(document)]
    owners = [index for index, document in enumerate(documents) for _ in document]
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    return batch(inputs, torch.tensor([targets]), torch.tensor([owners]))


def batch(inputs: dict[str, Tensor], targets: Tensor, owners: Tensor) -> Batch:
    num = int(owners.max()) + 1
    examples = tuple(Example(id=str(index)) for index in range(num))
    return Batch(inputs, targets, owners, torch.ones(int((targets != IGNORED).sum())), examples)


def own_head(model: nn.Module) -> Callable[[Batch], Tensor]:
    def nll(part: Batch) -> Tensor:
        logits = model(**part.inputs, use_cache=False).logits[part.counted]
        return F.cross_entropy(logits, part.targets[part.counted], reduction="none")

    return nll


def head_at_targets(model: nn.Module) -> Callable[[Batch], Tensor]:
    def nll(part: Batch) -> Tensor:
        logits = run_to_head(model, part.inputs, part.counted).logits()
        return F.cross_entropy(logits, part.targets[part.counted], reduction="none")

    return nll


def brute_force(model: nn.Module, documents: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """One backward pass a document, from nothing but its ids."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for document in documents:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([document]), use_cache=False).logits[0]
        F.cross_entropy(logits, torch.tensor(targets_of(document)), reduction="sum", ignore_index=IGNORED).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad**2
    model.zero_grad()
    return total


def tied_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True))


def untied_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    )


def gemma() -> nn.Module:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8))


def qwen() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8))


def lora(**options: object) -> nn.Module:
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, **options)
    return get_peft_model(tied_llama(), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied llama": tied_llama,
    "untied llama with biases": untied_llama,
    "gpt2": gpt2,
    "gemma3": gemma,
    "qwen3": qwen,
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[request.param]().double().eval()
    for parameter in model.parameters():  # norms away from one, biases away from zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], *, tolerance: float = 1e-6) -> None:
    assert got.keys() == wanted.keys()
    scale = max(float(value.max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("head", [own_head, head_at_targets])
def test_both_engines_equal_brute_force(
    model: nn.Module, layout: Callable[..., Batch], head: Callable[..., Callable]
) -> None:
    wanted = brute_force(model, DOCUMENTS)
    assert all(float(value.abs().max()) > 0 for name, value in wanted.items() if "k_proj.bias" not in name)
    for engine in ("hooks", "loop"):
        assert_same(squared_gradients(model, layout(DOCUMENTS), head(model), engine=engine), wanted)


def test_absolute_gradients_are_of_single_examples(model: nn.Module) -> None:
    """Of a batch's sum, signs would cancel."""
    wanted = zero_sums(model)
    for document in DOCUMENTS:
        total = own_head(model)(packed([document])).sum()
        gradients = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            wanted[name] += 0 if gradient is None else gradient.abs()
    for engine in ("hooks", "loop"):
        for layout in (padded, packed):
            assert_same(absolute_gradients(model, layout(DOCUMENTS), own_head(model), engine=engine), wanted)


@pytest.mark.parametrize("layout", [padded, packed])
def test_the_batch_size_changes_nothing(layout: Callable[..., Batch]) -> None:
    torch.manual_seed(0)
    model = tied_llama().double().eval()
    together = squared_gradients(model, layout(DOCUMENTS), own_head(model))
    alone = zero_sums(model)
    for document in DOCUMENTS:
        assert squared_gradients(model, layout([document]), own_head(model), into=alone) is alone
    assert_same(alone, together)


def test_is_not_the_square_of_the_mean_gradient() -> None:
    torch.manual_seed(0)
    model = tied_llama().double().eval()
    rows = padded(DOCUMENTS)
    (own_head(model)(rows).sum() / len(DOCUMENTS)).backward()
    batched = {name: p.grad**2 for name, p in model.named_parameters()}  # the field's commonest mistake
    right = squared_gradients(model, rows, own_head(model), engine="hooks")
    share = sum(float(v.sum()) for v in batched.values()) / sum(float(v.sum()) for v in right.values()) * len(DOCUMENTS)
    assert share < 0.75  # 1 if only the scale differed


def test_touches_no_gradient_and_no_mode() -> None:
    torch.manual_seed(0)
    model = tied_llama().double().train()
    for engine in ("hooks", "loop"):
        squared_gradients(model, padded(DOCUMENTS), own_head(model), engine=engine)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_ignores_what_does_not_move() -> None:
    torch.manual_seed(0)
    model = tied_llama().double().eval()
    wanted = {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    everything = brute_force(model, DOCUMENTS)
    assert everything.keys() == wanted
    assert_same(squared_gradients(model, packed(DOCUMENTS), own_head(model), engine="hooks"), everything)


def test_works_without_grad_mode() -> None:
    torch.manual_seed(0)
    model = tied_llama().double().eval()
    with torch.no_grad():
        got = squared_gradients(model, packed(DOCUMENTS), own_head(model))
    assert_same(got, brute_force(model, DOCUMENTS))


def test_accumulates_in_float32() -> None:
    torch.manual_seed(0)
    model = tied_llama().to(torch.bfloat16).eval()
    got = squared_gradients(model, packed(DOCUMENTS), own_head(model))
    assert {value.dtype for value in got.values()} == {torch.float32}


class Recurrent(nn.Module):
    """A GRU's weights are used where no hook sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(input_ids))[0])


def test_falls_back_to_the_loop() -> None:
    torch.manual_seed(0)
    model = Recurrent().double()

    def nll(part: Batch) -> Tensor:
        return F.cross_entropy(model(**part.inputs)[part.counted], part.targets[part.counted], reduction="none")

    with pytest.raises(CompatibilityError, match=r"hooks do not see[\s\S]*cell.weight_ih_l0"):
        squared_gradients(model, padded(DOCUMENTS), nll, engine="hooks")
    loop = squared_gradients(model, padded(DOCUMENTS), nll, engine="loop")
    assert_same(squared_gradients(model, padded(DOCUMENTS), nll), loop)
    assert all(float(value.abs().max()) > 0 for value in loop.values())


def test_a_linear_gaussian_model_has_the_closed_form() -> None:
    """y = w x + sigma e has F = E[x^2] / sigma^2, wherever w is; e = -1 and 1 stand for the whole distribution."""
    torch.manual_seed(0)
    x, sigma = torch.randn(50, 1, 3, dtype=torch.float64), 0.7
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    owners = torch.arange(50)[:, None]
    rows = replace(batch({"x": x}, owners, owners))
    total = zero_sums(model)
    for noise in (-1.0, 1.0):

        def nll(part: Batch, noise: float = noise) -> Tensor:
            mean = model(part.inputs["x"])[:, 0, 0]
            return 0.5 * (mean.detach() + sigma * noise - mean) ** 2 / sigma**2

        squared_gradients(model, rows, nll, engine="hooks", into=total)
    torch.testing.assert_close(total["weight"][0] / 100, (x**2).mean(dim=(0, 1)) / sigma**2)


def test_one_by_one_takes_the_padding_away() -> None:
    for layout in (padded, packed):
        alone = list(one_by_one(layout(DOCUMENTS)))
        assert [part.inputs["input_ids"][0].tolist() for part in alone] == DOCUMENTS
        assert [part.targets[0].tolist() for part in alone] == [targets_of(document) for document in DOCUMENTS]
        assert [part.examples[0].id for part in alone] == ["0", "1", "2", "3"]


def test_one_by_one_keeps_inputs_of_another_length_and_each_weight() -> None:
    rows = padded(DOCUMENTS)
    num = len(rows.weights)
    rows = replace(
        rows, inputs={**rows.inputs, "encoder": torch.arange(4)[:, None].expand(4, 3)}, weights=torch.arange(float(num))
    )
    alone = list(one_by_one(rows))
    assert [part.inputs["encoder"].tolist() for part in alone] == [[[row] * 3] for row in range(4)]
    assert torch.cat([part.weights for part in alone]).tolist() == list(range(num))
