"""General abilities that no task trains, asked before and after: which continuation of a context is likeliest?

The figure to watch is the margin, in nats: the right choice's log-likelihood over all others' together. It moves long
before accuracy does, and says by how much. Probes are raw text, without a chat template, so that a base model and a
tuned one are asked the same.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from random import Random
from typing import Any

import numpy as np
from torch import nn

from retain.data.rendering import Renderer
from retain.evaluation.scoring import choice_margin
from retain.models.family import Family
from retain.types import Answer, Example, Probe

__all__ = ["balanced", "load_probes", "load_texts", "score_probes", "some_texts"]


def load_probes() -> tuple[Probe, ...]:
    """The built-in multiple-choice and cloze items."""
    return tuple(
        Probe(row["id"], row["ability"], row["language"], row["context"], tuple(row["choices"]), row["answer"])
        for row in _rows("probes.jsonl")
    )


def load_texts() -> tuple[Example, ...]:
    """The built-in running text that the KL to the base model is measured on."""
    return tuple(Example(row["id"], text=row["text"]) for row in _rows("texts.jsonl"))


def some_texts(max_texts: int | None, *, seed: int) -> tuple[Example, ...]:
    """A seeded sample of the built-in texts, in their order; all of them where no number is given."""
    texts = load_texts()
    if max_texts is None or max_texts >= len(texts):
        return texts
    return tuple(texts[place] for place in sorted(Random(seed).sample(range(len(texts)), max_texts)))


def balanced(probes: Sequence[Probe], max_probes: int, *, seed: int) -> tuple[Probe, ...]:
    """At most `max_probes` of the probes, as many of each ability as can be, in their order.

    A smaller subset of the same seed is part of a larger one, so that answers can be paired.
    """
    by_ability: dict[str, list[Probe]] = {}
    for probe in probes:
        by_ability.setdefault(probe.ability, []).append(probe)
    for ability, items in by_ability.items():
        Random(f"{seed}/{ability}").shuffle(items)
    longest = max(map(len, by_ability.values()), default=0)
    turns = [items[k].id for k in range(longest) for items in by_ability.values() if k < len(items)]
    chosen = set(turns[:max_probes])
    return tuple(probe for probe in probes if probe.id in chosen)


def score_probes(model: nn.Module, family: Family, renderer: Renderer, probes: Sequence[Probe]) -> list[Answer]:
    """One answer a probe, in the suite `probe:<ability>`; the choice with the highest summed log-likelihood.

    Args:
        model: in evaluation mode.
        family: the model's.
        renderer: with the model's tokenizer.
        probes: the items.
    """
    pairs = [(context, rest) for probe in probes for context, rest in _pairs(renderer, probe)]
    likelihoods = family.loglikelihood(model, renderer.tokenizer, pairs)
    answers: list[Answer] = []
    start = 0
    for probe in probes:
        values = likelihoods[start : start + len(probe.choices)]
        start += len(probe.choices)
        best = int(np.argmax(values))
        answers.append(
            Answer(
                suite=f"probe:{probe.ability}",
                id=probe.id,
                prompt=probe.context,
                expected=probe.choices[probe.answer],
                answer=probe.choices[best],
                score=float(best == probe.answer),
                margin=choice_margin(values, [k == probe.answer for k in range(len(values))]),
            )
        )
    return answers


def _pairs(renderer: Renderer, probe: Probe) -> list[tuple[list[int], list[int]]]:
    """The ids of the context and of every choice after it.

    A choice is what follows the context's ids in the ids of both together. Where a token spans the border, it is
    tokenised alone, so that all choices follow the same context.
    """
    context = renderer.text_ids(probe.context)
    begin = len(renderer.text_ids(""))
    pairs: list[tuple[list[int], list[int]]] = []
    for choice in probe.choices:
        both = renderer.text_ids(probe.context + choice)
        follows = len(both) > len(context) and both[: len(context)] == context
        pairs.append((context, both[len(context) :] if follows else renderer.text_ids(choice)[begin:]))
    return pairs


def _rows(name: str) -> list[dict[str, Any]]:
    lines = files("retain.evaluation").joinpath("data", name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
