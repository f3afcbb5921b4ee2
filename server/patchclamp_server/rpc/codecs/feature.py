"""Messages of FeatureService ↔ analysis/features/search.py."""

from patchclamp.v1 import feature_pb2 as pb
from patchclamp.v1 import neuron_pb2
from patchclamp_server.analysis.features.search import (
    ByContrast,
    ByDirection,
    ByLabel,
    ByTokens,
    Event,
    FeatureSearch,
    FoundFeature,
)
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.autoencoders import Autoencoder, open_autoencoder
from patchclamp_server.artifacts.feature_labels import FeatureLabels
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import FailedPrecondition, InvalidArgument, about
from patchclamp_server.interventions.field_checks import chosen, count, distinct
from patchclamp_server.interventions.kinds.vectors import decode_vector
from patchclamp_server.interventions.resolver import Resolver
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.neurons.texts import decode_texts, text_fields
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.text.prompt import PromptEncoder

DEFAULT_FEATURES, MAX_FOUND = 20, 1000
MAX_TOKENS = 1024
MAX_LABEL_CHARACTERS = 1000


def decode_search(
    request: pb.SearchFeaturesRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> FeatureSearch:
    """Returns a checked job. It opens artifacts and may tokenise: call it in a thread."""
    by = chosen(request, "by", "")
    autoencoder_info, autoencoder = open_autoencoder(request.autoencoder, store, info, "autoencoder")
    top_k = count(request.top_k or DEFAULT_FEATURES, "top_k", low=1, high=MAX_FOUND)
    labels = _labels(request.labels, store, autoencoder_info.id) if request.labels else None
    if by == "label":
        if labels is None:
            raise InvalidArgument("labels", "give the feature_labels that the text is sought in")
        if not 1 <= len(request.label) <= MAX_LABEL_CHARACTERS:
            raise InvalidArgument("label", f"expected 1 to {MAX_LABEL_CHARACTERS} characters, got {len(request.label)}")
        return FeatureSearch(autoencoder, ByLabel(request.label), labels, top_k)
    if by == "direction":
        return FeatureSearch(autoencoder, _direction(request, store, info, autoencoder), labels, top_k)
    if by == "tokens":
        return FeatureSearch(autoencoder, _tokens(request.tokens, prompts, store, info), labels, top_k)
    return FeatureSearch(autoencoder, _contrast(request.contrast, prompts, store, info), labels, top_k)


def search_fields(request: pb.SearchFeaturesRequest) -> dict[str, str]:
    """Returns the fields of the request by those that a job over its texts names."""
    by = request.WhichOneof("by")
    return text_fields(getattr(request, by).texts, f"{by}.texts") if by in ("contrast", "tokens") else {}


def encode_found(event: Event, *, prompts: PromptEncoder) -> pb.SearchFeaturesResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.SearchFeaturesResponse)
    found = pb.FoundFeatures(
        features=[_feature(feature, prompts) for feature in event.features],
        active_features=event.active_features,
        tokens=event.tokens,
        explained_variance=event.explained_variance,
        mean_active=event.mean_active,
    )
    return pb.SearchFeaturesResponse(result=found)


def _feature(found: FoundFeature, prompts: PromptEncoder) -> pb.FoundFeature:
    promotes = [
        neuron_pb2.DecodedToken(id=token.id, text=prompts.piece(token.id), product=token.product, effect=token.product)
        for token in found.promotes
    ]
    return pb.FoundFeature(
        feature=found.feature,
        score=found.score,
        target_mean=found.target_mean,
        contrast_mean=found.contrast_mean,
        rate=found.rate,
        label=found.label,
        promotes=promotes,
    )


def _labels(ref: str, store: ArtifactStore, autoencoder: str) -> FeatureLabels:
    with about("labels"):
        artifact = store.get(ref)
    if artifact.info.kind is not ArtifactKind.FEATURE_LABELS:
        raise InvalidArgument("labels", f"{ref} is a {artifact.info.kind.value}, not feature_labels")
    labels = FeatureLabels(artifact)
    if labels.autoencoder != autoencoder:
        raise FailedPrecondition("labels", f"{ref} names features of {labels.autoencoder}, not of {autoencoder}")
    return labels


def _contrast(proto: pb.FeatureContrast, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo) -> ByContrast:
    texts = decode_texts(proto.texts, "contrast.texts", prompts, store, info)
    target = texts.label(proto.target, "contrast.target")
    if not proto.contrast:
        if len(texts.corpus.labels) < 2:
            raise InvalidArgument("contrast.texts", "expected texts of two labels or more")
        return ByContrast(texts, target)
    contrast = texts.label(proto.contrast, "contrast.contrast")
    if contrast == target:
        raise InvalidArgument("contrast.contrast", f"expected another label than the target, {proto.target!r:.80}")
    return ByContrast(texts, target, contrast)


def _tokens(proto: pb.FeatureTokens, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo) -> ByTokens:
    if not 1 <= len(proto.tokens) <= MAX_TOKENS:
        raise InvalidArgument("tokens.tokens", f"expected 1 to {MAX_TOKENS} tokens, got {len(proto.tokens)}")
    ids = []
    for i, text in enumerate(distinct(proto.tokens, "tokens.tokens")):
        token = prompts.token_of(text)
        if token is None:
            message = f"{text!r:.80} is not one token; spell it as it stands in a text, often with a space before it"
            raise InvalidArgument(f"tokens.tokens[{i}]", message)
        ids.append(token)
    return ByTokens(decode_texts(proto.texts, "tokens.texts", prompts, store, info), tuple(ids))


def _direction(
    request: pb.SearchFeaturesRequest, store: ArtifactStore, info: ModelInfo, autoencoder: Autoencoder
) -> ByDirection:
    spec = autoencoder.spec
    rows = Resolver(info, store).vectors(
        decode_vector(request.direction, "direction"),
        spec.output_site,
        (spec.output_layer,),
        autoencoder.output_width,
        "direction",
        unit=True,
    )
    return ByDirection(rows[spec.output_layer][0])
