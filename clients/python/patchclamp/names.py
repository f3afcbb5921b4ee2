"""The words of the contract as Python strings: "resid_post" for SITE_RESID_POST, and so on for every enum."""

from collections.abc import Mapping
from typing import Literal, Protocol, TypeVar, cast

from patchclamp.fields import shown
from patchclamp.v1 import (
    artifact_pb2,
    generation_pb2,
    head_pb2,
    job_pb2,
    program_pb2,
    sparse_policy_pb2,
    steering_pb2,
)

ValueT = TypeVar("ValueT")

SiteName = Literal["resid_pre", "resid_mid", "resid_post", "attn_z", "attn_out", "mlp_post", "mlp_out"]
PhaseName = Literal["prompt", "generated"]
PriorityName = Literal["interactive", "batch", "analysis"]
ArtifactKindName = Literal["vector", "neuron_set", "sparsity_profile", "head_set", "watch", "watch_reference"]
ArtifactFormatName = Literal["safetensors", "gguf", "head_score_json"]
MethodName = Literal["difference_of_means", "pca_of_differences", "logistic_probe"]
PoolingName = Literal["last_token", "mean"]
CoreInferRankingName = Literal["magnitude", "value"]
TealAllocationName = Literal["uniform", "greedy"]
HeadScoreMethodName = Literal["induction", "previous_token", "ngram", "successor", "ov_nuclear_norm", "temporal"]
HeadEditModeName = Literal["zero", "mean", "uniform", "scale"]
CircuitMethodName = Literal["mean_ablation", "activation_patching", "path_patching"]


class ProtoEnum(Protocol[ValueT]):
    """What a generated enum offers."""

    def items(self) -> list[tuple[str, ValueT]]: ...


def _table(enum: ProtoEnum[ValueT], prefix: str) -> dict[str, ValueT]:
    """{"resid_post": SITE_RESID_POST, ...} without the unspecified value."""
    return {name.removeprefix(prefix).lower(): value for name, value in enum.items() if value != 0}


SITES = _table(program_pb2.Site, "SITE_")
STORED_THRESHOLDS = _table(program_pb2.StoredThreshold, "STORED_THRESHOLD_")
WARNING_CODES = _table(program_pb2.RequestWarningCode, "REQUEST_WARNING_CODE_")
PHASES = _table(program_pb2.Phase, "PHASE_")
PRIORITIES = _table(generation_pb2.Priority, "PRIORITY_")
FINISH_REASONS = _table(generation_pb2.FinishReason, "FINISH_REASON_")
COMPARE_SIDES = _table(generation_pb2.CompareSide, "COMPARE_SIDE_")
ARTIFACT_KINDS = _table(artifact_pb2.ArtifactKind, "ARTIFACT_KIND_")
METHODS = _table(steering_pb2.ExtractionMethod, "EXTRACTION_METHOD_")
POOLINGS = _table(steering_pb2.TokenPooling, "TOKEN_POOLING_")
CORE_INFER_RANKINGS = _table(sparse_policy_pb2.CoreInferRanking, "CORE_INFER_RANKING_")
TEAL_ALLOCATIONS = _table(sparse_policy_pb2.TealAllocation, "TEAL_ALLOCATION_")
HEAD_SCORE_METHODS = _table(head_pb2.HeadScoreMethod, "HEAD_SCORE_METHOD_")
HEAD_EDIT_MODES = _table(head_pb2.HeadEditMode, "HEAD_EDIT_MODE_")
JOB_STATES = _table(job_pb2.JobState, "JOB_STATE_")
CIRCUIT_METHODS = _table(head_pb2.CircuitMethod, "CIRCUIT_METHOD_")
ARTIFACT_FORMATS = {
    "safetensors": artifact_pb2.ARTIFACT_FORMAT_SAFETENSORS,
    "gguf": artifact_pb2.ARTIFACT_FORMAT_GGUF_CONTROL_VECTOR,
    "head_score_json": artifact_pb2.ARTIFACT_FORMAT_HEAD_SCORE_JSON,
}


def value_of(table: Mapping[str, ValueT], name: str, what: str) -> ValueT:
    """The enum value with this name; ValueError, or TypeError for what is no name, lists the accepted ones."""
    if not isinstance(name, str):
        raise TypeError(f"{what}: expected one of {', '.join(table)}, got {shown(name)}")
    try:
        return table[name]
    except KeyError:
        raise ValueError(f"{what} {name!r} is unknown; accepted: {', '.join(table)}") from None


def value_or_unspecified(table: Mapping[str, ValueT], name: str | None, what: str) -> ValueT:
    """As value_of; None is the unspecified value, which means the server's default."""
    return cast(ValueT, 0) if name is None else value_of(table, name, what)


def name_of(table: Mapping[str, int], value: int) -> str:
    """The name of an enum value; "" when unspecified, the number for one that this client does not know yet."""
    if value == 0:
        return ""
    return next((name for name, known in table.items() if known == value), str(value))
