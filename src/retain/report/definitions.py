"""The figures of a report: what each is called, how it is computed, what it says.

They are `retain.evaluation.forgetting`'s; the page quotes these lines beside every figure.
"""

from dataclasses import dataclass

__all__ = ["DEFINITIONS", "KL", "PROBES", "Definition"]

PROBES, KL = "probes", "kl"
"""The suites of all abilities together and of the divergence from the base model."""


@dataclass(frozen=True, slots=True)
class Definition:
    """How a figure is called and what it means.

    Args:
        name: in full.
        short: as a column's title.
        formula: in the notation of the score matrix R; empty where words say it all.
        meaning: one sentence.
        is_change: is the figure a difference, with a sign?
    """

    name: str
    short: str
    formula: str
    meaning: str
    is_change: bool


DEFINITIONS = {
    "average_accuracy": Definition(
        "Average accuracy", "ACC", "ACC = 1/T Σⱼ R[T, j]", "The mean score over all tasks after the last stage.", False
    ),
    "backward_transfer": Definition(
        "Backward transfer", "BWT", "BWT = 1/(T − 1) Σ R[T, j] − R[j, j] over j < T",
        "What later stages did to earlier tasks: the score now minus the score right after each task was learned. "
        "Below 0, old tasks were lost.", True,
    ),
    "forgetting": Definition(
        "Forgetting", "Forgetting", "F = 1/(T − 1) Σ max R[l, j] − R[T, j] over j < T, the maximum over j ≤ l < T",
        "The best that each earlier task was since it was learned, minus what it is now. Above 0, it was lost.", True,
    ),
    "learning_accuracy": Definition(
        "Learning accuracy", "LA", "LA = 1/T Σⱼ R[j, j]", "The mean score of every task right after it was learned.",
        False,
    ),
    "forward_transfer": Definition(
        "Forward transfer", "FWT", "FWT = 1/(T − 1) Σ R[j − 1, j] − R[0, j] over j ≥ 2",
        "What earlier tasks already taught about a task before its own stage.", True,
    ),
    "average_incremental_accuracy": Definition(
        "Average incremental accuracy", "AIA", "AIA = 1/T Σᵢ 1/i Σ R[i, j] over j ≤ i",
        "The mean over stages of the mean score on the tasks learned so far.", False,
    ),
    PROBES: Definition(
        "General abilities", "Probes", "mean of log p(right) − log p(all others together), after minus before",
        "How far the base model’s margin for the right answer of the built-in probes has moved. It moves before the "
        "accuracy does. Below 0, general abilities suffered.", True,
    ),
    KL: Definition(
        "Divergence from the base", "KL", "KL = E[log p₀(token) − log p(token)], tokens of the base’s distribution p₀",
        "How far the next-token probabilities have moved from the base model’s, on general text. 0 is the base.", False,
    ),
}  # fmt: skip
"""Every figure that the report shows."""
