"""What lies on the disk: whole files, JSON documents, a strategy's memory, one stage, the list of stages, the lock."""

__all__: list[str] = []
