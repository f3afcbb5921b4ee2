"""The async client: the same methods as the sync one, in client.py, where they are described."""

from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from patchclamp import requests
from patchclamp.async_streams import AsyncGenerateStream, AsyncOutbox, AsyncSession, AsyncStream
from patchclamp.async_transport import AsyncTransport
from patchclamp.client import Client
from patchclamp.connection import (
    DEFAULT_ADDRESS,
    DEFAULT_TIMEOUT_SECONDS,
    ChannelOptions,
    Connection,
    HealthRequest,
    health_status,
)
from patchclamp.fields import build
from patchclamp.heads import CleanCorruptPair, HeadsLike, NeedleTest
from patchclamp.keywords import described_by, takes_options_of
from patchclamp.names import (
    ArtifactFormatName,
    ArtifactKindName,
    CircuitMethodName,
    HeadEditModeName,
    HeadScoreMethodName,
    MethodName,
)
from patchclamp.requests import (
    AttributeOptions,
    CalibrateOptions,
    CircuitOptions,
    DetectOptions,
    EvaluateOptions,
    ExtractOptions,
    FollowOptions,
    GenerateOptions,
    HeadEditOptions,
    HeadScoreOptions,
    JobRequest,
    PromptLike,
    PromptOptions,
    ReferenceOptions,
    ScoreOptions,
    StartWatchOptions,
    UploadOptions,
    WatchOptions,
)
from patchclamp.results import (
    ActivationCollector,
    ActivationCounts,
    Activations,
    Artifact,
    CalibratedProfile,
    Circuit,
    CompareCollector,
    CompareEvent,
    CompareResult,
    CoreNeurons,
    CreatedWatch,
    DeletedArtifact,
    DetectionCollector,
    DetectionEvent,
    Detokenization,
    DownloadCollector,
    EvaluationCollector,
    ExtractionEvent,
    ExtractionResult,
    FollowCollector,
    HeadEditEffect,
    HeadSetComparison,
    Job,
    JobCollector,
    JobEvent,
    JobResult,
    LogitAttribution,
    Model,
    Progress,
    ReferenceCollector,
    RetrievalHeads,
    RunningWatch,
    RunningWatches,
    ScoredHeads,
    ScoreResult,
    SparsityEvaluation,
    SparsityEvaluationEvent,
    Tokenization,
    WatchStatistics,
)
from patchclamp.retry import NEVER, Retry
from patchclamp.sparsity import SparsityLike
from patchclamp.v1 import (
    artifact_pb2,
    generation_pb2,
    head_pb2,
    job_pb2,
    model_pb2,
    monitoring_pb2,
    sparse_policy_pb2,
    sparsity_pb2,
    steering_pb2,
)


@described_by(Client)
class AsyncClient(AsyncTransport):
    """The arguments are those of Client. Calls that stream are iterated, not awaited.

    It may be made before an event loop runs; whatever calls the server needs one. `close` and `aclose` are awaited.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: bool | str | Path = False,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        token_in_clear: bool = False,
        tls_server_name: str | None = None,
        channel_options: ChannelOptions = (),
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        retry: Retry = NEVER,
    ) -> None:
        super().__init__(
            Connection(
                address,
                token,
                tls,
                timeout,
                certificate,
                key,
                token_in_clear,
                tls_server_name,
                dict(channel_options),
            ),
            retry,
        )

    @takes_options_of(requests.generate)
    def generate(
        self, prompt: PromptLike | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerateStream:
        return AsyncGenerateStream(
            self._stream(self._generation.Generate, requests.generate(prompt, **options), timeout)
        )

    @takes_options_of(requests.session_start)
    def session(
        self,
        prompt: PromptLike | None = None,
        *,
        lockstep: bool = False,
        timeout: float = float("inf"),
        **options: Unpack[GenerateOptions],
    ) -> AsyncSession:
        outbox = AsyncOutbox(requests.session_start(prompt, lockstep=lockstep, **options))
        return AsyncSession(self._session(self._generation.Session, outbox, timeout), outbox)

    @takes_options_of(requests.score)
    async def score(
        self,
        prompt: PromptLike | None = None,
        continuation: str | Sequence[int] = "",
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> ScoreResult:
        request = requests.score(prompt, continuation, **options)
        return ScoreResult.from_proto(await self._unary(self._generation.Score, request, timeout))

    @takes_options_of(requests.compare)
    def compare(
        self, prompt: PromptLike | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream[generation_pb2.CompareResponse, CompareEvent, CompareResult]:
        call = self._stream(self._generation.Compare, requests.compare(prompt, **options), timeout)
        return AsyncStream(call, CompareCollector())

    @takes_options_of(requests.extract_vectors)
    def extract_vectors(
        self,
        pairs: Iterable[tuple[PromptLike, PromptLike]],
        method: MethodName = "difference_of_means",
        *,
        timeout: float = float("inf"),
        **options: Unpack[ExtractOptions],
    ) -> AsyncStream[steering_pb2.ExtractVectorsResponse, ExtractionEvent, ExtractionResult]:
        request = requests.extract_vectors(pairs, method, **options)
        return AsyncStream(
            self._stream(self._steering.ExtractVectors, request, timeout), JobCollector(ExtractionResult.from_proto)
        )

    @takes_options_of(requests.calibrate_profile)
    def calibrate_profile(
        self,
        policy: sparse_policy_pb2.SparsePolicy,
        texts: str | Iterable[str],
        *,
        timeout: float = float("inf"),
        **options: Unpack[CalibrateOptions],
    ) -> AsyncStream[sparsity_pb2.CalibrateProfileResponse, Progress | CalibratedProfile, CalibratedProfile]:
        call = self._stream(
            self._sparsity.CalibrateProfile, requests.calibrate_profile(policy, texts, **options), timeout
        )
        return AsyncStream(call, JobCollector(CalibratedProfile.from_proto))

    @takes_options_of(requests.evaluate_profile)
    def evaluate_profile(
        self,
        sparsities: Iterable[SparsityLike],
        texts: str | Iterable[str],
        *,
        measure_speed: bool = False,
        timeout: float = float("inf"),
        **options: Unpack[EvaluateOptions],
    ) -> AsyncStream[sparsity_pb2.EvaluateProfileResponse, SparsityEvaluationEvent, tuple[SparsityEvaluation, ...]]:
        request = requests.evaluate_profile(sparsities, texts, measure_speed=measure_speed, **options)
        call = self._stream(self._sparsity.EvaluateProfile, request, timeout)
        return AsyncStream(call, EvaluationCollector(len(request.sparsities)))

    async def predict_core_neurons(
        self,
        prompts: Iterable[PromptLike],
        sparsity: SparsityLike,
        *,
        layers: Iterable[int] = (),
        model: str = "",
        timeout: float | None = None,
    ) -> CoreNeurons:
        request = requests.predict_core_neurons(prompts, sparsity, layers, model)
        return CoreNeurons.from_proto(await self._unary(self._sparsity.PredictCoreNeurons, request, timeout))

    @takes_options_of(requests.detect_retrieval_heads)
    def detect_retrieval_heads(
        self,
        test: NeedleTest | None = None,
        *,
        timeout: float = float("inf"),
        **options: Unpack[DetectOptions],
    ) -> AsyncStream[head_pb2.DetectRetrievalHeadsResponse, DetectionEvent, RetrievalHeads]:
        request = requests.detect_retrieval_heads(test, **options)
        return AsyncStream(self._stream(self._heads.DetectRetrievalHeads, request, timeout), DetectionCollector())

    @takes_options_of(requests.score_heads)
    def score_heads(
        self,
        method: HeadScoreMethodName,
        *,
        timeout: float = float("inf"),
        **options: Unpack[HeadScoreOptions],
    ) -> AsyncStream[head_pb2.ScoreHeadsResponse, Progress | ScoredHeads, ScoredHeads]:
        call = self._stream(self._heads.ScoreHeads, requests.score_heads(method, **options), timeout)
        return AsyncStream(call, JobCollector(ScoredHeads.from_proto))

    @takes_options_of(requests.evaluate_head_edit)
    def evaluate_head_edit(
        self,
        heads: HeadsLike,
        mode: HeadEditModeName,
        *,
        timeout: float = float("inf"),
        **options: Unpack[HeadEditOptions],
    ) -> AsyncStream[head_pb2.EvaluateHeadEditResponse, Progress | HeadEditEffect, HeadEditEffect]:
        request = requests.evaluate_head_edit(heads, mode, **options)
        call = self._stream(self._heads.EvaluateHeadEdit, request, timeout)
        return AsyncStream(call, JobCollector(HeadEditEffect.from_proto))

    @takes_options_of(requests.find_circuit)
    def find_circuit(
        self,
        pairs: Iterable[CleanCorruptPair],
        method: CircuitMethodName,
        *,
        timeout: float = float("inf"),
        **options: Unpack[CircuitOptions],
    ) -> AsyncStream[head_pb2.FindCircuitResponse, Progress | Circuit, Circuit]:
        call = self._stream(self._heads.FindCircuit, requests.find_circuit(pairs, method, **options), timeout)
        return AsyncStream(call, JobCollector(Circuit.from_proto))

    async def compare_head_sets(
        self, head_sets: Iterable[str], *, top_k: int = 0, timeout: float | None = None
    ) -> tuple[HeadSetComparison, ...]:
        request = requests.compare_head_sets(head_sets, top_k)
        response = await self._unary(self._heads.CompareHeadSets, request, timeout)
        return tuple(map(HeadSetComparison.from_proto, response.comparisons))

    @takes_options_of(requests.attribute_logits)
    async def attribute_logits(
        self,
        prompt: PromptLike | None = None,
        target: str = "",
        *,
        timeout: float | None = None,
        **options: Unpack[AttributeOptions],
    ) -> LogitAttribution:
        request = requests.attribute_logits(prompt, target, **options)
        return LogitAttribution.from_proto(await self._unary(self._heads.AttributeLogits, request, timeout))

    @takes_options_of(requests.create_watch)
    async def create_watch(
        self,
        items: Iterable[monitoring_pb2.WatchItem],
        *,
        timeout: float | None = None,
        **options: Unpack[WatchOptions],
    ) -> CreatedWatch:
        request = requests.create_watch(items, **options)
        return CreatedWatch.from_proto(await self._unary(self._monitoring.CreateWatch, request, timeout))

    @takes_options_of(requests.start_watch)
    async def start_watch(
        self, watch: str, name: str = "", *, timeout: float | None = None, **options: Unpack[StartWatchOptions]
    ) -> RunningWatch:
        request = requests.start_watch(watch, name or watch, **options)
        return RunningWatch.from_proto((await self._unary(self._monitoring.StartWatch, request, timeout)).watch)

    async def stop_watch(self, name: str, *, timeout: float | None = None) -> RunningWatch:
        request = build(monitoring_pb2.StopWatchRequest, name=name)
        return RunningWatch.from_proto((await self._unary(self._monitoring.StopWatch, request, timeout)).watch)

    async def list_watches(self, *, timeout: float | None = None) -> RunningWatches:
        request = monitoring_pb2.ListWatchesRequest()
        return RunningWatches.from_proto(await self._unary(self._monitoring.ListWatches, request, timeout))

    async def watch_statistics(
        self, name: str, items: Iterable[str] = (), *, timeout: float | None = None
    ) -> WatchStatistics:
        request = build(monitoring_pb2.GetWatchStatisticsRequest, name=name, items=items)
        return WatchStatistics.from_proto(await self._unary(self._monitoring.GetWatchStatistics, request, timeout))

    @takes_options_of(requests.record_reference)
    def record_reference(
        self, name: str, *, timeout: float = float("inf"), **options: Unpack[ReferenceOptions]
    ) -> AsyncStream[monitoring_pb2.RecordReferenceResponse, Progress | Artifact, Artifact]:
        call = self._stream(self._monitoring.RecordReference, requests.record_reference(name, **options), timeout)
        return AsyncStream(call, ReferenceCollector())

    @takes_options_of(requests.watch_activations)
    def watch_activations(
        self, name: str, *, timeout: float = float("inf"), **options: Unpack[FollowOptions]
    ) -> AsyncStream[monitoring_pb2.WatchActivationsResponse, Activations, ActivationCounts]:
        call = self._stream(self._monitoring.WatchActivations, requests.watch_activations(name, **options), timeout)
        return AsyncStream(call, ActivationCollector())

    @takes_options_of(requests.upload)
    async def put_artifact(
        self, data: bytes | Path, *, timeout: float | None = None, **options: Unpack[UploadOptions]
    ) -> Artifact:
        response = await self._repeated(self._artifacts.Upload, lambda: requests.upload(data, **options), timeout)
        return Artifact.from_proto(response.artifact)

    async def download_artifact(
        self,
        ref: str,
        format: ArtifactFormatName = "safetensors",
        *,
        layers: Iterable[int] = (),
        timeout: float | None = None,
    ) -> bytes:
        call = self._stream(self._artifacts.Download, requests.download(ref, format, layers), timeout)
        return await AsyncStream(call, DownloadCollector()).result()

    async def get_artifact(self, ref: str, *, timeout: float | None = None) -> Artifact:
        request = build(artifact_pb2.GetArtifactRequest, ref=ref)
        return Artifact.from_proto((await self._unary(self._artifacts.GetArtifact, request, timeout)).artifact)

    async def list_artifacts(
        self,
        kind: ArtifactKindName | None = None,
        *,
        model_fingerprint: str = "",
        timeout: float | None = None,
    ) -> AsyncIterator[Artifact]:
        page_token = ""
        while True:
            request = requests.list_artifacts(kind, model_fingerprint, page_token)
            page = await self._unary(self._artifacts.ListArtifacts, request, timeout)
            for artifact in page.artifacts:
                yield Artifact.from_proto(artifact)
            page_token = page.next_page_token
            if not page_token:
                return

    async def tag_artifact(
        self, tag: str, ref: str, *, replace: bool = False, timeout: float | None = None
    ) -> Artifact:
        request = requests.tag_artifact(tag, ref, replace)
        return Artifact.from_proto((await self._unary(self._artifacts.TagArtifact, request, timeout)).artifact)

    async def untag_artifact(self, tag: str, *, timeout: float | None = None) -> None:
        await self._unary(self._artifacts.TagArtifact, build(artifact_pb2.TagArtifactRequest, tag=tag), timeout)

    async def delete_artifact(self, ref: str, *, timeout: float | None = None) -> DeletedArtifact:
        request = build(artifact_pb2.DeleteArtifactRequest, ref=ref)
        return DeletedArtifact.from_proto(await self._unary(self._artifacts.DeleteArtifact, request, timeout))

    async def start_job(self, request: JobRequest, *, timeout: float | None = None) -> Job:
        message = requests.start_job(request)
        return Job.from_proto((await self._unary(self._jobs.StartJob, message, timeout)).job)

    def follow_job(
        self, job_id: str, *, timeout: float = float("inf")
    ) -> AsyncStream[job_pb2.FollowJobResponse, JobEvent, JobResult]:
        call = self._stream(self._jobs.FollowJob, requests.follow_job(job_id), timeout)
        return AsyncStream(call, FollowCollector())

    async def job(self, job_id: str, *, timeout: float | None = None) -> Job:
        request = requests.get_job(job_id)
        return Job.from_proto((await self._unary(self._jobs.GetJob, request, timeout)).job)

    async def jobs(self, *, timeout: float | None = None) -> tuple[Job, ...]:
        response = await self._unary(self._jobs.ListJobs, job_pb2.ListJobsRequest(), timeout)
        return tuple(map(Job.from_proto, response.jobs))

    async def cancel_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        request = requests.cancel_job(job_id)
        return Job.from_proto((await self._unary(self._jobs.CancelJob, request, timeout)).job)

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        response = await self._unary(self._models.ListModels, model_pb2.ListModelsRequest(), timeout)
        return tuple(map(Model.from_proto, response.models))

    @takes_options_of(requests.tokenize)
    async def tokenize(
        self, prompt: PromptLike | None = None, *, timeout: float | None = None, **options: Unpack[PromptOptions]
    ) -> Tokenization:
        request = requests.tokenize(prompt, **options)
        return Tokenization.from_proto(await self._unary(self._models.Tokenize, request, timeout))

    async def detokenize(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        model: str = "",
        timeout: float | None = None,
    ) -> Detokenization:
        request = requests.detokenize(ids, skip_special_tokens, model)
        return Detokenization.from_proto(await self._unary(self._models.Detokenize, request, timeout))

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:
        return health_status(await self._unary(self._health, build(HealthRequest, service=service), timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
