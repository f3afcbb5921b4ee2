"""The services of one model: what they share is made here, and each is put on the server."""

from collections.abc import Callable
from typing import Any

import grpc

from patchclamp.v1.activation_pb2_grpc import add_ActivationServiceServicer_to_server
from patchclamp.v1.artifact_pb2_grpc import add_ArtifactServiceServicer_to_server
from patchclamp.v1.feature_pb2_grpc import add_FeatureServiceServicer_to_server
from patchclamp.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from patchclamp.v1.head_pb2_grpc import add_HeadServiceServicer_to_server
from patchclamp.v1.job_pb2_grpc import add_JobServiceServicer_to_server
from patchclamp.v1.model_pb2_grpc import add_ModelServiceServicer_to_server
from patchclamp.v1.monitoring_pb2_grpc import add_MonitoringServiceServicer_to_server
from patchclamp.v1.neuron_pb2_grpc import add_NeuronServiceServicer_to_server
from patchclamp.v1.probe_pb2_grpc import add_ProbeServiceServicer_to_server
from patchclamp.v1.sparsity_pb2_grpc import add_SparsityServiceServicer_to_server
from patchclamp.v1.steering_pb2_grpc import add_SteeringServiceServicer_to_server
from patchclamp_server.analysis.exclusive import ExclusiveJobs
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.rpc.call.analysis_jobs import AnalysisJobs
from patchclamp_server.rpc.call.detached_jobs import DetachedJobs
from patchclamp_server.rpc.call.interceptors import CallInterceptor
from patchclamp_server.rpc.call.upload_space import UploadLimits
from patchclamp_server.rpc.config import ServerConfig
from patchclamp_server.rpc.services.activation import ActivationService
from patchclamp_server.rpc.services.artifact import ArtifactService
from patchclamp_server.rpc.services.feature import FeatureService
from patchclamp_server.rpc.services.generation import GenerationService
from patchclamp_server.rpc.services.head import HeadService
from patchclamp_server.rpc.services.job import JobService
from patchclamp_server.rpc.services.model import ModelService
from patchclamp_server.rpc.services.monitoring import MonitoringService
from patchclamp_server.rpc.services.neuron import NeuronService
from patchclamp_server.rpc.services.probe import ProbeService
from patchclamp_server.rpc.services.sparsity import SparsityService
from patchclamp_server.rpc.services.steering import SteeringService
from patchclamp_server.sparsity.binder import Binder
from patchclamp_server.text.prompt import PromptEncoder


class Servicers:
    """The services of one model, over one engine and one store of artifacts."""

    def __init__(
        self, engine: Engine, model: LoadedModel, config: ServerConfig, on_grounded: Callable[[float], None]
    ) -> None:
        self.prompts = PromptEncoder(model.tokenizer, model.info)
        self.store = ArtifactStore(config.artifacts_url)
        self.detached = DetachedJobs()
        self.monitoring = MonitoringService(engine, self.prompts, self.store, model.info)
        binder = Binder(engine.sparse_model, self.store, engine.executor.sparse.prepare)
        # One queue at the exclusive door for the jobs of all services.
        jobs = AnalysisJobs(engine, self.prompts, self.store, model.info, ExclusiveJobs())
        uploads = UploadLimits(
            max_bytes=config.max_upload_bytes,
            max_concurrent_bytes=config.max_concurrent_upload_bytes,
            idle_seconds=config.upload_idle_seconds,
            max_row_bytes=config.max_autoencoder_bytes,
        )
        self._generation = GenerationService(engine, self.prompts, self.store, model.info, binder, on_grounded)
        self._artifacts = ArtifactService(self.store, model.info, uploads)
        self._models = ModelService(model.info, self.prompts)
        self._steering, self._heads = SteeringService(jobs), HeadService(jobs)
        self._neurons = NeuronService(jobs, dict(config.match_models))
        self._activations = ActivationService(jobs)
        self._probes = ProbeService(jobs)
        self._sparsity = SparsityService(jobs, binder)
        self._features = FeatureService(jobs)

    def add_to(self, server: grpc.aio.Server, calls: CallInterceptor) -> None:
        """Adds every service of the contract. `calls`: what every call passes through, and so every job."""
        add_GenerationServiceServicer_to_server(self._generation, server)
        add_ArtifactServiceServicer_to_server(self._artifacts, server)
        add_ModelServiceServicer_to_server(self._models, server)
        add_SteeringServiceServicer_to_server(self._steering, server)
        add_SparsityServiceServicer_to_server(self._sparsity, server)
        add_HeadServiceServicer_to_server(self._heads, server)
        add_NeuronServiceServicer_to_server(self._neurons, server)
        add_ActivationServiceServicer_to_server(self._activations, server)
        add_ProbeServiceServicer_to_server(self._probes, server)
        add_FeatureServiceServicer_to_server(self._features, server)
        add_MonitoringServiceServicer_to_server(self.monitoring, server)
        with_jobs: dict[str, Any] = {
            "patchclamp.v1.SteeringService": self._steering,
            "patchclamp.v1.SparsityService": self._sparsity,
            "patchclamp.v1.HeadService": self._heads,
            "patchclamp.v1.NeuronService": self._neurons,
            "patchclamp.v1.ActivationService": self._activations,
            "patchclamp.v1.ProbeService": self._probes,
            "patchclamp.v1.FeatureService": self._features,
            "patchclamp.v1.MonitoringService": self.monitoring,
        }
        add_JobServiceServicer_to_server(JobService(self.detached, with_jobs, calls), server)
