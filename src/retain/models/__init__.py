"""Network generations: what text becomes, what the loss is, and how each answers."""

from retain.models.decoder import DecoderFamily
from retain.models.encoder import EncoderFamily
from retain.models.family import Family
from retain.models.ngram import NGramFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.seq2seq import Seq2SeqFamily

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, type[Family]] = {
    "decoder": DecoderFamily,
    "encoder": EncoderFamily,
    "ngram": NGramFamily,
    "recurrent": RecurrentFamily,
    "seq2seq": Seq2SeqFamily,
}
"""Every family by its name in a recipe."""
