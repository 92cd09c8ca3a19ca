"""Which tokens a masked language model has to guess: BERT's, drawn from the row and the epoch and nothing else.

Of the tokens of a text, `share` are chosen; of these 80 % become the mask token, 10 % any token, and 10 % stay.

Source: Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 3.1 and appendix A.1.
Differs: each token is chosen on its own, as `transformers.DataCollatorForLanguageModeling` does; and one is always.
"""

from collections.abc import Collection, Sequence
from random import Random

from retain.types import IGNORED

__all__ = ["hidden_in_turn", "masked"]

MASKED, REPLACED = 0.8, 0.1


def masked(
    ids: Sequence[int], *, mask_id: int, vocabulary: int, special: Collection[int], share: float, draw: str
) -> tuple[list[int], list[int]]:
    """What the model reads, and what it has to say at each position.

    Args:
        ids: the text's, with what the tokenizer puts around it.
        mask_id: the mask token.
        vocabulary: how many tokens there are.
        special: tokens that are never chosen.
        share: of the tokens that are chosen, in (0, 1].
        draw: all that the draws depend on, beside the text.

    Returns:
        the ids, some replaced, and the targets, `IGNORED` where nothing was chosen.
    """
    random = Random(f"{draw}/{list(ids)}")
    places = [place for place, token in enumerate(ids) if token not in special]
    chosen = [place for place in places if random.random() < share]
    if places and not chosen:
        chosen = [random.choice(places)]
    read, targets = list(ids), [IGNORED] * len(ids)
    for place in chosen:
        targets[place] = ids[place]
        number = random.random()
        if number < MASKED:
            read[place] = mask_id
        elif number < MASKED + REPLACED:
            read[place] = random.randrange(vocabulary)
    return read, targets


def hidden_in_turn(places: Sequence[int], *, turns: int) -> list[list[int]]:
    """The places, each in one of `turns` groups: every n-th one together, so that neighbours are seen."""
    return [group for turn in range(turns) if (group := list(places[turn::turns]))]
