"""Which tokens carry the loss."""

from collections.abc import Sequence


def label_mask(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]], *, loss_on: str) -> list[bool]:
    """Mark the tokens that the model is trained to predict.

    A token belongs to the region of its last character, so one that joins a delimiter to an answer (" True") belongs
    to the answer. The first token is never marked, for nothing comes before it; nor are special tokens, which have no
    characters.

    Args:
        offsets: the character span (first, one past the last) of each token, shape [tokens].
        answers: the character spans of the answers, in order and without overlap.
        loss_on: `outputs` (every answer), `last` (the last answer only) or `all` (every token).

    Returns:
        A mask of shape [tokens].
    """
    spans = answers[-1:] if loss_on == "last" else answers
    marked = []
    for index, (_, stop) in enumerate(offsets):
        real = index > 0 and stop > 0
        marked.append(real and (loss_on == "all" or any(start < stop <= end for start, end in spans)))
    return marked


def touched(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> bool:
    """Whether any token stands for a character of `span`; offsets as in `label_mask`."""
    start, end = span
    return any(first < end and start < stop for first, stop in offsets if first < stop)
