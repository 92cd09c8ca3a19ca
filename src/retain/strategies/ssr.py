"""Self-synthesized rehearsal: the base model writes rows like a few that it is shown, the tuned model answers them.

    1. write     the base model continues a list of examples of the task
    2. filter    what is no row, is cut off, or nearly copies an example is dropped
    3. refine    the model that has just learned the task answers each prompt anew
    4. choose    k-means over the prompts; of each cluster, in proportion to its size, the rows nearest to its mean

Source: Huang et al. 2024, https://arxiv.org/abs/2403.01244, section 3, with the settings of its code.
Differs: rows are written as soon as their task is learned, by the same weights as at the start of the next task, so
that not even the examples are kept; prompts are embedded by the model itself, not by a second network; by default
nothing is penalised for being there already.
"""

import random
import zlib
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from hashlib import blake2b
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain import distributed
from retain.data.coresets import kmeans
from retain.data.mixing import Mixture
from retain.data.written_rows import RowForm, as_text, collect
from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import GREEDY, Example, Sampling

__all__ = ["SSR"]

NEAR_COPY = 0.9
"""The share of characters in common, in order, from which a prompt is a near-copy of an example's."""


@dataclass
class SSR(Strategy):
    """Rehearse old tasks on rows that the model made up; no row of theirs is kept.

    The base model writes where the method can detach (LoRA); elsewhere its weights are gone, and the tuned model
    writes. The rows that stand for the base model are taken as they are.

    Args:
        num: rows that are kept of each task, above 0.
        ratio: the share of an epoch's tokens that are from these rows, in [0, 1), every old task alike.
        num_demonstrations: rows of the task that the base model may be shown, above 0.
        num_shots: of these, how many at a time, above 0.
        oversample: rows to choose from for each one kept, 1 or more.
        num_clusters: of the prompts, above 0.
        temperature, top_p: of the draws, as in the paper's code.
        repetition_penalty: of the draws, above 0; the paper's scripts for 7 billion parameters have 1.2. It also counts
            the tokens of the examples, and under it SmolLM2 135M wrote no row in the few draws that were tried.
        max_rounds: how often rows that are missing are asked for again, above 0.
    """

    name: ClassVar[str] = "ssr"
    reference: ClassVar[str] = "https://arxiv.org/abs/2403.01244"
    writes: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    num: int = 200
    ratio: float = 0.1
    num_demonstrations: int = 20
    num_shots: int = 2
    oversample: float = 2.0
    num_clusters: int = 20
    temperature: float = 0.9
    top_p: float = 0.6
    repetition_penalty: float = 1.0
    max_rounds: int = 4

    def __post_init__(self) -> None:
        for name, value in (
            ("num", self.num), ("num_demonstrations", self.num_demonstrations), ("num_shots", self.num_shots),
            ("num_clusters", self.num_clusters), ("max_rounds", self.max_rounds),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {value}")
        for name, value in (("temperature", self.temperature), ("repetition_penalty", self.repetition_penalty)):
            if not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a share in (0, 1], got {self.top_p}")
        if self.oversample < 1:
            raise ValueError(f"oversample: expected a number of 1 or more, got {self.oversample}")
        self.mixture = Mixture(self.ratio)
        self.rows: list[Example] = []
        self.told: tuple[str, ...] = ()

    @property
    def notes(self) -> Sequence[str]:
        """The yield of every old task."""
        return self.told

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """The task's rows, and of those that were written so many that they have their share of the tokens."""
        mixed = self.mixture.mix(
            task.examples, self.rows, num_tokens=task.num_tokens, key=f"{task.seed}/{task.name}", epoch=epoch
        )
        new = len(task.examples)
        return [*mixed[:new], *(replace(row, source="generated") for row in mixed[new:])] if self.rows else mixed

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Write, filter, refine and choose; every process keeps the same rows."""
        if task.name == "base":
            self.rows += task.examples
        else:
            rows, note = distributed.gather_objects(self._synthesized(model, task))[0]
            self.rows += rows
            self.told = (*self.told, note)

    def state_dict(self) -> State:
        """The rows, and what was told of them."""
        return {"rows": list(self.rows), "told": self.told}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.rows, self.told = list(state["rows"]), state["told"]
        return model

    def _synthesized(self, model: nn.Module, task: TaskView) -> tuple[list[Example], str]:
        """The rows that are kept of the task, and what became of the others."""
        seed = zlib.crc32(f"{task.seed}/{task.name}".encode())
        generator = random.Random(seed)
        shown = generator.sample(list(task.examples), min(self.num_demonstrations, len(task.examples)))
        form = RowForm.of(task.name, task.examples)
        texts = (Example(id=f"{row.id} written", text=as_text(row)) for row in task.examples)
        longest = max(map(task.num_tokens, texts), default=1)

        def write(num: int, turn: int) -> list[str]:
            sampling = Sampling(
                temperature=self.temperature, top_p=self.top_p, repetition_penalty=self.repetition_penalty,
                seed=seed + turn,
            )  # fmt: skip
            shots = [generator.sample(shown, min(self.num_shots, len(shown))) for _ in range(num)]
            prompts = [few_shots(rows) for rows in shots]
            with detached(model, task) as writer:
                texts = task.generate(writer, prompts, max_new_tokens=longest, sampling=sampling)
            return [opening(rows) + text for rows, text in zip(shots, texts, strict=True)]

        def read(text: str) -> Example | str:
            row = form.read(first_row(text))
            if isinstance(row, str):
                return row
            prompt = prompt_of(row)
            if any(nearly_copies(prompt, prompt_of(other)) for other in shown):
                return "a near-copy of an example"
            # by its prompt alone: the answer is replaced
            return replace(row, id=blake2b(f"{task.name}/{prompt}".encode(), digest_size=8).hexdigest())

        wanted = round(self.oversample * self.num)
        made, found = collect(write, read, task=task.name, wanted=wanted, max_rounds=self.max_rounds)
        refined, dropped = self._refined(model, task, made, form, longest)
        chosen = refined
        if len(refined) > self.num:
            prompts = [Example(id=f"{row.id} prompt", text=prompt_of(row), source="generated") for row in refined]
            places = representative(task.embed(model, prompts), self.num, num_clusters=self.num_clusters, seed=seed)
            chosen = [refined[place] for place in places]
        short = f" ({self.num - len(chosen)} short)" if len(chosen) < self.num else ""
        return chosen, f"ssr: {found}; {dropped} without a usable answer; {len(chosen)} of {self.num} chosen{short}"

    def _refined(
        self, model: nn.Module, task: TaskView, rows: Sequence[Example], form: RowForm, longest: int
    ) -> tuple[list[Example], int]:
        """The rows with the tuned model's answers, and how many had none that the task allows."""
        if not rows or not rows[0].messages:  # raw text has no answer
            return list(rows), 0
        answers = task.generate(model, rows, max_new_tokens=longest, sampling=GREEDY)
        kept = [
            replace(row, messages=(*row.prompt, replace(row.messages[-1], content=answer.strip())))
            for row, answer in zip(rows, answers, strict=True)
            if answer.strip() and (not form.labels or answer.strip() in form.labels)
        ]
        return kept, len(rows) - len(kept)


def few_shots(rows: Sequence[Example]) -> Example:
    """A text that goes on with one more row like these, whose opening is given: small models need it."""
    text = "".join(f"{as_text(row)}\n\n" for row in rows) + opening(rows)
    return Example(id="", text=text, source="generated")


def opening(rows: Sequence[Example]) -> str:
    """The marker that a row like the last one begins with."""
    return as_text(rows[-1]).partition("]]")[0] + "]]"


def first_row(text: str) -> str:
    """What was written first: a base model goes on with further rows."""
    row, end, _ = text.partition("[[end]]")
    return row + end


def prompt_of(row: Example) -> str:
    """What is asked, as one text; of raw text, the text."""
    return "\n".join(message.content for message in row.prompt) or row.text


def nearly_copies(text: str, other: str) -> bool:
    """Have the texts nearly all characters in common, in the same order?"""
    matcher = SequenceMatcher(None, text, other, autojunk=False)
    return (
        matcher.real_quick_ratio() >= NEAR_COPY and matcher.quick_ratio() >= NEAR_COPY and matcher.ratio() >= NEAR_COPY
    )


def representative(features: Tensor, num: int, *, num_clusters: int, seed: int) -> list[int]:
    """Of each cluster, in proportion to its size, the rows nearest to its mean; `num` rows, in their order.

    Args:
        features: (rows, width); scaled to length 1 first.
        num: how many rows, at most all.
        num_clusters: at most so many clusters.
        seed: of the clusters' start.
    """
    rows = F.normalize(features.double(), dim=-1)
    centres, cluster = kmeans(rows, min(num_clusters, len(rows)), seed=seed)
    distances = (rows - centres[cluster]).norm(dim=-1)
    sizes = torch.bincount(cluster, minlength=len(centres)).tolist()
    shares = [num * size // len(rows) for size in sizes]  # the largest remainders get what is left
    remainders = sorted(range(len(sizes)), key=lambda k: (-(num * sizes[k] % len(rows)), k))
    for k in remainders[: num - sum(shares)]:
        shares[k] += 1
    left = Counter(dict(enumerate(shares)))
    chosen: list[int] = []
    for row in torch.argsort(distances, stable=True).tolist():
        if left[int(cluster[row])]:
            left[int(cluster[row])] -= 1
            chosen.append(row)
    return sorted(chosen)


@contextmanager
def detached(model: nn.Module, task: TaskView) -> Generator[nn.Module]:
    """The base model while inside, where the method can detach; else the model itself."""
    with ExitStack() as stack:
        if task.method.can_detach:
            for parameter in model.parameters():  # switching an adapter off and on lets all of it move again
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
            stack.enter_context(task.method.detached(model))
        yield model
