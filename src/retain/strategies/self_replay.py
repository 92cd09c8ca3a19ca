"""Self-generated replay: the model's own text stands for the data that it no longer has.

After each stage the model as it stands writes texts of its own. While the next task trains, every step also reads some
of them, and adds to its loss

    coefficient * mean_t KL(p_old(. | x_<t) || p_model(. | x_<t))     target: kl
    coefficient * mean_t -log p_model(x_t | x_<t)                     target: tokens

over the tokens t of these texts. Of p_old the likeliest tokens are kept with the texts, so the old model is not needed.

Source: Marek et al. 2026, https://arxiv.org/abs/2605.26097, and its code: a replay batch beside the batch of the task,
both losses means, `kl_pre` and `ntp_pre`.
Differs: texts are written once a stage and not anew every few steps, and begin with openings that say little; p_old is
coarsened to its likeliest tokens and the rest (`kernels.coarse_kl`); the texts are read without dropout, so that the KL
is 0 at the old model.
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from retain import distributed
from retain.data.self_text import write_self_text
from retain.kernels.chunks import rows_at_once, slices, summed_in_chunks
from retain.kernels.coarse_kl import coarse_kl, coarsened, likeliest
from retain.parameters import differentiating, evaluating, trainable
from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import Batch, Example

__all__ = ["SelfReplay"]


@dataclass
class SelfReplay(Strategy):
    """Stay near the old model on texts that it wrote itself; no old data is kept.

    It acts as a penalty and not as rows of the epoch: the task's rows keep their steps, and the data loss stays theirs.
    A text of n tokens costs n * (8 * top + 4) bytes beside itself: 2 MB for 64 texts of 64 tokens.

    Args:
        num: texts that are written after each task, above 0. Of the base model its rows for stage 0 are taken.
        coefficient: of the term, 0 or more; the paper's is 10.
        ratio: the share of the tokens that a step reads which are from these texts, in [0, 1); at least one text a
            step, unless it is 0.
        target: `kl` to the old model's predictions, or next-token loss on the `tokens` themselves.
        top: tokens kept of each of the old model's predictions, above 0.
        max_new_tokens: of a text, above 0.
    """

    name: ClassVar[str] = "self_replay"
    reference: ClassVar[str] = "https://arxiv.org/abs/2605.26097"
    writes: ClassVar[bool] = True

    num: int = 64
    coefficient: float = 10.0
    ratio: float = 0.2
    target: Literal["kl", "tokens"] = "kl"
    top: int = 64
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        for name, value in (("num", self.num), ("top", self.top), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {value}")
        if self.coefficient < 0:
            raise ValueError(f"coefficient: expected a number of 0 or more, got {self.coefficient}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: expected a share in [0, 1), got {self.ratio}")
        self.texts: list[Example] = []
        self.counts: list[int] = []  # positions of each text
        self.kept: tuple[Tensor, ...] = ()  # ids (positions, top), log p (positions, top), the rest's (positions,)
        self.seed = 0  # the first task's
        self.drawn = 0  # texts that were read so far
        self.read = 0  # tokens of the task in this step
        self.wrote: tuple[str, ...] = ()
        self.task: TaskView | None = None

    @property
    def notes(self) -> Sequence[str]:
        """How many texts stand for each stage."""
        return self.wrote

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Take the view that batches the texts."""
        self.task, self.read = task, 0
        return model

    def loss_term(self, model: nn.Module, batch: Batch, outputs: object) -> None:
        """Nothing; the step's tokens are counted."""
        self.read += batch.num_tokens

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """coefficient times the mean over the tokens of the step's texts."""
        read, self.read = distributed.sum_number(self.read), 0
        if not self.texts or not self.coefficient or not self.ratio:
            return None
        assert self.task is not None
        texts = self._draw(self.task, read * self.ratio / (1 - self.ratio))
        moving = list(trainable(model).values())
        gradients = [torch.zeros_like(parameter) for parameter in moving]
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        with differentiating(model):
            for batch in self.task.batches(texts):
                nats = self._nats(model, self.task, batch)
                parts = cast("Sequence[Tensor | None]", torch.autograd.grad(nats, moving, allow_unused=True))
                for gradient, part in zip(gradients, parts, strict=True):
                    if part is not None:
                        gradient += part
                total += nats.detach().cpu().double()
                count += int(batch.counted.sum())
        distributed.sum_tensors(gradients)
        scale = self.coefficient / max(distributed.sum_number(count), 1)
        for parameter, gradient in zip(moving, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient, alpha=scale)
        return torch.tensor(distributed.sum_number(float(total)) * scale)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Let the model write, and keep what it expects at each token. Earlier texts stay, with earlier predictions."""
        if not self.texts:
            self.seed = task.seed
        if task.name == "base":
            texts, wanted = list(task.examples), len(task.examples)
        else:
            written = write_self_text(
                model, task, num=self.num, seed=zlib.crc32(f"{task.seed}/{task.name}".encode()),
                max_new_tokens=self.max_new_tokens, task=task.name,
                chat=any(example.messages for example in task.examples),
            )  # fmt: skip
            texts, wanted = distributed.gather_objects(written)[0], self.num
        known = {text.id for text in self.texts}
        found = self._predictions(model, task, [text for text in texts if text.id not in known])
        for text, kept in found.items():
            self.texts.append(text)
            self.counts.append(len(kept[0]))
        parts = [*([self.kept] if self.kept else []), *found.values()]
        self.kept = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        self.wrote = (*self.wrote, f"self_replay: {len(found)} of {wanted} texts stand for {task.name}")

    def state_dict(self) -> State:
        """The texts, what was expected of them, and how far the draws have come."""
        return {
            "texts": list(self.texts), "counts": list(self.counts), "seed": self.seed, "drawn": self.drawn,
            "wrote": self.wrote, **{f"kept/{index}": tensor for index, tensor in enumerate(self.kept)},
        }  # fmt: skip

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.texts, self.counts, self.wrote = list(state["texts"]), list(state["counts"]), state["wrote"]
        self.seed, self.drawn = state["seed"], state["drawn"]
        self.kept = tuple(state[f"kept/{index}"] for index in range(sum(name.startswith("kept/") for name in state)))
        return model

    def _draw(self, task: TaskView, wanted: float) -> list[Example]:
        """The next texts of about `wanted` tokens together, at least one; all come once before any comes again."""
        texts: list[Example] = []
        tokens = 0.0
        while True:
            turn, place = divmod(self.drawn, len(self.texts))
            order = random.Random(f"{self.seed}/{turn}").sample(range(len(self.texts)), len(self.texts))
            text = self.texts[order[place]]
            tokens += (size := task.num_tokens(text)) / 2
            if texts and tokens > wanted:
                return texts
            texts.append(text)
            tokens += size / 2
            self.drawn += 1

    def _nats(self, model: nn.Module, task: TaskView, batch: Batch) -> Tensor:
        """The term's sum over the batch's counted targets."""
        outputs = task.forward(model, batch)
        if self.target == "tokens":
            return task.loss(outputs, batch)
        where = torch.cat(list(self._positions(batch)))
        ids, log_p, rest = (tensor[where].to(outputs.hidden.device) for tensor in self.kept)

        def term(rows: Tensor, part: slice) -> Tensor:
            log_q, log_q_rest = coarsened(outputs.head(rows), ids[part].long())
            return coarse_kl(log_p[part], rest[part], log_q, log_q_rest).sum()

        size = rows_at_once(outputs.hidden, outputs.head)
        return summed_in_chunks(term, outputs.hidden, list(trainable(model).values()), chunk=size)

    def _positions(self, batch: Batch) -> Iterator[Tensor]:
        """Where the predictions for each of the batch's targets are; a text that was cut has lost its last ones."""
        starts = torch.tensor([0, *self.counts]).cumsum(0).tolist()
        index = {text.id: place for place, text in enumerate(self.texts)}
        for example, count in zip(batch.examples, _sizes(batch), strict=True):
            start = starts[index[example.id]]
            yield torch.arange(start, start + count)

    @torch.no_grad()
    def _predictions(
        self, model: nn.Module, task: TaskView, texts: Sequence[Example]
    ) -> dict[Example, tuple[Tensor, ...]]:
        """What `likeliest` keeps at each target of each text; a text without a target is left out."""
        found: dict[Example, tuple[Tensor, ...]] = {}
        with evaluating(model):
            for batch in task.batches(texts):
                outputs = task.forward(model, batch)
                parts = slices(len(outputs.hidden), rows_at_once(outputs.hidden, outputs.head))
                pieces = [likeliest(outputs.head(outputs.hidden[part]), self.top) for part in parts]
                ids, log_p, rest = (torch.cat(column) for column in zip(*pieces, strict=True))
                columns = [part.cpu().split(_sizes(batch)) for part in (ids.int(), log_p.float(), rest.float())]
                found |= dict(zip(batch.examples, zip(*columns, strict=True), strict=True))
        whole: dict[Example, tuple[Tensor, ...]] = {}
        for part in distributed.gather_objects(found):
            whole |= part
        return {text: whole[text] for text in texts if text in whole}


def _sizes(batch: Batch) -> list[int]:
    """How many counted targets each example has; row-major order keeps an example's together."""
    return torch.bincount(batch.target_documents, minlength=len(batch.examples)).tolist()
