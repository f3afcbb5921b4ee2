"""The words of the contract as Python strings: "resid_post" for SITE_RESID_POST, and so on for every enum."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Literal, Protocol, TypeVar, cast

from google.protobuf.descriptor import EnumDescriptor

from patchclamp.fields import shown
from patchclamp.v1 import (
    activation_pb2,
    artifact_pb2,
    generation_pb2,
    head_pb2,
    neuron_pb2,
    probe_pb2,
    program_pb2,
    sparse_policy_pb2,
    steering_pb2,
    tensor_pb2,
)

ValueT = TypeVar("ValueT")
ValueT_co = TypeVar("ValueT_co", covariant=True)

SiteName = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_z", "attn_out", "mlp_post", "mlp_out", "mlp_gate", "mlp_up"
]
PhaseName = Literal["prompt", "generated"]
PriorityName = Literal["interactive", "batch", "analysis"]
ArtifactKindName = Literal[
    "vector",
    "neuron_set",
    "sparsity_profile",
    "head_set",
    "watch",
    "watch_reference",
    "corpus",
    "activations",
    "probe",
    "autoencoder",
    "subspace",
    "affine_map",
    "feature_labels",
]
ArtifactFormatName = Literal[
    "safetensors",
    "gguf",
    "head_score_json",
    "neuron_set_json",
    "text_json_lines",
    "saelens",
    "gemma_scope_npz",
    "feature_label_json",
]
ActivationReductionName = Literal["none", "first", "last", "mean", "sum", "max", "moments", "mean_by_label"]
ActivationDtypeName = Literal["float32", "float16", "bfloat16"]
MethodName = Literal[
    "difference_of_means",
    "pca_of_differences",
    "logistic_probe",
    "linear_discriminant",
    "linear_artificial_tomography",
    "task_vector",
    "causal_inner_product",
    "mean_centred",
    "reft_r1",
    "definition",
]
PoolingName = Literal["last_token", "mean"]
ProbeMethodName = Literal["logistic", "ridge", "prototype"]
CoreInferRankingName = Literal["magnitude", "value"]
TealAllocationName = Literal["uniform", "greedy"]
HeadScoreMethodName = Literal["induction", "previous_token", "ngram", "successor", "ov_nuclear_norm", "temporal"]
HeadEditModeName = Literal["zero", "mean", "uniform", "scale"]
CircuitMethodName = Literal["mean_ablation", "activation_patching", "path_patching"]
NeuronWeightsName = Literal["gate", "up", "down"]
NeuronPoolingName = Literal["last_token", "mean", "max"]
NeuronRankerName = Literal["mean_difference", "f", "mutual_information", "l1"]
NeuronEditModeName = Literal["zero", "mean", "clamp", "scale"]
PatchDirectionName = Literal["restore", "corrupt"]
PatchMetricName = Literal["log_probability_difference", "log_probability", "divergence"]
DetectionPoolingName = Literal["last_token", "mean", "max"]
CalibrationApplicationName = Literal["add", "rotate_towards", "replace"]


class ProtoEnum(Protocol[ValueT_co]):
    """Says what a generated enum offers."""

    @property
    def DESCRIPTOR(self) -> EnumDescriptor: ...

    def Value(self, name: str, /) -> ValueT_co: ...


@cache
def enum_names(enum: EnumDescriptor) -> dict[int, str]:
    """Returns the name of each value as this package spells it, such as "resid_post"; "" is the unspecified one."""
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper() + "_"
    return {each.number: each.name.removeprefix(prefix).lower() if each.number else "" for each in enum.values}


def name_of(enum: EnumDescriptor, value: int) -> str:
    """Returns the name of a value of an enum; the number of one that this client does not know yet."""
    return enum_names(enum).get(value, str(value))


def _table(enum: ProtoEnum[ValueT]) -> dict[str, ValueT]:
    """Returns {"resid_post": SITE_RESID_POST, ...} without the unspecified value."""
    full_names = {each.number: each.name for each in enum.DESCRIPTOR.values}
    return {name: enum.Value(full_names[number]) for number, name in enum_names(enum.DESCRIPTOR).items() if number}


SITES = _table(program_pb2.Site)
STORED_THRESHOLDS = _table(program_pb2.StoredThreshold)
PHASES = _table(program_pb2.Phase)
PRIORITIES = _table(generation_pb2.Priority)
ARTIFACT_KINDS = _table(artifact_pb2.ArtifactKind)
METHODS = _table(steering_pb2.ExtractionMethod)
POOLINGS = _table(steering_pb2.TokenPooling)
PROBE_METHODS = _table(probe_pb2.ProbeMethod)
CORE_INFER_RANKINGS = _table(sparse_policy_pb2.CoreInferRanking)
TEAL_ALLOCATIONS = _table(sparse_policy_pb2.TealAllocation)
HEAD_SCORE_METHODS = _table(head_pb2.HeadScoreMethod)
HEAD_EDIT_MODES = _table(head_pb2.HeadEditMode)
CIRCUIT_METHODS = _table(head_pb2.CircuitMethod)
NEURON_WEIGHTS = _table(neuron_pb2.NeuronWeights)
NEURON_POOLINGS = _table(neuron_pb2.NeuronPooling)
NEURON_RANKERS = _table(neuron_pb2.NeuronRanker)
NEURON_EDIT_MODES = _table(neuron_pb2.NeuronEditMode)
PATCH_DIRECTIONS = _table(activation_pb2.PatchDirection)
PATCH_METRICS = _table(activation_pb2.PatchMetric)
ACTIVATION_REDUCTIONS = _table(activation_pb2.ActivationReduction)
DATA_TYPES = _table(tensor_pb2.DataType)
DETECTION_POOLINGS = _table(steering_pb2.DetectionPooling)
# Names of the fields of the oneof that says how a vector is applied.
CALIBRATION_APPLICATIONS = {
    field.name: field.name
    for field in steering_pb2.CalibrateVectorRequest.DESCRIPTOR.oneofs_by_name["application"].fields
}
ARTIFACT_FORMATS = {
    "safetensors": artifact_pb2.ARTIFACT_FORMAT_SAFETENSORS,
    "gguf": artifact_pb2.ARTIFACT_FORMAT_GGUF_CONTROL_VECTOR,
    "head_score_json": artifact_pb2.ARTIFACT_FORMAT_HEAD_SCORE_JSON,
    "neuron_set_json": artifact_pb2.ARTIFACT_FORMAT_NEURON_SET_JSON,
    "text_json_lines": artifact_pb2.ARTIFACT_FORMAT_TEXT_JSON_LINES,
    "saelens": artifact_pb2.ARTIFACT_FORMAT_SAELENS,
    "gemma_scope_npz": artifact_pb2.ARTIFACT_FORMAT_GEMMA_SCOPE_NPZ,
    "feature_label_json": artifact_pb2.ARTIFACT_FORMAT_FEATURE_LABEL_JSON,
}


def value_of(table: Mapping[str, ValueT], name: str, what: str) -> ValueT:
    """Returns the enum value with this name. ValueError, or TypeError for what is no name, lists the accepted ones."""
    if not isinstance(name, str):
        raise TypeError(f"{what}: expected one of {', '.join(table)}, got {shown(name)}")
    try:
        return table[name]
    except KeyError:
        raise ValueError(f"{what} {name!r} is unknown; accepted: {', '.join(table)}") from None


def value_or_unspecified(table: Mapping[str, ValueT], name: str | None, what: str) -> ValueT:
    """Does what value_of does; None is the unspecified value, which means the server's default."""
    return cast(ValueT, 0) if name is None else value_of(table, name, what)
