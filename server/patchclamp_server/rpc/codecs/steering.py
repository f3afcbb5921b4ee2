"""Turns steering messages into dataclasses of analysis/steering/job.py and back. Refusals name fields."""

from collections.abc import Sequence
from dataclasses import asdict

from patchclamp.v1 import program_pb2
from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.analysis.steering.evidence import training_pairs
from patchclamp_server.analysis.steering.job import Extraction, Result, TokenPair
from patchclamp_server.analysis.steering.registry import METHODS
from patchclamp_server.analysis.steering.token_projections import TokenProjections
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, known, required
from patchclamp_server.interventions.pooling import Pooling
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import RESIDUAL_SITES, Site
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.program import decode_site
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

MAX_PAIRS = 4096
DEFAULT_HOLDOUT_FRACTION = 0.25

METHOD_NAMES: dict[int, str] = {
    pb.ExtractionMethod.Value(f"EXTRACTION_METHOD_{name.upper()}"): name for name in METHODS
}
POOLINGS: dict[int, Pooling] = {
    # The last token has read the whole example.
    pb.TOKEN_POOLING_UNSPECIFIED: Pooling.LAST_TOKEN,
    pb.TOKEN_POOLING_LAST_TOKEN: Pooling.LAST_TOKEN,
    pb.TOKEN_POOLING_MEAN: Pooling.MEAN,
}


def decode_extraction(request: pb.ExtractVectorsRequest, prompts: PromptEncoder, info: ModelInfo) -> Extraction:
    """Returns a checked job. Tokenises every pair: call it in a thread.

    Raises InvalidArgument, and FailedPrecondition for a chat where the model has no template.
    """
    method = _method(request.method)
    site = _site(request.site, info)
    layers = _layers(request.layers, info)
    pooling = known(request.pooling, POOLINGS, "pooling", pb.TokenPooling.keys()[1:])
    fraction = request.holdout_fraction if request.HasField("holdout_fraction") else DEFAULT_HOLDOUT_FRACTION
    if not 0 < fraction < 1:
        raise InvalidArgument("holdout_fraction", f"expected a number between 0 and 1, both excluded, got {fraction:g}")
    description, tags = decode_label(request)
    if len(request.pairs) > MAX_PAIRS:
        raise InvalidArgument("pairs", f"expected at most {MAX_PAIRS}, got {len(request.pairs)}")
    training_pairs(len(request.pairs), fraction)
    return Extraction(
        method=method,
        pairs=_pairs(request.pairs, prompts),
        site=site,
        layers=layers,
        pooling=pooling,
        holdout_fraction=fraction,
        seed=request.seed,
        description=description,
        tags=tags,
    )


def _method(number: int) -> str:
    names = [pb.ExtractionMethod.Name(each) for each in METHOD_NAMES]
    if number and number in pb.ExtractionMethod.values() and number not in METHOD_NAMES:
        what = pb.ExtractionMethod.Name(number)
        raise InvalidArgument("method", f"{what} is in the contract but not served yet; expected {', '.join(names)}")
    return known(number, METHOD_NAMES, "method", names)


def encode_extraction(event: Progress | Result) -> pb.ExtractVectorsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.ExtractVectorsResponse)
    layers = [
        pb.LayerEvidence(
            layer=e.layer,
            heldout_accuracy=e.heldout_accuracy,
            random_accuracy=e.random_accuracy,
            norm=e.norm,
            activation_norm=e.activation_norm,
            explained_variance=e.explained_variance,
            midpoint=e.midpoint,
            margin=e.margin,
            positive_tokens=_encode_tokens(e.positive_tokens),
            negative_tokens=_encode_tokens(e.negative_tokens),
            pooled_tokens=e.pooled_tokens,
            tokens_left_out=e.tokens_left_out,
            participation_ratio=e.participation_ratio,
        )
        for e in event.layers
    ]
    artifact = encode_artifact(event.artifact)
    result = pb.ExtractionResult(artifact=artifact, layers=layers, best_layer=event.best_layer, warnings=event.warnings)
    return pb.ExtractVectorsResponse(result=result)


def _encode_tokens(found: TokenProjections | None) -> pb.TokenProjections | None:
    """Returns None for examples of one token, of which none is left."""
    return pb.TokenProjections(**asdict(found)) if found is not None and found.tokens else None


def _site(number: int, info: ModelInfo) -> Site:
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


def _pairs(pairs: Sequence[pb.ContrastPair], prompts: PromptEncoder) -> tuple[TokenPair, ...]:
    decoded = []
    for i, pair in enumerate(pairs):
        for side in ("positive", "negative"):
            required(pair, side, f"pairs[{i}]")
        decoded.append(
            TokenPair(
                decode_prompt(pair.positive, prompts, f"pairs[{i}].positive").ids,
                decode_prompt(pair.negative, prompts, f"pairs[{i}].negative").ids,
            )
        )
    return tuple(decoded)
