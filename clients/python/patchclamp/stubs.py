# Generated from async_stubs.py by clients/python/generate_sync.py; change async_stubs.py.
"""The channel of the synchronous client, and the stubs of all services on it."""

import grpc

from patchclamp.connection import HEALTH_METHOD, Connection, HealthRequest, HealthResponse
from patchclamp.v1.activation_pb2_grpc import ActivationServiceStub
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp.v1.feature_pb2_grpc import FeatureServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.head_pb2_grpc import HeadServiceStub
from patchclamp.v1.job_pb2_grpc import JobServiceStub
from patchclamp.v1.model_pb2_grpc import ModelServiceStub
from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceStub
from patchclamp.v1.neuron_pb2_grpc import NeuronServiceStub
from patchclamp.v1.probe_pb2_grpc import ProbeServiceStub
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceStub
from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub


class Stubs:
    """Opens the channel that a connection describes, and holds a stub for each service."""

    def __init__(self, connection: Connection) -> None:
        self.channel = channel = _opened(connection, connection.options)
        # Calls that ask for health have a channel of their own where the others are balanced by it.
        self._health_channel = channel
        if connection.is_balanced:
            self._health_channel = _opened(connection, connection.health_options)
        self.generation = GenerationServiceStub(channel)
        self.steering = SteeringServiceStub(channel)
        self.sparsity = SparsityServiceStub(channel)
        self.heads = HeadServiceStub(channel)
        self.neurons = NeuronServiceStub(channel)
        self.activations = ActivationServiceStub(channel)
        self.probes = ProbeServiceStub(channel)
        self.features = FeatureServiceStub(channel)
        self.monitoring = MonitoringServiceStub(channel)
        self.artifacts = ArtifactServiceStub(channel)
        self.models = ModelServiceStub(channel)
        self.jobs = JobServiceStub(channel)
        self.health = self._health_channel.unary_unary(
            HEALTH_METHOD, HealthRequest.SerializeToString, HealthResponse.FromString
        )

    def close(self) -> None:
        """Cancels the calls that run, and ends the connection."""
        self._health_channel.close()
        self.channel.close()


def _opened(connection: Connection, options: list[tuple[str, str | int]]) -> grpc.Channel:
    credentials = connection.credentials
    if credentials is None:
        return grpc.insecure_channel(connection.address, options)
    return grpc.secure_channel(connection.address, credentials, options)
