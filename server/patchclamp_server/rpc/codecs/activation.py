"""Messages of ReadActivations ↔ analysis/activation_reading."""

from typing import Any

from google.protobuf import json_format

from patchclamp.v1 import activation_pb2 as pb
from patchclamp_server.analysis.activation_reading.job import (
    ActivationReading,
    Event,
    LabelMean,
    Moments,
    ReadingResult,
)
from patchclamp_server.analysis.activation_reading.reductions import Reduce
from patchclamp_server.analysis.activation_reading.rows import RowsOfPlace
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import NO_TAGS
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.field_checks import distinct, known
from patchclamp_server.interventions.scopes import check_scope
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.generation import decode_prompt
from patchclamp_server.rpc.codecs.neurons.common import decode_layers
from patchclamp_server.rpc.codecs.neurons.texts import MAX_LISTED_TEXTS, decode_texts, text_fields
from patchclamp_server.rpc.codecs.program import SITE_NUMBERS, decode_program, decode_scope, decode_site
from patchclamp_server.rpc.codecs.progress import encode_progress
from patchclamp_server.rpc.codecs.tensor import decode_activation_dtype, encode_tensor
from patchclamp_server.text.prompt import EncodedPrompt, PromptEncoder

REDUCTIONS: dict[int, Reduce] = {
    pb.ActivationReduction.Value(f"ACTIVATION_REDUCTION_{reduce.name}"): reduce for reduce in Reduce
}
# Covariances are kept in memory, in float64, until the last text.
MAX_COVARIANCE_BYTES = 1 << 30


def decode_reading(
    proto: pb.ReadActivationsRequest,
    prompts: PromptEncoder,
    store: ArtifactStore,
    info: ModelInfo,
    *,
    is_kept: bool = False,
) -> ActivationReading:
    """It tokenises, and may load artifacts: call it in a thread. `is_kept`: all that is sent is kept in memory."""
    source = _source(proto, prompts, store, info)
    has_roles = not isinstance(source, TextSource) and all(prompt.roles is not None for prompt in source)
    scope = decode_scope(proto.scope, "scope")
    check_scope(scope, "scope", vocab_size=info.vocab_size, has_roles=has_roles)
    sites = _sites(proto, info)
    layers = decode_layers(proto.layers, info)
    reduce = Reduce.NONE
    if proto.reduction:
        reduce = known(proto.reduction, REDUCTIONS, "reduction", pb.ActivationReduction.keys()[1:])
    if reduce is Reduce.MOMENTS:
        _check_covariances(sites, layers, info)
    if reduce is Reduce.MEAN_BY_LABEL and not (isinstance(source, TextSource) and source.corpus.labels):
        raise InvalidArgument("reduction", "means by label need texts with labels: groups, or a corpus that has them")
    if proto.store and reduce.of_all_texts:
        raise InvalidArgument("store", f"only rows are stored, and {reduce.value} has none; expected false")
    if is_kept and not (proto.store or reduce.of_all_texts):
        raise InvalidArgument("store", "a detached job keeps no rows; expected true, or a reduction over all texts")
    dtype = decode_activation_dtype(proto.dtype, "dtype")
    description, tags = decode_label(proto) if proto.store else ("", NO_TAGS)
    if not proto.store and (proto.tags or proto.description):
        field = "tags" if proto.tags else "description"
        raise InvalidArgument(field, "is of a stored artifact; expected `store`, or none")
    about: dict[str, Any] = {}
    if proto.HasField("scope"):
        about["scope"] = json_format.MessageToDict(proto.scope, preserving_proto_field_name=True)
    return ActivationReading(
        source=source,
        program=_program(proto, has_roles, store, info),
        sites=sites,
        layers=layers,
        scope=scope,
        reduce=reduce,
        dtype=dtype,
        store=proto.store,
        description=description,
        tags=tags,
        about=about,
    )


def reading_fields(proto: pb.ReadActivationsRequest) -> dict[str, str]:
    """Returns the fields of the request by those that the job names."""
    if proto.prompts:
        return {"prompt": "prompts"}
    return {"prompt": "texts.window_tokens", **text_fields(proto.texts, "texts")}


def _source(
    proto: pb.ReadActivationsRequest, prompts: PromptEncoder, store: ArtifactStore, info: ModelInfo
) -> tuple[EncodedPrompt, ...] | TextSource:
    if bool(proto.prompts) == proto.HasField("texts"):
        raise InvalidArgument("prompts", "give prompts or texts, one of both")
    if proto.HasField("texts"):
        return decode_texts(proto.texts, "texts", prompts, store, info)
    if len(proto.prompts) > MAX_LISTED_TEXTS:
        raise InvalidArgument("prompts", f"expected at most {MAX_LISTED_TEXTS} prompts; store them as a corpus")
    return tuple(decode_prompt(each, prompts, f"prompts[{i}]") for i, each in enumerate(proto.prompts))


def _sites(proto: pb.ReadActivationsRequest, info: ModelInfo) -> tuple[Site, ...]:
    if not proto.sites:
        raise InvalidArgument("sites", "expected at least one site")
    sites = distinct([decode_site(number, f"sites[{i}]") for i, number in enumerate(proto.sites)], "sites")
    for i, site in enumerate(sites):
        if site not in info.sites:
            has = ", ".join(s.value for s in info.sites)
            raise InvalidArgument(f"sites[{i}]", f"{info.architecture} has no site {site.value}; it has {has}")
    return sites


def _program(proto: pb.ReadActivationsRequest, has_roles: bool, store: ArtifactStore, info: ModelInfo) -> BoundProgram:
    if proto.program.readouts:
        raise InvalidArgument("program.readouts", "what is read are `sites`, `layers` and `scope`; expected none")
    if proto.program.abort_when:
        raise InvalidArgument("program.abort_when", "nothing is generated that could end; expected none")
    return bind(decode_program(proto.program), info, store, prompt_roles=() if has_roles else None)


def _check_covariances(sites: tuple[Site, ...], layers: tuple[int, ...], info: ModelInfo) -> None:
    needed = 8 * len(layers) * sum(info.sites[site] ** 2 for site in sites)
    if needed > MAX_COVARIANCE_BYTES:
        message = f"covariances of {len(layers)} layers need {needed} bytes; at most {MAX_COVARIANCE_BYTES} are kept"
        raise InvalidArgument("layers", f"{message}: choose fewer layers or sites")


def encode_reading(event: Event) -> pb.ReadActivationsResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.ReadActivationsResponse)
    if isinstance(event, RowsOfPlace):
        return pb.ReadActivationsResponse(rows=_encode_rows(event))
    if isinstance(event, Moments):
        moments = pb.ActivationMoments(
            site=SITE_NUMBERS[event.site],
            layer=event.layer,
            tokens=event.tokens,
            mean=encode_tensor(event.mean),
            first_row=event.first_row,
            covariance=encode_tensor(event.covariance),
        )
        return pb.ReadActivationsResponse(moments=moments)
    if isinstance(event, LabelMean):
        mean = pb.ActivationMean(
            site=SITE_NUMBERS[event.site],
            layer=event.layer,
            label=event.label,
            tokens=event.tokens,
            mean=encode_tensor(event.mean),
        )
        return pb.ReadActivationsResponse(mean=mean)
    return pb.ReadActivationsResponse(result=_encode_result(event))


def _encode_rows(rows: RowsOfPlace) -> pb.ActivationRows:
    found = pb.ActivationRows(
        site=SITE_NUMBERS[rows.site],
        layer=rows.layer,
        texts=rows.texts.tolist(),
        labels=rows.labels.tolist(),
        positions=rows.positions.tolist(),
        token_ids=rows.token_ids.tolist(),
        tokens=rows.tokens.tolist(),
        lengths=rows.lengths.tolist(),
        values=encode_tensor(rows.values, rows.values.dtype),
    )
    if rows.unit_positions is not None:
        found.unit_positions.CopyFrom(encode_tensor(rows.unit_positions, rows.unit_positions.dtype))
    return found


def _encode_result(result: ReadingResult) -> pb.ReadActivationsResult:
    return pb.ReadActivationsResult(
        artifact=None if result.artifact is None else encode_artifact(result.artifact),
        texts=result.texts,
        tokens=result.tokens,
        rows=result.rows,
        labels=result.labels,
    )
