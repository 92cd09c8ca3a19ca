"""`python -m retain`: what `torchrun -m retain` starts."""

from retain.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
