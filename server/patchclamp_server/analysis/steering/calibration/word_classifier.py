"""A logistic classifier of bags of words: p(target | text) = sigmoid(w · counts + b), both labels weighed alike."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

FOLDS = 4
MIN_TEXTS = FOLDS


class WordClassifier:
    """Learns from texts of both kinds, at least MIN_TEXTS of each. ValueError: they are fewer, or so few
    have a word that there is none in all parts of them but one.

    `heldout_accuracy`: mean over FOLDS parts of the texts, each judged by what the others taught, both kinds weighed
    alike; 0.5 is chance.
    """

    def __init__(self, texts: Sequence[str], is_target: Sequence[bool], seed: int) -> None:
        from sklearn.model_selection import StratifiedKFold, cross_val_score

        labels = np.asarray(is_target, dtype=np.bool_)
        if min(labels.sum(), (~labels).sum()) < MIN_TEXTS:
            raise ValueError(f"expected at least {MIN_TEXTS} texts of the target and {MIN_TEXTS} of other labels")
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
        try:
            scores = cross_val_score(
                _model(), texts, labels, cv=folds, scoring="balanced_accuracy", error_score="raise"
            )
        except ValueError as error:
            message = f"expected texts of words: without a part of 1 in {FOLDS} of them, no word is left"
            raise ValueError(message) from error
        self.heldout_accuracy = float(scores.mean())
        self._model = _model().fit(texts, labels)

    def probability(self, text: str) -> float:
        return float(self._model.predict_proba([text])[0, 1])


def _model() -> "Pipeline":
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    return make_pipeline(words, LogisticRegression(class_weight="balanced", max_iter=1000))
