"""Message Training → analysis/training.py."""

from patchclamp.v1 import steering_pb2 as pb
from patchclamp_server.analysis.training import Training
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, finite

MAX_STEPS, MAX_BATCH = 20_000, 1024


def decode_training(proto: pb.Training, field: str) -> Training:
    default = Training()
    rate = default.learning_rate
    if proto.HasField("learning_rate"):
        rate = finite(proto.learning_rate, f"{field}.learning_rate", low=0.0, high=10.0)
        if rate == 0.0:
            raise InvalidArgument(f"{field}.learning_rate", "expected a number above 0")
    return Training(
        count(proto.max_steps, f"{field}.max_steps", high=MAX_STEPS) or default.max_steps,
        rate,
        count(proto.batch_size, f"{field}.batch_size", high=MAX_BATCH) or default.batch_size,
        count(proto.patience, f"{field}.patience") or default.patience,
    )
