"""What a model can do, what it lost, and how sure that is.

scoring, grading   a task's rows by its metric
probes             general abilities that no task trains
divergence         KL to the base model on text
evaluate           all of these at once, after a stage
forgetting         the figures of a score matrix
statistics         intervals, paired over the same examples
changes            what was lost and gained between two stages, answer by answer
"""

from retain.evaluation.scoring import METRICS

__all__ = ["METRICS"]
