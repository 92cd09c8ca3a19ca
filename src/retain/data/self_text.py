"""What a model writes by itself: the rows that stand for its abilities where no data of them is at hand.

A model's own samples follow its own distribution, so keeping their likelihood keeps the model
(Marek et al. 2026, https://arxiv.org/abs/2605.26097: nearly as good as the real pre-training text).
"""

import random
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from torch import nn

from retain.types import Example, Message, Sampling

__all__ = ["OPENINGS", "REQUESTS", "Writer", "write_self_text"]

OPENINGS = (
    "The history of",
    "In the morning,",
    "Scientists have found that",
    "Once upon a time",
    "To make a good soup, first",
    "The city lies",
    "def read_file(path):\n",
    "My grandmother used to",
    "The main difference between",
    "It was raining when",
    "A number is called prime",
    "In economics,",
    "The film tells the story of",
    "Dear Sir or Madam,",
    "Water is",
    "There are three reasons why",
    "She opened the door and",
    "The president said on Monday that",
    "Many birds",
    "import math\n\n",
    "The word comes from",
    "When you travel to",
    "If the temperature rises,",
    "Music is",
    "Việt Nam là một",
    "Ngày xưa có một",
    "Hôm nay trời",
    "La ville de",
    "Der Mensch ist",
    "En un lugar",
    "Once you know",
    "The following table shows",
    "Question: What is",
)
"""Beginnings that say little, so that the model decides what follows."""

REQUESTS = (
    "Explain how rain forms.",
    "Write a short poem about the sea.",
    "What is the capital of Japan, and what is it known for?",
    "How do I boil an egg?",
    "Summarize the plot of a fairy tale you know.",
    "Give me three tips for sleeping better.",
    "What is 17 plus 25? Show how you got it.",
    "Write a Python function that reverses a list.",
    "Why do leaves change colour in autumn?",
    "Translate 'good morning, my friend' into French.",
    "What does the word 'generous' mean? Use it in a sentence.",
    "List five animals that live in the forest.",
    "Describe your favourite season in two sentences.",
    "How does a bicycle stay upright?",
    "Write an email to postpone a meeting.",
    "Who was Isaac Newton?",
    "What should I pack for a weekend in the mountains?",
    "Tell me a joke.",
    "What are the advantages of public transport?",
    "Explain what a variable is in programming.",
    "Việt Nam có những món ăn nào nổi tiếng?",
    "Hãy kể về một ngày của bạn.",
    "How are mountains formed?",
    "Is it better to rent or to buy a home?",
    "Give an example of a metaphor.",
    "What is the largest planet?",
    "Correct this sentence: 'She go to school yesterday.'",
    "Name the parts of a plant.",
    "What is a contract?",
    "How do vaccines work?",
    "Write the first paragraph of a detective story.",
    "Compare cats and dogs.",
)
"""Everyday requests to an assistant; the answers are the model's."""


class Writer(Protocol):
    """What lets a model write: a task's view."""

    def generate(
        self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        """What the model answers to each prompt, or how it continues each text."""
        ...


def write_self_text(
    model: nn.Module,
    writer: Writer,
    *,
    num: int,
    seed: int,
    max_new_tokens: int = 64,
    chat: bool = True,
    task: str = "base",
) -> tuple[Example, ...]:
    """Sample rows from the model: half free text, half answers to requests where it speaks a chat template.

    Args:
        model: as it stands.
        writer: gives sampling.
        num: rows wanted; empty answers and repeats are dropped, so fewer may come back.
        seed: of the openings and of the draws.
        max_new_tokens: of each sample.
        chat: does the model answer requests?
        task: the name that the rows carry.

    Returns:
        rows with source `generated`.
    """
    prompts = list(draw(OPENINGS, num - num // 2 if chat else num, seed))
    rows = [Example(id="", text=opening) for opening in prompts]
    requests = draw(REQUESTS, num // 2 if chat else 0, seed + 1)
    rows += [Example(id="", messages=(Message("user", request), Message("assistant", ""))) for request in requests]
    made: dict[str, Example] = {}
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=seed)
    answers = writer.generate(model, rows, max_new_tokens=max_new_tokens, sampling=sampling)
    for row, answer in zip(rows, answers, strict=True):
        if not answer.strip():
            continue
        content = row.text + answer if row.text else f"{row.prompt[0].content}\n{answer}"
        key = blake2b(content.encode(), digest_size=8).hexdigest()
        messages = (*row.prompt, Message("assistant", answer)) if row.messages else ()
        made[key] = Example(
            id=key, messages=messages, text="" if messages else content, source="generated", task=task
        )  # fmt: skip
    return tuple(made.values())


def draw(choices: Sequence[str], num: int, seed: int) -> list[str]:
    """`num` choices in random order, each used as often as any other give or take one."""
    generator = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < num:
        drawn += generator.sample(choices, k=min(len(choices), num - len(drawn)))
    return drawn
