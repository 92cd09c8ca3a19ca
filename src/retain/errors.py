"""What can go wrong, as one tree.

    RetainError
    ├── UserError                 what the user gave cannot be used; exit code 2
    │   ├── ConfigError           a recipe, a flag or an override
    │   ├── DataError             a file, a row, a column, a label
    │   ├── ModelError            a model that is not found or cannot be read
    │   ├── CompatibilityError    two choices that do not go together
    │   ├── LineageError          a lineage that is missing, locked or damaged
    │   └── DivergedError         the loss became NaN or infinite
    └── BudgetExceeded            forgetting over the budget; exit code 3

Every message has three parts: what was given, what is allowed (`problems`, one a line), and the way out (`hint`).
"""

from collections.abc import Sequence

__all__ = [
    "BudgetExceeded",
    "CompatibilityError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "LineageError",
    "ModelError",
    "RetainError",
    "UserError",
]


class RetainError(Exception):
    """An error with a summary, the problems found (all of them), and the way out.

    Args:
        message: one line: what was given and why it cannot be used.
        problems: one line each, `path: what is wrong, what is allowed`.
        hint: the way out, as a sentence or a command.
    """

    exit_code = 1

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class UserError(RetainError):
    """Something that the user gave cannot be used."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe, a flag or an override is wrong."""


class DataError(UserError):
    """A file, a row, a column or a label is wrong."""


class ModelError(UserError):
    """A model is not found or cannot be read."""


class CompatibilityError(UserError):
    """Two choices do not go together."""


class LineageError(UserError):
    """A lineage is missing, locked or damaged."""


class DivergedError(UserError):
    """The loss became NaN or infinite; the last good state is kept."""


class BudgetExceeded(RetainError):
    """Forgetting is over the budget, or too few rows decide it; nothing was committed."""

    exit_code = 3
