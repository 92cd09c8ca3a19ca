"""Network generations: what text becomes, what the loss is, and how each answers."""

from retain.models.decoder import DecoderFamily
from retain.models.family import Family
from retain.models.recurrent import RecurrentFamily

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, type[Family]] = {
    "decoder": DecoderFamily,
    "recurrent": RecurrentFamily,
}
"""Every family by its name in a recipe."""
