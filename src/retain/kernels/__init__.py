"""Small pure computations: exact, without side effects."""

__all__: list[str] = []
