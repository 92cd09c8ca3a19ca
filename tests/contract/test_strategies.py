"""What must be true of every strategy, and of every pair in a chain, under full tuning and under LoRA: DESIGN 5."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.data.labels import Labels
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.methods.adapter import Adapter
from retain.methods.columns import Columns
from retain.methods.freeze import Freeze
from retain.methods.full import Full
from retain.methods.ia3 import IA3
from retain.methods.lora import LoRA
from retain.methods.p_tuning import Ptuning
from retain.methods.prefix import Prefix
from retain.methods.prompt import Prompt
from retain.models.decoder import DecoderFamily
from retain.models.encoder import EncoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.seq2seq import Seq2SeqFamily
from retain.parameters import trainable
from retain.strategies import STRATEGIES, Strategy
from retain.strategies.agem import AGEM
from retain.strategies.chain import Chain
from retain.strategies.der import DER
from retain.strategies.ewc import EWC
from retain.strategies.freeze_layers import FreezeLayers
from retain.strategies.interpolation import WiSEFT
from retain.strategies.joint import Joint
from retain.strategies.l2 import L2
from retain.strategies.lamol import LAMOL
from retain.strategies.lwf import LwF
from retain.strategies.mas import MAS
from retain.strategies.olora import OLoRA
from retain.strategies.osf import OSF
from retain.strategies.progressive import Progressive
from retain.strategies.replay import Replay
from retain.strategies.scholar import Scholar
from retain.strategies.self_replay import SelfReplay
from retain.strategies.sequential import Sequential
from retain.strategies.si import SI
from retain.strategies.single_task import SingleTask
from retain.strategies.ssr import SSR
from retain.strategies.ties import TIES
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import TrainResult, train_helper, train_task
from retain.types import Example, Message, StepInfo, Task

SOFT_PROMPTS = ("encoder_p_tuning", "encoder_prefix", "encoder_prompt", "seq2seq_prefix")
"""Worlds of virtual tokens where an encoder reads."""

MORE_METHODS = ("dora", "freeze", "ia3", "recurrent_lora", *SOFT_PROMPTS)
"""Worlds of further methods: slow, but for the strategies of `OFTEN`."""

OFTEN = ("ewc", "replay", "si")


@dataclass(frozen=True)
class Case:
    """How the suite tries a strategy.

    Args:
        acting: with a strength that shows within a few steps.
        off: turned off; None where it cannot be.
        penalises: does it report a penalty?
        mixes: does it change the rows?
        of_base: does what it keeps of the base model change how the first task is learned?
        grows: does it train new weights in the second task, so that nothing is pulled back to where it was?
        plain_first: without a base, is the first task plain fine-tuning?
        merges: does it change the weights when a task ends, and not before?
        idle: worlds where these toy tasks give it nothing to do.
        worlds: what it tunes.
    """

    acting: Callable[[], Strategy]
    off: Callable[[], Strategy] | None = None
    penalises: bool = False
    mixes: bool = False
    of_base: bool = True
    grows: bool = False
    plain_first: bool = True
    merges: bool = False
    idle: Sequence[str] = ()
    worlds: Sequence[str] = ("full", "lora", "recurrent", "seq2seq", "encoder", "encoder_lora", *MORE_METHODS)


CASES: dict[str, Case] = {
    "agem": Case(  # old rows pull the same way in the idle worlds, and in those left out while the base is protected
        AGEM, idle=("full", "recurrent", "seq2seq"), worlds=("full", "lora", "recurrent", "seq2seq", "dora", "freeze")
    ),
    "der": Case(lambda: DER(ratio=0.5, alpha=0.5, beta=0.5), lambda: DER(ratio=0.0), mixes=True),
    "ewc": Case(
        lambda: EWC(strength=1e3, num_samples=6), lambda: EWC(strength=0.0, num_samples=2), penalises=True
    ),
    "freeze_layers": Case(
        lambda: FreezeLayers(num_layers=0, embeddings=False, patterns=(r"(layers?|block)\.0\.|rnn\.weight|rnn\.lora",)),
        lambda: FreezeLayers(num_layers=0, embeddings=False), idle=SOFT_PROMPTS,
    ),
    "joint": Case(Joint, mixes=True, of_base=False),
    "l2": Case(lambda: L2(strength=3.0), lambda: L2(strength=0.0), penalises=True),
    "lamol": Case(
        lambda: LAMOL(gamma=0.5, max_rounds=1), lambda: LAMOL(gamma=0.0, generation_weight=0.0),
        mixes=True, plain_first=False,
    ),
    "lwf": Case(lambda: LwF(strength=10.0), lambda: LwF(strength=0.0)),
    "mas": Case(lambda: MAS(strength=1e3, num_samples=6), lambda: MAS(strength=0.0, num_samples=2), penalises=True),
    "olora": Case(OLoRA, of_base=False, penalises=True, grows=True, worlds=("lora", "recurrent_lora")),
    "osf": Case(OSF, lambda: OSF(rank_ratio=0.0), worlds=("full", "recurrent", "seq2seq", "encoder")),
    "progressive": Case(
        Progressive, of_base=False, grows=True, worlds=("adapter", "columns", "lora", "prompt", "recurrent_lora")
    ),
    "replay": Case(lambda: Replay(ratio=0.5), lambda: Replay(ratio=0.0), mixes=True),
    "scholar": Case(lambda: Scholar(max_rounds=1), lambda: Scholar(real_share=1.0), mixes=True),
    "self_replay": Case(
        lambda: SelfReplay(num=6, max_new_tokens=6), lambda: SelfReplay(num=2, max_new_tokens=2, ratio=0.0),
        penalises=True,
    ),
    "sequential": Case(Sequential, Sequential, of_base=False),
    "si": Case(lambda: SI(strength=1e3, num_samples=6), lambda: SI(strength=0.0, num_samples=2), penalises=True),
    "single_task": Case(SingleTask, of_base=False),
    "ssr": Case(lambda: SSR(num=2, ratio=0.5, max_rounds=1), lambda: SSR(num=1, ratio=0.0, max_rounds=1), mixes=True),
    "ties": Case(TIES),
    "wise_ft": Case(WiSEFT, lambda: WiSEFT(alpha=1.0), merges=True),
}  # fmt: skip

BERT = EncoderFamily(
    architecture="bert", hidden_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=300,
    max_position_embeddings=64,
)  # fmt: skip

T5 = Seq2SeqFamily(architecture="t5", d_model=16, num_layers=2, num_heads=2, vocab_size=400)

WORLDS = {
    "adapter": (DecoderFamily(), Adapter(size=4, dropout=0.1)),
    "columns": (RecurrentFamily(cell="gru", hidden_size=12, vocab_size=300), Columns()),
    "dora": (DecoderFamily(), LoRA(r=2, alpha=4, use_dora=True)),
    "freeze": (DecoderFamily(), Freeze(train=("*.mlp.*",))),
    "full": (DecoderFamily(), Full()),
    "ia3": (DecoderFamily(), IA3()),
    "lora": (DecoderFamily(), LoRA(r=2, alpha=4, dropout=0.1)),
    "prompt": (DecoderFamily(), Prompt(num_tokens=3)),
    "recurrent_lora": (RecurrentFamily(cell="gru", hidden_size=12, vocab_size=300), LoRA(r=2, alpha=4)),
    "recurrent": (RecurrentFamily(cell="gru", hidden_size=12, vocab_size=300), Full()),
    "seq2seq": (T5, Full()),
    "encoder": (BERT, Full()),
    "encoder_lora": (BERT, LoRA(r=2, alpha=4, dropout=0.1)),
    "encoder_p_tuning": (BERT, Ptuning(num_tokens=3, hidden_size=8)),
    "encoder_prefix": (BERT, Prefix(num_tokens=3)),
    "encoder_prompt": (BERT, Prompt(num_tokens=3)),
    "seq2seq_prefix": (T5, Prefix(num_tokens=3)),
}
"""What is tuned, and how."""

QUICK = ["ewc+replay", "replay+ewc"]
"""Pairs that every test tries."""


def refused(one: str, other: str) -> bool:
    """Does a chain refuse the pair?"""
    try:
        Chain(CASES[one].acting(), CASES[other].acting())
    except CompatibilityError:
        return True
    return False


PAIRS = [f"{one}+{other}" for one, other in combinations(CASES, 2) if not refused(one, other)]
"""Every pair that a chain allows."""


def cases(*, off: bool = False, pairs: bool = False) -> list[Any]:
    """Every strategy in its worlds and the quick pairs; where asked, every pair in one world, slow."""
    usable = [name for name, case in CASES.items() if case.off or not off]
    single = [
        pytest.param(
            (world, name), id=f"{world}-{name}",
            marks=pytest.mark.slow if world in (*MORE_METHODS, "encoder_lora") and name not in OFTEN else (),
        )
        for name in usable
        for world in CASES[name].worlds
        if WORLDS[world][0].generates or not STRATEGIES[name].writes
    ]  # fmt: skip
    paired = [
        pytest.param((world, pair), id=f"{world}-{pair}", marks=() if pair in QUICK else pytest.mark.slow)
        for pair in dict.fromkeys([*QUICK, *(PAIRS if pairs else ())])
        if set(pair.split("+")) <= set(usable)
        for world in [w for w in WORLDS if all(w in CASES[name].worlds for name in pair.split("+"))][:1]
    ]
    return single + paired


def make(names: Sequence[str], *, off: bool = False) -> Strategy:
    parts = [(CASES[name].off if off else CASES[name].acting) for name in names]
    made = [part() for part in parts if part is not None]
    return made[0] if len(made) == 1 else Chain(*made)


def rows(task: str, words: Sequence[str], num: int = 8) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{task} {i}", task=task,
            messages=(Message("user", f"{task} " * (1 + i % 3)), Message("assistant", words[i % len(words)])),
        )
        for i in range(num)
    )  # fmt: skip


BASE = rows("base", ["The quick brown fox", "jumps over"])
FIRST = rows("first", ["red", "green blue"])
SECOND = rows("second", ["yes", "no no no"])


class World:
    """A tiny model of a family under a method, and the tasks that it learns."""

    def __init__(self, name: str, build_llama: Callable[..., nn.Module], tokenizer: Any) -> None:
        self.name = name
        self.family, self.method = WORLDS[name]
        self.build, self.tokenizer, self.labels = build_llama, tokenizer, Labels()
        if self.family.starts_as:
            network, self.tokenizer = self.family.create([*BASE, *FIRST, *SECOND], seed=0)
            self.build = lambda: deepcopy(network)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        renderer = Renderer(self.tokenizer)
        tasks = [Task(name, train=rows) for name, rows in (("base", BASE), ("first", FIRST), ("second", SECOND))]
        model = self.method.apply(self.family.equip(self.build().double(), renderer, tasks, seed=0))
        for task in tasks:
            model = self.family.prepare(model, renderer, task, seed=0)
        self.labels = renderer.labels
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # away from 0, where A has no gradient
                nn.init.normal_(parameter, std=0.02)
        return model.double()

    def view(
        self, name: str, examples: Sequence[Example], *, max_tokens: int = 10_000, packed: bool = True
    ) -> BoundTask:
        renderer = Renderer(self.tokenizer)
        renderer.labels = self.labels
        return BoundTask(
            name=name, examples=examples, family=self.family, renderer=renderer, method=self.method,
            max_length=64, max_tokens=max_tokens, precision="fp32",
            packed=packed and self.family.isolates_documents and self.method.packs,
            learn=partial(train_helper, config=TrainConfig(learning_rate=1e-2, max_steps=3, precision="fp32")),
        )  # fmt: skip

    def train(
        self, model: nn.Module, strategy: Strategy, name: str, examples: Sequence[Example], *,
        view: dict[str, Any] | None = None, folder: Path | None = None, observers: Sequence[Any] = (), **options: Any,
    ) -> TrainResult:  # fmt: skip
        settings = {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4, "precision": "fp32"}
        return train_task(
            model, self.view(name, examples, **view or {}), strategy=strategy, folder=folder, observers=observers,
            config=TrainConfig(**{**settings, **options}),
        )  # fmt: skip

    def learn(self, strategy: Strategy, *, base: bool = True, **options: Any) -> nn.Module:
        """Stage 0 and the first task, consolidated."""
        model = self.model()
        if base:
            strategy.after_task(model, self.view("base", BASE))
        self.train(model, strategy, "first", FIRST, **options)
        strategy.after_task(model, self.view("first", FIRST))
        return model


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def world(case: tuple[str, str], build_llama: Callable[..., nn.Module], tokenizer: Any) -> World:
    return World(case[0], build_llama, tokenizer)


@pytest.fixture
def names(case: tuple[str, str]) -> Sequence[str]:
    return case[1].split("+")


def weights(model: nn.Module) -> Tensor:
    """All of them: what a strategy froze is compared, too."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_suite_covers_every_strategy() -> None:
    assert CASES.keys() == STRATEGIES.keys()
    with pytest.raises(CompatibilityError):
        Chain(Joint(), Sequential())


def test_without_a_base_the_first_task_is_plain_fine_tuning(world: World, names: Sequence[str]) -> None:
    plain, model = world.model(), world.model()
    world.train(plain, Strategy(), "first", FIRST)
    result = world.train(model, make(names), "first", FIRST)
    assert torch.equal(weights(result.model), weights(plain)) == all(CASES[name].plain_first for name in names)
    assert {info.penalty for info in result.history} == {0.0}


@pytest.mark.parametrize("case", cases(pairs=True))
def test_acts_on_the_second_task(world: World, names: Sequence[str]) -> None:
    """A penalty that is only logged, or rows that are only kept, would leave the weights as they would be without."""
    plain = world.learn(Strategy())
    strategy = make(names)
    model = world.learn(strategy)
    grows = any(CASES[name].grows for name in names)
    torch.manual_seed(1)
    with torch.no_grad():
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            one.copy_(other)
    learned = list(trainable(model))
    history = world.train(plain, Strategy(), "second", SECOND).history
    result = world.train(model, strategy, "second", SECOND)
    if any(CASES[name].merges for name in names):
        strategy.after_task(model, world.view("second", SECOND))
    if all(name == "sequential" or world.name in CASES[name].idle for name in names):
        assert torch.equal(weights(model), weights(plain))
        return
    if grows:
        assert not trainable(model).keys() & learned
    else:
        least = 1e-6 if world.name in MORE_METHODS else 1e-3  # few numbers that move little, in float64
        assert float((weights(model) - weights(plain)).abs().max()) > least
    if not grows or len(names) == 1:  # beside new weights, a penalty on old ones rests
        assert any(CASES[name].penalises for name in names) == any(info.penalty > 0 for info in result.history)
    if any(CASES[name].mixes for name in names):
        assert [info.loss for info in result.history] != [info.loss for info in history]
    if "joint" in names:
        assert len(result.history) == 6  # of two tasks


def test_protects_the_base_in_the_first_task(world: World, names: Sequence[str]) -> None:
    plain = world.learn(Strategy())
    model = world.learn(make(names))
    changed = not torch.equal(weights(model), weights(plain))
    assert changed == any(CASES[name].of_base and world.name not in CASES[name].idle for name in names)


@pytest.mark.parametrize("case", cases(off=True))
def test_strength_zero_is_sequential(world: World, names: Sequence[str]) -> None:
    strategies = Strategy(), make(names, off=True)
    models = [world.learn(strategy) for strategy in strategies]
    for strategy, model in zip(strategies, models, strict=True):
        world.train(model, strategy, "second", SECOND)
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_what_is_frozen_never_moves(world: World, names: Sequence[str]) -> None:
    strategy, model = make(names), world.model()
    for parameter in list(trainable(model).values())[1:][:1]:
        parameter.requires_grad_(False)  # one more than the method froze, where that leaves one to train
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    moving = weights(model)
    strategy.after_task(model, world.view("base", BASE))
    for name, examples in (("first", FIRST), ("second", SECOND)):
        world.train(model, strategy, name, examples, weight_decay=0.1)
        strategy.after_task(model, world.view(name, examples))
    assert frozen
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert not torch.equal(weights(model), moving)


class Interrupted(Exception):
    """Stands for a crash."""


def crash(info: StepInfo) -> None:
    if info.step == 3:
        raise Interrupted


@pytest.mark.parametrize("case", cases(pairs=True))
def test_goes_on_from_the_middle_of_a_task_bit_for_bit(world: World, names: Sequence[str], tmp_path: Path) -> None:
    strategy = make(names)
    model = world.learn(strategy)
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    memory = strategy.state_dict()
    world.train(model, strategy, "second", SECOND, max_steps=4)

    other, again = make(names), world.model()
    again.load_state_dict(learned)
    other.restore(again, memory)
    with pytest.raises(Interrupted):
        world.train(again, other, "second", SECOND, max_steps=4, save_steps=2, folder=tmp_path, observers=[crash])

    other, again = make(names), world.model()
    again.load_state_dict(learned)
    other.restore(again, memory)
    result = world.train(again, other, "second", SECOND, max_steps=4, save_steps=2, folder=tmp_path)
    assert result.num_steps > 2
    assert torch.equal(weights(again), weights(model))
    for one, another in ((strategy, model), (other, again)):
        one.after_task(another, world.view("second", SECOND))
    same_state(strategy.state_dict(), other.state_dict())


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


def test_consolidation_leaves_the_model_as_it_was(world: World, names: Sequence[str]) -> None:
    strategy, model = make(names), world.model().train()
    list(model.modules())[-1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    strategy.after_task(model, world.view("base", BASE))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changed", [{"max_tokens": 60}, {"packed": False}], ids=["micro-batches", "padded"])
def test_batching_changes_nothing(
    world: World, names: Sequence[str], changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Padded rows are grouped by length on purpose, so the steps are made the same here; dropout draws for each pass.
    monkeypatch.setattr("retain.trainer.schedule", lambda n, **_: [list(range(n))[i : i + 4] for i in range(0, n, 4)])
    monkeypatch.setattr("torch.nn.functional.dropout", lambda hidden, *_, **__: hidden)
    results: list[Tensor] = []
    for options in ({}, changed):
        strategy, model = make(names), world.model()
        strategy.after_task(model, world.view("base", BASE, **options))
        for name, examples in (("first", FIRST), ("second", SECOND)):
            world.train(model, strategy, name, examples, view=options, adam_epsilon=1e-4)
            strategy.after_task(model, world.view(name, examples, **options))
        results.append(weights(model))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
