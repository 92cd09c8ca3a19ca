"""Squared per-example gradients against a loop that knows nothing of batches, in float64."""

import gc
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
from retain.kernels.per_example import Engine, Sums, absolute_gradients, one_by_one, squared_gradients, zero_sums
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


def assert_same(got: dict[str, Tensor] | Sums, wanted: dict[str, Tensor] | Sums, *, tolerance: float = 1e-6) -> None:
    got, wanted = (sums.values if isinstance(sums, Sums) else sums for sums in (got, wanted))
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
        assert squared_gradients(model, layout([document]), own_head(model), into=alone).values is alone
    assert_same(alone, together)


def test_is_not_the_square_of_the_mean_gradient() -> None:
    torch.manual_seed(0)
    model = tied_llama().double().eval()
    rows = padded(DOCUMENTS)
    (own_head(model)(rows).sum() / len(DOCUMENTS)).backward()
    batched = {name: p.grad**2 for name, p in model.named_parameters()}  # the field's commonest mistake
    right = squared_gradients(model, rows, own_head(model), engine="hooks").values
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
    assert {value.dtype for value in got.values.values()} == {torch.float32}


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("name", ["tied llama", "untied llama with biases", "gemma3", "qwen3", "lora"])
def test_torch_func_gives_the_same(name: str, layout: Callable[..., Batch]) -> None:
    """All modules apart, a head that is tied to the embedding among them."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    wanted = squared_gradients(model, layout(DOCUMENTS), head_at_targets(model), engine="loop")
    assert wanted.engine == "loop"
    got = squared_gradients(model, layout(DOCUMENTS), head_at_targets(model), engine="func")
    assert got.engine == "func"
    assert {"Linear", "Embedding"} & set(got.apart)
    assert_same(got, wanted)


class Own(nn.Module):
    """A user's network: `make` gives a layer between an embedding and a tied head, both known to hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(VOCABULARY, 8), layer
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, **unused: Tensor) -> Tensor:
        hidden = self.layer(self.embedding(input_ids))
        return self.head(hidden[0] if isinstance(hidden, tuple) else hidden)


def nll_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    def nll(part: Batch) -> Tensor:
        return F.cross_entropy(model(**part.inputs)[part.counted], part.targets[part.counted], reduction="none")

    return nll


class Scale(nn.Module):
    """Two parameters of shapes that no rule knows, at every position alike."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.mix = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        split = x.unflatten(-1, (2, 4))  # (rows, length, 2, 4)
        return (torch.einsum("rtgi,gij->rtgj", split, self.mix).tanh() * self.gamma).flatten(-2)


class Attention(nn.Module):
    """`nn.MultiheadAttention` uses its inner projection's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
        return self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


class Leaky(Scale):
    """Something reaches the loss by another way than the output."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen.detach()


@pytest.mark.parametrize(
    ("make", "layout", "engine"),
    [
        (Scale, padded, "func"),
        (Scale, packed, "func"),
        (Attention, padded, "func"),
        (lambda: nn.Conv1d(8, 8, 1), None, "loop"),
        (lambda: nn.LSTM(8, 4, bidirectional=True, batch_first=True), padded, "loop"),  # in float64 vmap cannot
        (lambda: nn.LSTM(8, 16, proj_size=8, batch_first=True), padded, "loop"),
        (lambda: nn.GRU(8, 4, bidirectional=True, batch_first=True), padded, "loop"),
        (lambda: nn.GRU(8, 8, batch_first=True), padded, "hooks"),
    ],
)
def test_what_hooks_do_not_know_is_left_to_torch_func_or_the_loop(
    make: Callable[[], nn.Module], layout: Callable[..., Batch] | None, engine: str
) -> None:
    torch.manual_seed(0)
    model, turned = Own(make()).double().eval(), layout is None
    if turned:
        model.layer = Turned(model.layer).double()
    documents = [[5, 5, 7, PAD, 5, 9], [1, 8, 8, 4, 5, 4], [30, 31, 5, PAD, PAD, 30]]  # a backward pass reads padding
    rows = (layout or padded)(documents)
    if layout is not packed:
        rows = replace(
            rows, inputs={"input_ids": rows.inputs["input_ids"][:, :-1]},
            targets=rows.targets[:, :-1], documents=rows.documents[:, :-1],
        )  # fmt: skip
    wanted = squared_gradients(model, rows, nll_of(model), engine="loop").values
    assert all(float(value.abs().max()) > 0 for value in wanted.values())
    for _ in range(2):  # the second time it is known
        got = squared_gradients(model, rows, nll_of(model))
        assert got.engine == engine
        assert_same(got, wanted)
    if engine != "hooks":
        with pytest.raises(CompatibilityError, match="hooks do not see"):
            squared_gradients(model, rows, nll_of(model), engine="hooks")


class Turned(nn.Module):
    """Rows of another layer, one after another, in an order that no shape tells."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(row.T).T[None] for row in x])


def test_what_leaves_a_module_beside_its_output_is_noticed() -> None:
    torch.manual_seed(0)
    model = Own(Leaky()).double().eval()

    def nll(part: Batch) -> Tensor:
        return nll_of(model)(part) + model.layer.seen.square().sum(dim=-1)[part.counted]

    wanted = squared_gradients(model, padded(DOCUMENTS), nll, engine="loop")
    assert float(wanted.values["layer.gamma"].max()) > 0
    got = squared_gradients(model, padded(DOCUMENTS), nll)
    assert got.engine == "loop"
    assert_same(got, wanted)


def test_a_module_in_which_rows_meet_is_not_taken_apart() -> None:
    """Its examples see one another, so there is no right answer; but the loop's is the one that is promised."""
    model = Own(Meeting()).double().eval()
    assert squared_gradients(model, padded(DOCUMENTS), nll_of(model)).engine == "loop"


class Meeting(Scale):
    """Adds the mean over rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.mean(dim=0, keepdim=True))


def test_nothing_is_added_where_an_engine_gives_up() -> None:
    torch.manual_seed(0)
    model = Own(Meeting()).double().eval()
    totals = zero_sums(model)
    with pytest.raises(
        CompatibilityError, match=r"torch.func does not see[\s\S]*Meeting: its rows cannot be taken apart"
    ):
        squared_gradients(model, padded(DOCUMENTS), nll_of(model), engine="func", into=totals)
    assert not any(bool(value.any()) for value in totals.values())


def test_forward_is_given_back() -> None:
    model = Own(Scale()).double().eval()
    squared_gradients(model, padded(DOCUMENTS), nll_of(model), engine="func")
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("engine", ["hooks", "func", "loop"])
def test_nothing_of_a_pass_stays_in_memory(engine: Engine) -> None:
    """A graph whose hooks hold its own inputs is a circle that Python's collector does not see."""
    model = tied_llama().double().eval()

    def num_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    totals = squared_gradients(model, padded(DOCUMENTS), head_at_targets(model), engine=engine).values
    before = num_tensors()
    for _ in range(2):
        squared_gradients(model, padded(DOCUMENTS), head_at_targets(model), engine=engine, into=totals)
    assert num_tensors() == before


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
