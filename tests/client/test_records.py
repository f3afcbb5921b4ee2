"""Every result reads its message by the names of the fields, whatever kind of field it is."""

import inspect
from typing import Any

import pytest
from google.protobuf import struct_pb2, timestamp_pb2

from patchclamp import results
from patchclamp.heads import Head
from patchclamp.results import Array, Artifact, HeadScore, Job, NeedleRun, RunningWatch, monitoring
from patchclamp.results.record import Record
from patchclamp.v1 import (
    activation_pb2,
    artifact_pb2,
    feature_pb2,
    generation_pb2,
    head_pb2,
    job_pb2,
    model_pb2,
    monitoring_pb2,
    neuron_pb2,
    probe_pb2,
    program_pb2,
    sparse_policy_pb2,
    sparsity_pb2,
    steering_pb2,
)

CONTRACT = (
    activation_pb2,
    artifact_pb2,
    feature_pb2,
    generation_pb2,
    head_pb2,
    job_pb2,
    model_pb2,
    monitoring_pb2,
    neuron_pb2,
    probe_pb2,
    program_pb2,
    sparse_policy_pb2,
    sparsity_pb2,
    steering_pb2,
)
# Records that have another name than the message they read.
OTHER_NAMES = {
    "Activations": "WatchActivationsResponse",
    "Chunk": "GenerateResponse",
    "ConceptDetection": "DetectionResult",
    "CoreNeurons": "PredictCoreNeuronsResponse",
    "CreatedWatch": "CreateWatchResponse",
    "DeletedArtifact": "DeleteArtifactResponse",
    "Detokenization": "DetokenizeResponse",
    "Divergence": "TokenDivergence",
    "LogitAttribution": "AttributeLogitsResponse",
    "Progress": "HeadProgress",
    "RunningWatches": "ListWatchesResponse",
    "ScoreResult": "ScoreResponse",
    "Token": "GeneratedToken",
    "Tokenization": "TokenizeResponse",
    "WatchReplica": "ReplicaWatch",
    "WatchStatistics": "GetWatchStatisticsResponse",
}
# What this package puts together itself, and what it knows besides the message.
MADE_HERE = {
    "ActivationCounts",
    "CompareResult",
    "GenerateResult",
    "NeedleGrid",
    "PatchGrid",
    "Quantile",
    "ReadActivations",
}
NOTHING = Array("float32", (0,), b"")
GIVEN: dict[str, dict[str, Any]] = {
    "RetrievalHeads": {"runs": ()},
    "CompareText": {"chunk": None},
    "ActivationRows": {"values": NOTHING, "unit_positions": None},
    "ActivationMoments": {"mean": NOTHING, "covariance": NOTHING},
    "ActivationMean": {"mean": NOTHING},
}


def records() -> list[type[Record]]:
    named = {**vars(results), **vars(monitoring)}.values()
    kinds = {each for each in named if inspect.isclass(each) and issubclass(each, Record) and each is not Record}
    return sorted((each for each in kinds if each.__name__ not in MADE_HERE), key=lambda each: each.__name__)


def message_of(kind: type[Record]) -> Any:
    name = OTHER_NAMES.get(kind.__name__, kind.__name__)
    return next(getattr(module, name) for module in CONTRACT if hasattr(module, name))


@pytest.mark.parametrize("kind", records())
def test_every_field_of_a_record_is_one_of_its_message(kind: type[Record]) -> None:
    read = kind.from_proto(message_of(kind)(), **GIVEN.get(kind.__name__, {}))
    assert isinstance(read, kind)
    assert isinstance(read.to_dict(), dict)


def test_a_field_that_the_message_does_not_have_is_refused() -> None:
    with pytest.raises(KeyError, match="needle"):
        NeedleRun.from_proto(head_pb2.HeadId())


def test_a_field_that_is_not_set_is_none_and_one_that_is_zero_is_not() -> None:
    assert HeadScore.from_proto(head_pb2.HeadScore(low=0.0)) == HeadScore(Head(0, 0), 0.0, low=0.0, high=None)


def test_an_enum_is_read_by_its_name_and_a_value_of_a_newer_server_by_its_number() -> None:
    assert Job.from_proto(job_pb2.Job(state=job_pb2.JOB_STATE_FAILED)).state == "failed"
    assert Job.from_proto(job_pb2.Job(state=99)).state == "99"  # type: ignore[arg-type]
    assert Job.from_proto(job_pb2.Job()).state == ""
    phases = [program_pb2.PHASE_PROMPT, program_pb2.PHASE_GENERATED]
    assert RunningWatch.from_proto(monitoring_pb2.RunningWatch(phases=phases)).phases == ("prompt", "generated")


def test_times_structs_maps_and_lists_are_plain_values() -> None:
    provenance = struct_pb2.Struct()
    provenance.update({"seed": 7.0})
    artifact = Artifact.from_proto(
        artifact_pb2.Artifact(
            created=timestamp_pb2.Timestamp(seconds=1),
            provenance=provenance,
            replaced_tags={"joy": "sha256:ab"},
            layers=[3, 4],
        )
    )
    assert artifact.created == "1970-01-01T00:00:01Z"
    assert artifact.provenance == {"seed": 7.0}
    assert artifact.replaced_tags == {"joy": "sha256:ab"}
    assert artifact.layers == (3, 4)


def test_a_job_that_runs_has_no_end() -> None:
    assert Job.from_proto(job_pb2.Job()).ended == ""
    assert Job.from_proto(job_pb2.Job(ended=timestamp_pb2.Timestamp(seconds=1))).ended == "1970-01-01T00:00:01Z"


def test_a_record_is_shown_with_the_first_of_what_is_repeated() -> None:
    rows = tuple(HeadScore(Head(0, i), 0.5) for i in range(1000))
    shown = repr(
        results.ScoredHeads(artifact=results.Artifact.from_proto(artifact_pb2.Artifact(id="one")), scores=rows)
    )
    assert "HeadScore(head=Head(layer=0, head=4), score=0.5" in shown
    assert "... 995 more)" in shown
    assert "head=5" not in shown
