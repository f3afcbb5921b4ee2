"""Messages of LocalizeNeurons ↔ analysis/neurons/localize/."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

from patchclamp.v1 import neuron_pb2 as pb
from patchclamp_server.analysis.neurons.localize.methods import (
    ActivationEntropy,
    AveragePrecision,
    ContrastSet,
    Gradients,
    Judged,
    Localization,
    Localized,
    Method,
    ProbeReport,
    SparseProbes,
    WelchT,
)
from patchclamp_server.analysis.neurons.localize.sparse_probe import Ranker
from patchclamp_server.analysis.neurons.targets import Example, LogProbability
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.validation import check_tag
from patchclamp_server.errors import InvalidArgument, about
from patchclamp_server.interventions.field_checks import chosen, count, distinct, finite, known, required
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.artifact import decode_description, decode_tags
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.neurons.common import (
    MAX_THRESHOLD,
    decode_layers,
    decode_neuron_site,
    encode_neuron,
    encode_stored,
)
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

MAX_FACTS = 1024
# One rule has so many: integrated.py.
MIN_STEPS, MAX_STEPS = 7, 4096
MAX_GAP = 0.5
MAX_SUBSETS = 100
MAX_K = 1024
MAX_PROBES = 32
MAX_SIZE = 1_000_000
DEFAULT_RANDOM_SETS, MAX_RANDOM_SETS = 20, 1000

POOLINGS: dict[int, Pooling] = {pb.NeuronPooling.Value(f"NEURON_POOLING_{p.name}"): p for p in Pooling}
RANKERS: dict[int, Ranker] = {pb.NeuronRanker.Value(f"NEURON_RANKER_{r.name}"): r for r in Ranker}


def decode_localization(
    request: pb.LocalizeNeuronsRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> Localization:
    """Returns a checked job. It tokenises prompts that are no texts, and may load a corpus: call it in a thread."""
    name = chosen(request, "method", "")
    layers = decode_layers(request.layers, info)
    method = _Methods(prompts, store, info).decode(name, getattr(request, name))
    site = decode_neuron_site(request.site, info)
    if isinstance(method, Gradients) and site is not Site.MLP_POST:
        raise InvalidArgument("site", f"{name} is of mlp_post, not {site.value}")
    default = Localization(name, method, layers)
    holdout = request.holdout_fraction if request.HasField("holdout_fraction") else default.holdout_fraction
    if not 0.0 < finite(holdout, "holdout_fraction") < 1.0:
        raise InvalidArgument("holdout_fraction", f"expected a number above 0 and below 1, got {holdout:g}")
    size = _size(request, len(layers) * info.d_ff)
    if size is not None and isinstance(method, SparseProbes):
        raise InvalidArgument(request.WhichOneof("size") or "", "a probe has the neurons of its sparse_probe.k")
    job = Localization(
        name,
        method,
        layers,
        site,
        size,
        holdout,
        count(request.random_sets or DEFAULT_RANDOM_SETS, "random_sets", low=1, high=MAX_RANDOM_SETS),
        request.seed,
        decode_description(request.description, "description"),
        decode_tags(request.tags, request.replace_tags).names,
        request.replace_tags,
    )
    _check_tags(job, store)
    return job


def _check_tags(job: Localization, store: ArtifactStore) -> None:
    """Names of the sets that are no tags, or are taken, are refused by the tag that was asked for."""
    for i, name in enumerate(job.tag_names):
        with about(f"tags[{i}]"):
            own = replace(job, tag_names=(name,)).tags
            for tag in own.names:
                check_tag(tag)
            store.check_tags(own)


def encode_localization(event: Progress | Localized) -> pb.LocalizeNeuronsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.LocalizeNeuronsResponse)
    result = pb.LocalizedNeurons(
        sets=map(_set, event.sets),
        texts=event.texts,
        tokens=event.tokens,
        steps=event.steps,
        completeness_gap=event.completeness_gap,
        probes=map(_probe, event.probes),
        warnings=event.warnings,
    )
    return pb.LocalizeNeuronsResponse(result=result)


def _set(judged: Judged) -> pb.LocalizedSet:
    return pb.LocalizedSet(
        label=judged.label,
        stored=encode_stored(judged.stored),
        measure=judged.measure,
        heldout=judged.heldout,
        random=judged.random,
        random_mean=fmean(judged.random),
        random_deviation=pstdev(judged.random),
        layer_mean=judged.layer_mean,
        layer_max=judged.layer_max,
    )


def _probe(report: ProbeReport) -> pb.SparseProbe:
    return pb.SparseProbe(
        k=report.k,
        layer=report.layer,
        f1=report.probe.f1,
        precision=report.probe.precision,
        recall=report.probe.recall,
        random_f1_mean=fmean(report.random_f1),
        random_f1_deviation=pstdev(report.random_f1),
        neurons=[encode_neuron(neuron) for neuron in report.neurons],
        weights=report.probe.weights,
        intercept=report.probe.intercept,
    )


def _size(request: pb.LocalizeNeuronsRequest, units: int) -> int | None:
    match request.WhichOneof("size"):
        case "top_k":
            return count(request.top_k, "top_k", low=1, high=min(MAX_SIZE, units))
        case "share":
            if not 0.0 < finite(request.share, "share") <= 1.0:
                raise InvalidArgument("share", f"expected a number above 0 and at most 1, got {request.share:g}")
            return max(1, round(request.share * units))
        case _:
            return None


class _Methods:
    """Decodes the message of each method; fields are named below its own."""

    def __init__(self, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo) -> None:
        self._prompts, self._store, self._info = prompts, store, info

    def decode(self, name: str, proto: Any) -> Method:
        match name:
            case "average_precision":
                texts = self._texts(proto, name)
                target = texts.label(proto.target, f"{name}.target")
                return AveragePrecision(texts, target, _pooling(proto, name, Pooling.LAST_TOKEN))
            case "activation_entropy":
                return self._entropy(proto, name)
            case "welch_t":
                texts = self._texts(proto, name)
                return WelchT(texts, *_sides(texts, proto, name), _pooling(proto, name, Pooling.MEAN))
            case "contrast_set":
                return self._contrast(proto, name)
            case "sparse_probe":
                return self._probes(proto, name)
            case _:
                return self._gradients(proto, name)

    def _texts(self, proto: Any, name: str) -> TextSource:
        required(proto, "texts", name)
        return decode_texts(proto.texts, f"{name}.texts", self._prompts, self._store, self._info)

    def _entropy(self, proto: pb.ActivationEntropyMethod, name: str) -> ActivationEntropy:
        texts = self._texts(proto, name)
        default = ActivationEntropy(texts)
        threshold = proto.threshold if proto.HasField("threshold") else default.threshold
        activity = proto.activity if proto.HasField("activity") else default.activity
        targets = enumerate(distinct(proto.targets, f"{name}.targets"))
        return ActivationEntropy(
            texts,
            finite(threshold, f"{name}.threshold", low=-MAX_THRESHOLD, high=MAX_THRESHOLD),
            finite(activity, f"{name}.activity", low=0.0, high=1.0),
            tuple(texts.label(label, f"{name}.targets[{i}]") for i, label in targets),
        )

    def _contrast(self, proto: pb.ContrastSetMethod, name: str) -> ContrastSet:
        texts = self._texts(proto, name)
        target, contrast = _sides(texts, proto, name)
        subsets = count(proto.subsets or ContrastSet.subsets, f"{name}.subsets", low=1, high=MAX_SUBSETS)
        return ContrastSet(
            texts,
            target,
            contrast,
            finite(proto.z if proto.HasField("z") else ContrastSet.z, f"{name}.z"),
            subsets,
            count(proto.agreement or subsets, f"{name}.agreement", low=1, high=subsets),
            _pooling(proto, name, Pooling.MEAN),
        )

    def _probes(self, proto: pb.SparseProbeMethod, name: str) -> SparseProbes:
        texts = self._texts(proto, name)
        # As many others are left in each layer for random probes.
        most = min(MAX_K, self._info.d_ff // 2)
        if len(proto.k) > MAX_PROBES:
            raise InvalidArgument(f"{name}.k", f"expected at most {MAX_PROBES} sizes, got {len(proto.k)}")
        for i, k in enumerate(proto.k):
            count(k, f"{name}.k[{i}]", low=1, high=most)
        ranker = Ranker.MEAN_DIFFERENCE
        if proto.ranker:
            ranker = known(proto.ranker, RANKERS, f"{name}.ranker", pb.NeuronRanker.keys()[1:])
        return SparseProbes(
            texts,
            texts.label(proto.target, f"{name}.target"),
            ranker,
            distinct(proto.k, f"{name}.k") or tuple(k for k in SparseProbes.k if k <= most),
            proto.by_layer,
            _pooling(proto, name, Pooling.MAX),
        )

    def _gradients(self, proto: pb.GradientMethod, name: str) -> Gradients:
        if not proto.facts:
            raise InvalidArgument(f"{name}.facts", "expected at least one fact")
        integrated = name == "integrated_gradients"
        given = {"max_steps": bool(proto.max_steps), "completeness": proto.HasField("completeness")}
        for field, is_given in given.items():
            if is_given and not integrated:
                raise InvalidArgument(f"{name}.{field}", f"is of integrated_gradients; the method is {name}")
        completeness = proto.completeness if proto.HasField("completeness") else Gradients.completeness
        return Gradients(
            self._facts(proto.facts, f"{name}.facts"),
            self._facts(proto.controls, f"{name}.controls"),
            integrated,
            proto.all_tokens,
            count(proto.max_steps or Gradients.max_steps, f"{name}.max_steps", low=MIN_STEPS, high=MAX_STEPS),
            finite(completeness, f"{name}.completeness", low=1e-6, high=MAX_GAP),
        )

    def _facts(self, protos: Sequence[pb.Fact], field: str) -> tuple[Example, ...]:
        if len(protos) > MAX_FACTS:
            raise InvalidArgument(field, f"expected at most {MAX_FACTS} facts, got {len(protos)}")
        facts = []
        for i, proto in enumerate(protos):
            path = f"{field}[{i}]"
            if proto.candidates:
                raise InvalidArgument(f"{path}.candidates", "an answer is attributed by itself; leave candidates out")
            required(proto, "prompt", path)
            prompt = decode_prompt(proto.prompt, self._prompts, f"{path}.prompt").ids
            answer = self._prompts.encode_continuation(proto.answer, f"{path}.answer", prompt)
            if not answer:
                raise InvalidArgument(f"{path}.answer", "is empty; at least one token is attributed")
            facts.append(Example(prompt, LogProbability(answer)))
        return tuple(facts)


def _sides(texts: TextSource, proto: Any, name: str) -> tuple[int, int | None]:
    target = texts.label(proto.target, f"{name}.target")
    contrast = texts.label(proto.contrast, f"{name}.contrast") if proto.contrast else None
    if contrast == target:
        raise InvalidArgument(f"{name}.contrast", "is the target; expected another label")
    return target, contrast


def _pooling(proto: Any, name: str, default: Pooling) -> Pooling:
    if not proto.pooling:
        return default
    return known(proto.pooling, POOLINGS, f"{name}.pooling", pb.NeuronPooling.keys()[1:])
