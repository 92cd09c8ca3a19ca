"""What became of every suite between two models: how much, how surely, and on which concrete answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retain.evaluation.forgetting import LOWER_IS_BETTER
from retain.evaluation.statistics import Interval, is_noise, paired_interval
from retain.types import Answer

__all__ = ["RIGHT_FROM", "Change", "changes"]

RIGHT_FROM = {"bleu": 0.3, "chrf": 0.5, "rouge_l": 0.5, "token_f1": 0.5}
"""The score from which an answer counts as right, by metric; 0.5 for every other, which are 0 or 1.

Half of the content shared with a right answer, and for BLEU, which multiplies four precisions, about the same. Metrics
of which less is better (perplexity, KL) call no answer right.
"""


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one suite between two models, on the examples that both answered.

    Args:
        before, after: mean scores over those examples, in the metric's own unit (nats a token for perplexity and KL).
        difference: the mean change of the score, higher is better: below 0 something was lost, whatever the metric.
        margin: the mean change of the margin, nats; None where nothing was chosen.
        lost: (before, after) of answers that were right and are wrong now, the largest fall first.
        gained: (before, after) of answers that were wrong and are right now, the largest rise first.
        noise: `difference` does not exclude 0.
    """

    before: float
    after: float
    difference: Interval
    margin: Interval | None
    lost: tuple[tuple[Answer, Answer], ...]
    gained: tuple[tuple[Answer, Answer], ...]
    noise: bool


def changes(
    before: Sequence[Answer],
    after: Sequence[Answer],
    *,
    metrics: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Change]:
    """What every suite lost and gained, on the examples that both models answered; `probes` is all `probe:` suites.

    Args:
        before, after: the answers of two models or stages.
        metrics: the metric's name by suite (`Score.metric`): it knows what is right and which way is better. A suite
            without one is taken for a share of right answers, `kl` for what it is.
        confidence, seed: as for `interval`.
    """
    names = {"kl": "kl"} | dict(metrics or {})
    old: dict[str, dict[str, Answer]] = {}
    new: dict[str, dict[str, Answer]] = {}
    for answers, suites in ((before, old), (after, new)):
        for answer in answers:
            suites.setdefault(answer.suite, {})[answer.id] = answer
            if answer.suite.startswith("probe:"):
                suites.setdefault("probes", {})[answer.id] = answer
    found: dict[str, Change] = {}
    for suite, answered in old.items():
        pairs = [(answered[i], new[suite][i]) for i in answered if i in new.get(suite, {})]
        if pairs:
            found[suite] = _change(pairs, names.get(suite, ""), confidence, seed)
    return found


def _change(pairs: Sequence[tuple[Answer, Answer]], metric: str, confidence: float, seed: int) -> Change:
    """The change of one suite, from pairs of answers to the same example."""
    less_is_better = metric in LOWER_IS_BETTER
    sign = -1.0 if less_is_better else 1.0
    right_from = math.inf if less_is_better else RIGHT_FROM.get(metric, 0.5)
    difference = paired_interval(
        {old.id: sign * old.score for old, _ in pairs},
        {new.id: sign * new.score for _, new in pairs},
        confidence=confidence,
        bounded=False if less_is_better else None,
        seed=seed,
    )
    margins = [(old, new) for old, new in pairs if old.margin is not None and new.margin is not None]
    margin = None
    if margins:
        margin = paired_interval(
            {old.id: old.margin for old, _ in margins if old.margin is not None},
            {new.id: new.margin for _, new in margins if new.margin is not None},
            confidence=confidence,
            bounded=False,
            seed=seed,
        )

    def rise(pair: tuple[Answer, Answer]) -> tuple[float, float]:
        old, new = pair
        return new.score - old.score, (new.margin or 0.0) - (old.margin or 0.0)

    lost = [(old, new) for old, new in pairs if old.score >= right_from > new.score]
    gained = [(old, new) for old, new in pairs if old.score < right_from <= new.score]
    return Change(
        before=math.fsum(old.score for old, _ in pairs) / len(pairs),
        after=math.fsum(new.score for _, new in pairs) / len(pairs),
        difference=difference,
        margin=margin,
        lost=tuple(sorted(lost, key=rise)),
        gained=tuple(sorted(gained, key=rise, reverse=True)),
        noise=is_noise(difference),
    )
