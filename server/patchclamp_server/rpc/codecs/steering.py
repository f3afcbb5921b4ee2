"""Turns steering messages into the jobs of analysis/steering and back. Refusals name fields."""

from collections.abc import Sequence
from dataclasses import asdict

from patchclamp.v1 import program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.evidence import LayerEvidence
from patchclamp_server.analysis.steering.registry import INPUTS, METHODS
from patchclamp_server.analysis.steering.result import Result
from patchclamp_server.analysis.steering.run import ExtractionJob
from patchclamp_server.analysis.steering.token_projections import TokenProjections
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, known
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import RESIDUAL_SITES, Site
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.extraction_inputs import Inputs
from patchclamp_server.rpc.codecs.program import decode_site
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_HOLDOUT_FRACTION = 0.25

METHOD_NAMES: dict[int, str] = {pb.ExtractionMethod.Value(f"EXTRACTION_METHOD_{name.upper()}"): name for name in INPUTS}
# Fields that say what a vector is made of.
INPUT_FIELDS = ("pairs", "texts", "target", "contrast", "demonstrations", "definition", "word_pairs")
# Fields of methods that compare pooled examples.
POOLED_FIELDS = ("pooling", "scope")
# Methods that are trained, which take `training`.
TRAINED = ("reft_r1",)


def decode_extraction(
    request: pb.ExtractVectorsRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> ExtractionJob:
    """Returns a checked job. Tokenises what is no text of a label, and may load a corpus: call it in a thread.

    Raises InvalidArgument, and FailedPrecondition for a chat where the model has no template.
    """
    method = known(request.method, METHOD_NAMES, "method", pb.ExtractionMethod.keys()[1:])
    _check_inputs(request, method)
    site = decode_residual_site(request.site, info)
    layers = _layers(request.layers, info)
    fraction = request.holdout_fraction if request.HasField("holdout_fraction") else DEFAULT_HOLDOUT_FRACTION
    if not 0 < fraction < 1:
        raise InvalidArgument("holdout_fraction", f"expected a number between 0 and 1, both excluded, got {fraction:g}")
    description, tags = decode_label(request)
    inputs = Inputs(request, prompts, store, info, site, layers, fraction, description, tags)
    match method:
        case "task_vector":
            return inputs.task_vector()
        case "definition":
            return inputs.definition()
        case "causal_inner_product":
            return inputs.causal_inner_product()
        case "reft_r1":
            return inputs.reft_r1()
        case _:
            return inputs.extraction(method)


def encode_extraction(event: Progress | Result) -> pb.ExtractVectorsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.ExtractVectorsResponse)
    result = pb.ExtractionResult(
        artifact=encode_artifact(event.artifact),
        layers=map(encode_evidence, event.layers),
        best_layer=event.best_layer,
        warnings=event.warnings,
        measure=event.measure,
        baselines=event.baselines,
    )
    return pb.ExtractVectorsResponse(result=result)


def encode_evidence(e: LayerEvidence) -> pb.LayerEvidence:
    return pb.LayerEvidence(
        layer=e.layer,
        heldout_accuracy=e.heldout_accuracy,
        random_accuracy=e.random_accuracy,
        norm=e.norm,
        activation_norm=e.activation_norm,
        explained_variance=e.explained_variance,
        midpoint=0.0 if e.midpoint is None else e.midpoint,
        margin=e.margin,
        positive_tokens=_encode_tokens(e.positive_tokens),
        negative_tokens=_encode_tokens(e.negative_tokens),
        pooled_tokens=e.pooled_tokens,
        tokens_left_out=e.tokens_left_out,
        participation_ratio=e.participation_ratio,
        training=None if e.training is None else pb.TrainingEvidence(**asdict(e.training)),
    )


def _encode_tokens(found: TokenProjections | None) -> pb.TokenProjections | None:
    """Returns None for examples of one token, of which none is left."""
    return pb.TokenProjections(**asdict(found)) if found is not None and found.tokens else None


def _check_inputs(request: pb.ExtractVectorsRequest, method: str) -> None:
    """Refuses what the method does not take, and two things of which it takes one."""
    present = {field.name for field, _ in request.ListFields()}
    alternatives = INPUTS[method]
    named = " or ".join(" and ".join(names) for names in alternatives)
    own = {name for names in alternatives for name in names}
    if "texts" in own:
        own |= {"target"} if method == "mean_centred" else {"target", "contrast"}
    for name in INPUT_FIELDS:
        if name in present and name not in own:
            takers = [other for other, needed in INPUTS.items() if any(name in names for names in needed)]
            others = f"; {name} are of {', '.join(takers)}" if takers else ""
            raise InvalidArgument(name, f"{method} takes {named}, and no {name}{others}")
    for name in POOLED_FIELDS:
        if name in present and method not in METHODS:
            raise InvalidArgument(
                name, f"is of methods that compare pooled examples; {method} is none, it takes {named}"
            )
    if "training" in present and method not in TRAINED:
        raise InvalidArgument("training", f"is of methods that are trained, and {method} is not")
    given = [names for names in alternatives if present & set(names)]
    if len(given) > 1:
        raise InvalidArgument(given[1][0], f"{given[0][0]} are given as well; expected one of {named}")
    for name in (given or alternatives)[0]:
        # Too few of several are refused where they are counted.
        if name not in present and name in ("texts", "definition"):
            raise InvalidArgument(name, f"required: {method} takes {named}")
    if "texts" not in present:
        for name in ("target", "contrast"):
            if name in present:
                raise InvalidArgument(name, "is a label of texts, and there are none")


def decode_residual_site(number: int, info: ModelInfo) -> Site:
    site = decode_site(number, "site") if number != program_pb2.SITE_UNSPECIFIED else Site.RESID_POST
    accepted = [s for s in RESIDUAL_SITES if s in info.sites]
    if site not in accepted:
        names = ", ".join(s.value for s in accepted)
        raise InvalidArgument("site", f"expected a residual site of {info.architecture} ({names}), got {site.value}")
    return site


def _layers(layers: Sequence[int], info: ModelInfo) -> tuple[int, ...]:
    for i, layer in enumerate(layers):
        count(layer, f"layers[{i}]", high=info.n_layers - 1)
    return tuple(sorted(distinct(layers, "layers"))) or tuple(range(info.n_layers))
