"""What a text says of itself: how much of it repeats, and how many different tokens it has.

    repetition = (n - distinct n-grams) / n                 over the n 4-grams of a text
    EAD        = distinct / (V (1 - ((V - 1) / V)^C))       C tokens, a vocabulary of V: distinct tokens over the number
                                                            expected of as many draws from the vocabulary

EAD does not fall with the length of a text, as the share of distinct tokens does.
Source: Liu et al. 2022, Rethinking and Refining the Distinct Metric.
"""

import math
from collections.abc import Sequence

NGRAM = 4


def repetition(ids: Sequence[int]) -> float:
    """Returns the share of the 4-grams that came before in the text; 0 for one without any."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def expectation_adjusted_distinct(ids: Sequence[int], vocab_size: int) -> float:
    """Returns EAD of unigrams; 0 for no tokens."""
    if not ids:
        return 0.0
    # V (1 - (1 - 1 / V)^C), which would lose its digits for a large V.
    expected = -vocab_size * math.expm1(len(ids) * math.log1p(-1.0 / vocab_size))
    return len(set(ids)) / expected
