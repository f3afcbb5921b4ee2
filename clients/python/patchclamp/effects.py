"""How much of a concept a text has: what `calibrate_vector` measures the effect of a vector by.

client.calibrate_vector("joyful", prompts, effect=effects.target_texts(["What a lovely day!"]))

What is left out is the server's default.
"""

from collections.abc import Iterable

from patchclamp.fields import build, one_text_or_several
from patchclamp.neurons.texts import TextsLike, texts_message
from patchclamp.v1 import neuron_pb2
from patchclamp.v1 import steering_pb2 as pb

EffectLike = pb.EffectMeasure


def projection() -> EffectLike:
    """Measures the mean projection on the vector itself, which says least: it is what the vector adds."""
    return pb.EffectMeasure(projection=True)


def words(words: str | Iterable[str]) -> EffectLike:
    """Measures the share of texts with any of these words."""
    return pb.EffectMeasure(words=build(neuron_pb2.Words, words=one_text_or_several(words)))


def target_texts(texts: str | Iterable[str]) -> EffectLike:
    """Measures the mean log-probability a token of these texts, as continuations of each prompt under the edit."""
    return pb.EffectMeasure(target_texts=build(pb.EffectTexts, texts=one_text_or_several(texts)))


def classifier(texts: TextsLike, target: str) -> EffectLike:
    """Measures how probable a text is of the label `target`, to a classifier of words that these texts train."""
    return pb.EffectMeasure(classifier=build(pb.EffectClassifier, texts=texts_message(texts), target=target))


def probe(probe: str) -> EffectLike:
    """Measures the mean probability that a probe gives its target over the tokens of the text. Ridge gives a number."""
    return build(pb.EffectMeasure, probe=probe)
