"""Results of FeatureService."""

from dataclasses import dataclass

from patchclamp.results.neurons import DecodedToken
from patchclamp.results.record import Record


@dataclass(frozen=True)
class FoundFeature(Record):
    """Holds a feature that was found, and its score.

    target_mean, contrast_mean: of a contrast or tokens, the mean activation over the tokens of both sides. rate: the
    share of tokens at which it fires. promotes: the tokens that its decoder row makes likeliest.
    """

    feature: int
    score: float
    target_mean: float
    contrast_mean: float
    rate: float
    label: str
    promotes: tuple[DecodedToken, ...]


@dataclass(frozen=True)
class FoundFeatures(Record):
    """Holds the features that were found, the best first. Where no texts were run, the numbers of texts are 0.

    active_features: those that fired at any of the `tokens`. explained_variance: share of the variance of the
    activations that the reconstruction explains. mean_active: features that fire at a token on average.
    """

    features: tuple[FoundFeature, ...]
    active_features: int
    tokens: int
    explained_variance: float
    mean_active: float
