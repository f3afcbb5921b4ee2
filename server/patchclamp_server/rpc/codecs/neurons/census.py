"""Messages of CensusNeurons ↔ analysis/neurons/census.py."""

from collections.abc import Sequence
from typing import Any

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.census import Census, CensusProgress, CensusResult, class_tags
from patchclamp_server.analysis.neurons.census_classes import NeuronClass, Rules
from patchclamp_server.analysis.neurons.census_sets import Detector, LayerRow, Positional
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.artifacts.validation import check_tag
from patchclamp_server.errors import about
from patchclamp_server.interventions.field_checks import count, finite
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.artifact import decode_label
from patchclamp_server.rpc.codecs.neurons.common import (
    MAX_THRESHOLD,
    decode_layers,
    decode_neuron_site,
    encode_neuron,
    encode_stored,
)
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_NGRAM, MAX_NGRAM = 2, 2
DEFAULT_BINS, MAX_BINS = 32, 128
DEFAULT_CHECKPOINT_TOKENS, MIN_CHECKPOINT_TOKENS = 50_000, 64
CLASSES: dict[NeuronClass, "pb.NeuronClass.ValueType"] = {
    each: pb.NeuronClass.Value(f"NEURON_CLASS_{each.name}") for each in NeuronClass
}


def decode_census(
    request: pb.CensusNeuronsRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> Census:
    """Returns a checked job, whose tags can be set. It may tokenise and load a corpus: call it in a thread."""
    layers = decode_layers(request.layers, info)
    gated = Site.MLP_GATE if Site.MLP_GATE in info.sites else Site.MLP_POST
    site = decode_neuron_site(request.site, info, default=gated)
    # A size is below no negative threshold.
    low = 0.0 if request.magnitude else -MAX_THRESHOLD
    threshold = finite(request.threshold, "threshold", low=low, high=MAX_THRESHOLD)
    rules = _rules(request)
    ngram = count(request.ngram or DEFAULT_NGRAM, "ngram", low=1, high=MAX_NGRAM)
    every = count(
        request.checkpoint_tokens or DEFAULT_CHECKPOINT_TOKENS, "checkpoint_tokens", low=MIN_CHECKPOINT_TOKENS
    )
    bins = count(request.position_bins or DEFAULT_BINS, "position_bins", low=2, high=MAX_BINS)
    description, tags = decode_label(request)
    _check_tags(tags, store)
    texts = decode_texts(request.texts, "texts", prompts, store, info)
    return Census(
        texts,
        layers,
        site,
        threshold,
        request.magnitude,
        ngram,
        bins,
        rules,
        every,
        request.restart,
        description,
        tags.names,
        tags.replace,
    )


def encode_census(event: CensusProgress | CensusResult, *, prompts: PromptEncoder) -> pb.CensusNeuronsResponse:
    if isinstance(event, CensusProgress):
        progress = pb.NeuronProgress(stage="tokens", done=event.done, total=event.total, resumed=event.resumed)
        return pb.CensusNeuronsResponse(progress=progress)
    found = event.classes
    result = pb.NeuronCensus(
        tokens=event.tokens,
        texts=event.texts,
        resumed_tokens=event.resumed_tokens,
        tokens_per_second=event.tokens_per_second,
        layers=[_layer(row) for row in found.layers],
        classes=[
            pb.CensusClass(neuron_class=CLASSES[each], stored=encode_stored(stored))
            for each, stored in event.stored.items()
        ],
        detectors=[_detector(each, prompts) for each in found.detectors],
        positional=[_positional(each) for each in found.positional],
        warnings=event.warnings,
    )
    return pb.CensusNeuronsResponse(result=result)


def _rules(request: pb.CensusNeuronsRequest) -> Rules:
    default = Rules()

    # The generated types know the names as literals alone.
    def share(name: Any, otherwise: float, low: float = 0.0) -> float:
        given: float = getattr(request, name)
        return finite(given if request.HasField(name) else otherwise, name, low=low, high=1.0)

    return Rules(
        rare_below=share("rare_below", default.rare_below),
        always_from=share("always_from", default.always_from),
        # Of half the firings and more there is one key alone, and half the occurrences are no detector.
        recall=share("detector_recall", default.recall, 0.5),
        elsewhere=share("detector_elsewhere", default.elsewhere),
        min_occurrences=count(request.min_occurrences or default.min_occurrences, "min_occurrences", low=1),
        positional_from=share("positional_from", default.positional_from),
    )


def _check_tags(tags: Tags, store: ArtifactStore) -> None:
    """Checks what the tags of all classes will be: nothing is counted for what cannot be stored."""
    for i, name in enumerate(tags.names):
        with about(f"tags[{i}]"):
            for each in NeuronClass:
                own = class_tags((name,), each, replace=tags.replace)
                check_tag(own.names[0])
                store.access.put(own.names)
                store.check_tags(own)


def _layer(row: LayerRow) -> pb.LayerCensus:
    def members(each: NeuronClass) -> int:
        return row.members.get(each, 0)

    return pb.LayerCensus(
        layer=row.layer,
        neurons=row.neurons,
        dead=members(NeuronClass.DEAD),
        rare=members(NeuronClass.RARE),
        always=members(NeuronClass.ALWAYS),
        token_detectors=members(NeuronClass.TOKEN),
        ngram_detectors=members(NeuronClass.NGRAM),
        positional=members(NeuronClass.POSITIONAL),
        mean_rate=row.mean_rate,
    )


def _detector(found: Detector, prompts: PromptEncoder) -> pb.TokenDetector:
    return pb.TokenDetector(
        neuron=encode_neuron(found.neuron),
        token_ids=found.tokens,
        text=_text(found.tokens, prompts),
        occurrences=found.occurrences,
        fired=found.fired,
        recall=found.recall,
        elsewhere=found.elsewhere,
    )


def _text(tokens: Sequence[int], prompts: PromptEncoder) -> str:
    return "".join(prompts.pieces(tokens))


def _positional(found: Positional) -> pb.PositionalNeuron:
    return pb.PositionalNeuron(neuron=encode_neuron(found.neuron), bits=found.bits, rates=found.rates)
