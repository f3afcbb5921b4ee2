"""Turns probe messages into dataclasses of analysis/probes/job.py and back. Refusals name fields."""

from dataclasses import asdict

from patchclamp.v1 import probe_pb2 as pb
from patchclamp.v1 import program_pb2, steering_pb2
from patchclamp_server.analysis.probes.job import ProbeTraining, TrainedProbe
from patchclamp_server.analysis.probes.registry import METHODS
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.probes import LOGISTIC, MAX_CLASSES, PROTOTYPE, RIDGE
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, finite, known
from patchclamp_server.interventions.scopes import check_scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.extraction_inputs import POOLINGS
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts
from patchclamp_server.rpc.codecs.program import decode_scope, decode_site
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_HOLDOUT_FRACTION = 0.4
MIN_PENALTY, MAX_PENALTY = 1e-9, 1e12
METHOD_NAMES: dict[int, str] = {pb.ProbeMethod.Value(f"PROBE_METHOD_{name.upper()}"): name for name in METHODS}
METHOD_NAMES[pb.PROBE_METHOD_UNSPECIFIED] = LOGISTIC


def decode_training(
    request: pb.TrainProbeRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> ProbeTraining:
    """Returns a checked job. It may load a corpus: call it in a thread."""
    method = known(request.method, METHOD_NAMES, "method", pb.ProbeMethod.keys()[1:])
    site = decode_site(request.site, "site") if request.site != program_pb2.SITE_UNSPECIFIED else Site.RESID_POST
    if site not in info.sites:
        has = ", ".join(s.value for s in info.sites)
        raise InvalidArgument("site", f"{info.architecture} has no site {site.value}; it has {has}")
    for i, layer in enumerate(request.layers):
        count(layer, f"layers[{i}]", high=info.n_layers - 1)
    fraction = request.holdout_fraction if request.HasField("holdout_fraction") else DEFAULT_HOLDOUT_FRACTION
    if not 0 < fraction < 1:
        raise InvalidArgument("holdout_fraction", f"expected a number between 0 and 1, both excluded, got {fraction:g}")
    scope = decode_scope(request.scope, "scope")
    check_scope(scope, "scope", vocab_size=info.vocab_size, has_roles=False)
    strength = None
    if request.HasField("penalty"):
        if method == PROTOTYPE:
            message = "prototypes have none: their temperature is chosen by cross-validation; leave it out"
            raise InvalidArgument("penalty", message)
        strength = finite(request.penalty, "penalty", low=MIN_PENALTY, high=MAX_PENALTY)
    description, tags = decode_label(request)
    texts = decode_texts(request.texts, "texts", prompts, store, info)
    labels = texts.corpus.labels
    if method == RIDGE and request.target:
        raise InvalidArgument("target", "a ridge probe has numbers, and none of them is a target; leave it empty")
    if method != RIDGE and len(labels) > MAX_CLASSES:
        raise InvalidArgument("texts", f"expected at most {MAX_CLASSES} labels, got {len(labels)}")
    return ProbeTraining(
        method=method,
        texts=texts,
        target=texts.label(request.target, "target") if request.target else 0,
        site=site,
        layers=tuple(sorted(distinct(request.layers, "layers"))),
        pooling=known(request.pooling, POOLINGS, "pooling", steering_pb2.TokenPooling.keys()[1:]),
        scope=scope,
        strength=strength,
        holdout_fraction=fraction,
        seed=request.seed,
        description=description,
        tags=tags,
    )


def encode_training(event: Progress | TrainedProbe) -> pb.TrainProbeResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.TrainProbeResponse)
    bins = [steering_pb2.ReliabilityBin(**asdict(each)) for each in event.report.reliability]
    figures = {name: value for name, value in asdict(event.report).items() if name != "reliability"}
    result = pb.TrainedProbe(
        artifact=encode_artifact(event.artifact),
        labels=event.labels,
        layers=event.layers,
        report=pb.ProbeReport(reliability=bins, **figures),
        by_layer=[pb.ProbeLayer(layer=layer, score=score) for layer, score in event.by_layer],
        warnings=event.warnings,
    )
    return pb.TrainProbeResponse(result=result)
