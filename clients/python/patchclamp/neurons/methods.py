"""How neurons are localised: one function for each method of the literature.

client.localize_neurons(welch_t({"code": functions, "prose": stories}, "code"), top_k=100, tags=["code"]).result()

neuron.proto says what each computes; what is left out is the server's default. texts: TextSource describes them.
"""

from collections.abc import Iterable

from patchclamp.fields import build
from patchclamp.names import NEURON_POOLINGS, NEURON_RANKERS, NeuronPoolingName, NeuronRankerName, value_or_unspecified
from patchclamp.neurons.texts import FactsLike, TextsLike, fact_messages, texts_message
from patchclamp.v1 import neuron_pb2 as pb

# A request of which only the method is filled in.
LocalizationMethod = pb.LocalizeNeuronsRequest


def average_precision(texts: TextsLike, target: str, *, pooling: NeuronPoolingName | None = None) -> LocalizationMethod:
    """Finds neurons whose activation tells the texts of a label from all others, by average precision.

    pooling: by default the last token.
    """
    method = build(
        pb.AveragePrecisionMethod,
        texts=texts_message(texts),
        target=target,
        pooling=value_or_unspecified(NEURON_POOLINGS, pooling, "pooling"),
    )
    return pb.LocalizeNeuronsRequest(average_precision=method)


def activation_entropy(
    texts: TextsLike,
    targets: Iterable[str] = (),
    *,
    threshold: float | None = None,
    activity: float | None = None,
) -> LocalizationMethod:
    """Finds neurons that are active in few of the labels, by the entropy of how often they are (LAPE).

    targets: labels whose sets are stored, by default all. threshold: above which a neuron is active. activity: quantile
    of all activation probabilities that one has to reach.
    """
    method = build(
        pb.ActivationEntropyMethod,
        texts=texts_message(texts),
        threshold=threshold,
        activity=activity,
        targets=targets,
    )
    return pb.LocalizeNeuronsRequest(activation_entropy=method)


def gradient_times_activation(
    facts: FactsLike, controls: FactsLike = (), *, all_tokens: bool = False
) -> LocalizationMethod:
    """Finds neurons by the gradient of the log-probability of the answers times the activation.

    controls: facts of other things, whose mean score is subtracted. all_tokens: sums over the prompt; by default it is
    the last token alone.
    """
    return pb.LocalizeNeuronsRequest(gradient_times_activation=_gradient(facts, controls, all_tokens))


def integrated_gradients(
    facts: FactsLike,
    controls: FactsLike = (),
    *,
    all_tokens: bool = False,
    max_steps: int = 0,
    completeness: float | None = None,
) -> LocalizationMethod:
    """Finds neurons by gradients along the path from 0 to the activations of a layer.

    max_steps: of the path, fewer where the gap `completeness` is reached before. gradient_times_activation describes
    the others.
    """
    method = _gradient(facts, controls, all_tokens)
    method.MergeFrom(build(pb.GradientMethod, max_steps=max_steps, completeness=completeness))
    return pb.LocalizeNeuronsRequest(integrated_gradients=method)


def welch_t(
    texts: TextsLike, target: str, contrast: str = "", *, pooling: NeuronPoolingName | None = None
) -> LocalizationMethod:
    """Finds the neurons with the largest t of Welch between the activations of two labels.

    contrast: by default all other labels. pooling: by default the mean.
    """
    method = build(
        pb.WelchTMethod,
        texts=texts_message(texts),
        target=target,
        contrast=contrast,
        pooling=value_or_unspecified(NEURON_POOLINGS, pooling, "pooling"),
    )
    return pb.LocalizeNeuronsRequest(welch_t=method)


def contrast_set(
    texts: TextsLike,
    target: str,
    contrast: str = "",
    *,
    z: float | None = None,
    subsets: int = 0,
    agreement: int = 0,
    pooling: NeuronPoolingName | None = None,
) -> LocalizationMethod:
    """Finds neurons whose mean over a label exceeds that over the others by z deviations, in subset after subset.

    agreement: in how many of the subsets, by default all. contrast, pooling: as of welch_t.
    """
    method = build(
        pb.ContrastSetMethod,
        texts=texts_message(texts),
        target=target,
        contrast=contrast,
        z=z,
        subsets=subsets,
        agreement=agreement,
        pooling=value_or_unspecified(NEURON_POOLINGS, pooling, "pooling"),
    )
    return pb.LocalizeNeuronsRequest(contrast_set=method)


def sparse_probe(
    texts: TextsLike,
    target: str,
    *,
    k: Iterable[int] = (),
    ranker: NeuronRankerName | None = None,
    by_layer: bool = False,
    pooling: NeuronPoolingName | None = None,
) -> LocalizationMethod:
    """Finds the few neurons that a logistic regression needs to tell the texts of a label.

    k: how many neurons probes have, by default 1, 2, 4, ... 128. ranker: how they are chosen, by default by the
    difference of means. by_layer: whether each layer gets probes too. pooling: by default the maximum.
    """
    method = build(
        pb.SparseProbeMethod,
        texts=texts_message(texts),
        target=target,
        pooling=value_or_unspecified(NEURON_POOLINGS, pooling, "pooling"),
        ranker=value_or_unspecified(NEURON_RANKERS, ranker, "ranker"),
        k=k,
        by_layer=by_layer,
    )
    return pb.LocalizeNeuronsRequest(sparse_probe=method)


def _gradient(facts: FactsLike, controls: FactsLike, all_tokens: bool) -> pb.GradientMethod:
    listed = fact_messages(facts, "facts")
    if not listed:
        raise ValueError("facts: give at least one")
    return build(pb.GradientMethod, facts=listed, controls=fact_messages(controls, "controls"), all_tokens=all_tokens)
