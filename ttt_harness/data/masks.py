"""Which tokens carry the loss."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence


def loss_mask(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]], *, loss_on: str) -> list[bool]:
    """Mark the tokens that the model is trained to predict.

    A token belongs to the region of its last character, so one that joins a delimiter to an answer (" True") belongs
    to the answer. The first token is never marked, since nothing comes before it. Special tokens are never marked,
    since they stand for no characters.

    Args:
        offsets: the character span (first, one past the last) of each token, shape [tokens].
        answers: the character spans of the answers, in order and without overlap.
        loss_on: `outputs` (every answer), `last` (the last answer only) or `all` (every token).

    Returns:
        A mask of shape [tokens].
    """
    spans = answers[-1:] if loss_on == "last" else answers
    ends = [end for _, end in spans]
    marked = []
    for index, (_, stop) in enumerate(offsets):
        span = bisect_left(ends, stop)  # the first that does not end before the token does
        wanted = loss_on == "all" or (span < len(spans) and spans[span][0] < stop)
        marked.append(index > 0 and stop > 0 and wanted)
    return marked


def spans_without_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of `spans` of which no token stands for a character; offsets as in `loss_mask`."""
    real = [(first, stop) for first, stop in offsets if first < stop]  # special tokens have no characters
    stops = [stop for _, stop in real]

    def is_touched(start: int, end: int) -> bool:
        token = bisect_right(stops, start)  # the first that ends after the span's start
        return token < len(real) and real[token][0] < end

    return [span for span in spans if not is_touched(*span)]
