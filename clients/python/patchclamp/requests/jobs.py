"""Requests of JobService."""

import secrets
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from patchclamp.fields import build_as, shown
from patchclamp.v1 import (
    activation_pb2,
    feature_pb2,
    head_pb2,
    job_pb2,
    monitoring_pb2,
    neuron_pb2,
    probe_pb2,
    sparsity_pb2,
    steering_pb2,
)

JobRequest = (
    steering_pb2.ExtractVectorsRequest
    | sparsity_pb2.CalibrateProfileRequest
    | sparsity_pb2.EvaluateProfileRequest
    | head_pb2.DetectRetrievalHeadsRequest
    | head_pb2.ScoreHeadsRequest
    | head_pb2.EvaluateHeadEditRequest
    | head_pb2.FindCircuitRequest
    | monitoring_pb2.RecordReferenceRequest
    | neuron_pb2.DecodeNeuronsRequest
    | neuron_pb2.FindNeuronsRequest
    | neuron_pb2.LocalizeNeuronsRequest
    | neuron_pb2.EvaluateNeuronEditRequest
    | neuron_pb2.CensusNeuronsRequest
    | neuron_pb2.DescribeNeuronsRequest
    | neuron_pb2.MatchNeuronsRequest
    | activation_pb2.ReadActivationsRequest
    | activation_pb2.PatchActivationsRequest
    | steering_pb2.FindSubspaceRequest
    | feature_pb2.SearchFeaturesRequest
    | steering_pb2.CalibrateVectorRequest
    | steering_pb2.DetectConceptRequest
    | probe_pb2.TrainProbeRequest
    | steering_pb2.FindConceptCircuitRequest
)

# By the type of the request that they hold.
_FIELDS: Mapping[Any, FieldDescriptor] = {
    field.message_type: field for field in job_pb2.StartJobRequest.DESCRIPTOR.oneofs_by_name["request"].fields
}


def start_job(request: JobRequest) -> job_pb2.StartJobRequest:
    """Returns a request to begin a job, with a key of its own, so that what is sent again begins no second job.

    Raises TypeError for what is no request of a method that can be a job.
    """
    field = _FIELDS.get(request.DESCRIPTOR) if isinstance(request, Message) else None
    if field is None:
        makers = ", ".join(each.name for each in _FIELDS.values())
        raise TypeError(f"request: expected what {makers} of patchclamp.requests make, got {shown(request)}")
    held: dict[str, Any] = {field.name: request}
    return job_pb2.StartJobRequest(**held, key=secrets.token_hex(16))


def get_job(job_id: str) -> job_pb2.GetJobRequest:
    return build_as(_NAMES, job_pb2.GetJobRequest, id=job_id)


def follow_job(job_id: str) -> job_pb2.FollowJobRequest:
    return build_as(_NAMES, job_pb2.FollowJobRequest, id=job_id)


def cancel_job(job_id: str) -> job_pb2.CancelJobRequest:
    return build_as(_NAMES, job_pb2.CancelJobRequest, id=job_id)


_NAMES = {"id": "job_id"}
