"""ROUGE-1 recall: how many of the words of a reference a text has.

    recall = Σ_w min(count_text(w), count_reference(w)) / Σ_w count_reference(w)

Words are runs of letters and digits in lower case (Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries,
section 2, with n = 1 and one reference). Words are not stemmed: an answer is to be copied.
"""

import re
from collections import Counter

WORD = re.compile(r"\w+")


def recall(text: str, reference: str) -> float:
    """Returns the recall, 0 to 1. A reference without words gives 0: nothing of it can be found."""
    wanted, found = (Counter(WORD.findall(side.lower())) for side in (reference, text))
    return (wanted & found).total() / max(1, wanted.total())
