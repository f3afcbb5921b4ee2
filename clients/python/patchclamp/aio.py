"""The asynchronous client. client.py, the synchronous one, is generated from it."""

from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from patchclamp import requests
from patchclamp.async_streams import AsyncGenerateStream, AsyncSession, AsyncStream
from patchclamp.async_transport import AsyncTransport
from patchclamp.autoencoders import ExportedAutoencoder
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
from patchclamp.keywords import takes_options_of
from patchclamp.names import (
    ArtifactFormatName,
    ArtifactKindName,
    CircuitMethodName,
    HeadEditModeName,
    HeadScoreMethodName,
    MethodName,
    NeuronEditModeName,
    ProbeMethodName,
    SiteName,
)
from patchclamp.neurons import LocalizationMethod, NeuronsLike, NeuronTestLike, TextsLike
from patchclamp.patching import PatchPair
from patchclamp.programs import VectorLike
from patchclamp.requests import (
    AttributeOptions,
    CalibrateOptions,
    CalibrateVectorOptions,
    CensusNeuronsOptions,
    CircuitOptions,
    ConceptCircuitOptions,
    DecodeNeuronsOptions,
    DescribeNeuronsOptions,
    DetectConceptOptions,
    DetectOptions,
    EvaluateNeuronEditOptions,
    EvaluateOptions,
    ExtractOptions,
    FindNeuronsOptions,
    FollowOptions,
    GenerateOptions,
    HeadEditOptions,
    HeadScoreOptions,
    JobRequest,
    LocalizeNeuronsOptions,
    MatchNeuronsOptions,
    PatchActivationsOptions,
    ProbeOptions,
    PromptLike,
    PromptOptions,
    ReadActivationsOptions,
    ReferenceOptions,
    ScenarioLike,
    ScoreOptions,
    SearchFeaturesOptions,
    StartWatchOptions,
    SubspaceOptions,
    UploadOptions,
    WatchOptions,
)
from patchclamp.results import (
    ActivationCollector,
    ActivationCounts,
    ActivationEvent,
    Activations,
    Artifact,
    CalibratedProfile,
    CalibrationCollector,
    CalibrationEvent,
    CalibrationResult,
    Circuit,
    CompareCollector,
    CompareEvent,
    CompareResult,
    ConceptCircuitEvent,
    ConceptDetection,
    ConceptDetectionCollector,
    ConceptDetectionEvent,
    CoreNeurons,
    CreatedWatch,
    DecodeCollector,
    DecodedNeuron,
    DecodedNeurons,
    DeletedArtifact,
    DescribeCollector,
    DetectionCollector,
    DetectionEvent,
    Detokenization,
    DownloadCollector,
    EvaluationCollector,
    ExportCollector,
    ExtractionEvent,
    ExtractionResult,
    FollowCollector,
    FoundConceptCircuit,
    FoundFeatures,
    FoundNeurons,
    FoundSubspace,
    HeadEditEffect,
    HeadSetComparison,
    Job,
    JobCollector,
    JobEvent,
    JobResult,
    LocalizedNeurons,
    LogitAttribution,
    MatchedNeurons,
    Model,
    NeuronCensus,
    NeuronDescription,
    NeuronEditCollector,
    NeuronEditEffect,
    NeuronEditEvent,
    NeuronSetComparison,
    PatchCollector,
    PatchEvent,
    PatchGrid,
    Progress,
    ReadActivations,
    ReadActivationsCollector,
    ReferenceCollector,
    RetrievalHeads,
    RunningWatch,
    RunningWatches,
    ScoredHeads,
    ScoreResult,
    SparsityEvaluation,
    SparsityEvaluationEvent,
    SubspaceEvent,
    Tokenization,
    TrainedProbe,
    WatchStatistics,
)
from patchclamp.retry import NEVER, Retry
from patchclamp.sparsity import SparsityLike
from patchclamp.subspaces import SubspaceMethod
from patchclamp.tasks import AsyncOutbox
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
    sparse_policy_pb2,
    sparsity_pb2,
    steering_pb2,
)


class AsyncClient(AsyncTransport):
    """Calls one server, or in turn all that the address names.

    A client may be made before an event loop runs; whatever calls the server needs one. Calls that stream are iterated,
    not awaited; `close` and `aclose` are awaited.

    Every method raises PatchclampError when the server refuses or fails.

    timeout: seconds for each call, unless the call gives its own; ``math.inf`` is no deadline. Sessions and
    long jobs have none by default. A call that is UNAVAILABLE is repeated, a stream only before its first message.
    address, token, tls, certificate, key, token_in_clear, tls_server_name, channel_options: Connection describes them.
    Raises ValueError for a token that would travel in clear.
    retry: whether a call that a full server refuses waits and is sent again, as ``Retry()``; otherwise the error says
    when to (`retry_after`).
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
        """Streams a continuation of the prompt, or with messages= an answer. Options: GenerateOptions."""
        return AsyncGenerateStream(
            self._stream(self._stubs.generation.Generate, requests.generate(prompt, **options), timeout)
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
        """Begins a generation whose named strengths can change between tokens. Use it in a ``with`` block.

        lockstep: whether to generate only as many tokens as advance() has granted.
        """
        outbox = AsyncOutbox(requests.session_start(prompt, lockstep=lockstep, **options))
        return AsyncSession(self._session(self._stubs.generation.Session, outbox, timeout), outbox)

    @takes_options_of(requests.score)
    async def score(
        self,
        prompt: PromptLike | None = None,
        continuation: str | Sequence[int] = "",
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> ScoreResult:
        """Returns the log-probabilities of a given continuation. Options: ScoreOptions."""
        request = requests.score(prompt, continuation, **options)
        return ScoreResult.from_proto(await self._unary(self._stubs.generation.Score, request, timeout))

    @takes_options_of(requests.compare)
    def compare(
        self, prompt: PromptLike | None = None, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream[generation_pb2.CompareResponse, CompareEvent, CompareResult]:
        """Runs the program and the unedited model in one batch, and streams their divergence at every token."""
        call = self._stream(self._stubs.generation.Compare, requests.compare(prompt, **options), timeout)
        return AsyncStream(call, CompareCollector())

    @takes_options_of(requests.extract_vectors)
    def extract_vectors(
        self,
        pairs: Iterable[tuple[PromptLike, PromptLike]] = (),
        method: MethodName = "difference_of_means",
        *,
        timeout: float = float("inf"),
        **options: Unpack[ExtractOptions],
    ) -> AsyncStream[steering_pb2.ExtractVectorsResponse, ExtractionEvent, ExtractionResult]:
        """Finds a steering vector from pairs (positive, negative), texts by label, demonstrations or words: progress,
        then the stored vector."""
        request = requests.extract_vectors(pairs, method, **options)
        return AsyncStream(
            self._stream(self._stubs.steering.ExtractVectors, request, timeout),
            JobCollector(ExtractionResult.from_proto),
        )

    @takes_options_of(requests.calibrate_vector)
    def calibrate_vector(
        self,
        vector: str,
        prompts: Iterable[PromptLike],
        *,
        timeout: float = float("inf"),
        **options: Unpack[CalibrateVectorOptions],
    ) -> AsyncStream[steering_pb2.CalibrateVectorResponse, CalibrationEvent, CalibrationResult]:
        """Measures what a vector does and costs by layer and strength, on prompts that are continued: points, then the
        strength at the knee, the safe ranges, and the vector stored anew with them.

        vector: id or tag.
        """
        request = requests.calibrate_vector(vector, prompts, **options)
        call = self._stream(self._stubs.steering.CalibrateVector, request, timeout)
        return AsyncStream(call, CalibrationCollector())

    @takes_options_of(requests.detect_concept)
    def detect_concept(
        self,
        detectors: str | Iterable[str],
        texts: TextsLike,
        target: str = "",
        *,
        timeout: float = float("inf"),
        **options: Unpack[DetectConceptOptions],
    ) -> AsyncStream[steering_pb2.DetectConceptResponse, ConceptDetectionEvent, ConceptDetection]:
        """Scores texts by vectors, and says how well each tells those of the label `target` from all others.

        detectors: ids or tags of vectors. Without a target the texts are scored alone.
        """
        request = requests.detect_concept(detectors, texts, target, **options)
        call = self._stream(self._stubs.steering.DetectConcept, request, timeout)
        return AsyncStream(call, ConceptDetectionCollector())

    @takes_options_of(requests.train_probe)
    def train_probe(
        self,
        texts: TextsLike,
        method: ProbeMethodName = "logistic",
        *,
        timeout: float = float("inf"),
        **options: Unpack[ProbeOptions],
    ) -> AsyncStream[probe_pb2.TrainProbeResponse, Progress | TrainedProbe, TrainedProbe]:
        """Trains a probe on texts by label: progress, then the stored probe with its report. Options: ProbeOptions."""
        call = self._stream(self._stubs.probes.TrainProbe, requests.train_probe(texts, method, **options), timeout)
        return AsyncStream(call, JobCollector(TrainedProbe.from_proto))

    @takes_options_of(requests.find_concept_circuit)
    def find_concept_circuit(
        self,
        scenarios: Iterable[ScenarioLike],
        target: str,
        *,
        timeout: float = float("inf"),
        **options: Unpack[ConceptCircuitOptions],
    ) -> AsyncStream[steering_pb2.FindConceptCircuitResponse, ConceptCircuitEvent, FoundConceptCircuit]:
        """Finds a direction that is the same in every context, such as that of an emotion, and the neurons and heads
        that write it: progress, then the stored vector, neuron set and head set, and what zeroing them takes.

        scenarios: of each context its texts by value. target: the value. Options: ConceptCircuitOptions.
        """
        request = requests.find_concept_circuit(scenarios, target, **options)
        call = self._stream(self._stubs.steering.FindConceptCircuit, request, timeout)
        return AsyncStream(call, JobCollector(FoundConceptCircuit.from_proto))

    @takes_options_of(requests.find_subspace)
    def find_subspace(
        self,
        method: SubspaceMethod,
        *,
        timeout: float = float("inf"),
        **options: Unpack[SubspaceOptions],
    ) -> AsyncStream[steering_pb2.FindSubspaceResponse, SubspaceEvent, FoundSubspace]:
        """Finds a subspace at each layer (patchclamp.subspaces): progress, then the stored subspace."""
        call = self._stream(self._stubs.steering.FindSubspace, requests.find_subspace(method, **options), timeout)
        return AsyncStream(call, JobCollector(FoundSubspace.from_proto))

    @takes_options_of(requests.calibrate_profile)
    def calibrate_profile(
        self,
        policy: sparse_policy_pb2.SparsePolicy,
        texts: str | Iterable[str],
        *,
        timeout: float = float("inf"),
        **options: Unpack[CalibrateOptions],
    ) -> AsyncStream[sparsity_pb2.CalibrateProfileResponse, Progress | CalibratedProfile, CalibratedProfile]:
        """Calibrates a policy (patchclamp.sparsity) on texts: progress, then the stored profile with its card."""
        call = self._stream(
            self._stubs.sparsity.CalibrateProfile, requests.calibrate_profile(policy, texts, **options), timeout
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
        """Measures policies and profiles against the dense model on texts, beside random sets of the same size."""
        request = requests.evaluate_profile(sparsities, texts, measure_speed=measure_speed, **options)
        call = self._stream(self._stubs.sparsity.EvaluateProfile, request, timeout)
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
        """Returns the neurons that a policy with fixed sets keeps for each prompt, and how much these sets overlap."""
        request = requests.predict_core_neurons(prompts, sparsity, layers, model)
        return CoreNeurons.from_proto(await self._unary(self._stubs.sparsity.PredictCoreNeurons, request, timeout))

    @takes_options_of(requests.detect_retrieval_heads)
    def detect_retrieval_heads(
        self,
        test: NeedleTest | None = None,
        *,
        timeout: float = float("inf"),
        **options: Unpack[DetectOptions],
    ) -> AsyncStream[head_pb2.DetectRetrievalHeadsResponse, DetectionEvent, RetrievalHeads]:
        """Hides needles in text and scores the heads that look at them while the model copies: progress, runs, result.

        The scores are stored as a head set.
        """
        request = requests.detect_retrieval_heads(test, **options)
        return AsyncStream(self._stream(self._stubs.heads.DetectRetrievalHeads, request, timeout), DetectionCollector())

    @takes_options_of(requests.score_heads)
    def score_heads(
        self,
        method: HeadScoreMethodName,
        *,
        timeout: float = float("inf"),
        **options: Unpack[HeadScoreOptions],
    ) -> AsyncStream[head_pb2.ScoreHeadsResponse, Progress | ScoredHeads, ScoredHeads]:
        """Scores every head by a method of the literature; the scores are stored as a head set."""
        call = self._stream(self._stubs.heads.ScoreHeads, requests.score_heads(method, **options), timeout)
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
        """Measures what editing heads does to needle success and perplexity, beside random heads.

        heads: (layer, head) pairs, or the id or tag of a head set.
        """
        request = requests.evaluate_head_edit(heads, mode, **options)
        call = self._stream(self._stubs.heads.EvaluateHeadEdit, request, timeout)
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
        """Ranks heads by their effect on clean/corrupt pairs; the effects are stored as a head set."""
        call = self._stream(self._stubs.heads.FindCircuit, requests.find_circuit(pairs, method, **options), timeout)
        return AsyncStream(call, JobCollector(Circuit.from_proto))

    async def compare_head_sets(
        self, head_sets: Iterable[str], *, top_k: int = 0, timeout: float | None = None
    ) -> tuple[HeadSetComparison, ...]:
        """Returns the overlap of every two head sets.

        top_k: how many of its best heads each set is compared by; 0 takes those that reach the threshold of their set.
        """
        request = requests.compare_head_sets(head_sets, top_k)
        response = await self._unary(self._stubs.heads.CompareHeadSets, request, timeout)
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
        """Splits logit(target) - logit(contrast) after the prompt into parts by head, MLP and source token."""
        request = requests.attribute_logits(prompt, target, **options)
        return LogitAttribution.from_proto(await self._unary(self._stubs.heads.AttributeLogits, request, timeout))

    @takes_options_of(requests.patch_activations)
    def patch_activations(
        self,
        pairs: PatchPair | Iterable[PatchPair],
        *,
        timeout: float = float("inf"),
        **options: Unpack[PatchActivationsOptions],
    ) -> AsyncStream[activation_pb2.PatchActivationsResponse, PatchEvent, PatchGrid]:
        """Runs one prompt of each pair with single activations of the other, and measures what that does to a metric.

        Progress comes first, then a cell for each site, layer and column of positions, then the grid of all of them.
        """
        request = requests.patch_activations(pairs, **options)
        call = self._stream(self._stubs.activations.PatchActivations, request, timeout)
        return AsyncStream(call, PatchCollector())

    @takes_options_of(requests.read_activations)
    def read_activations(
        self,
        texts: TextsLike,
        sites: SiteName | Iterable[SiteName],
        *,
        timeout: float = float("inf"),
        **options: Unpack[ReadActivationsOptions],
    ) -> AsyncStream[activation_pb2.ReadActivationsResponse, ActivationEvent, ReadActivations]:
        """Reads what texts hold at the sites of the model: progress, and rows or what they are reduced to.

        texts: a list of prompts, each read whole; or {label: texts}, the id or tag of a corpus or a TextSource, read in
        windows. The stream keeps what it has brought for `result`: what is larger than memory is better stored.
        """
        request = requests.read_activations(texts, sites, **options)
        return AsyncStream(
            self._stream(self._stubs.activations.ReadActivations, request, timeout), ReadActivationsCollector()
        )

    @takes_options_of(requests.decode_neurons)
    def decode_neurons(
        self,
        neurons: NeuronsLike | None = None,
        *,
        timeout: float = float("inf"),
        **options: Unpack[DecodeNeuronsOptions],
    ) -> AsyncStream[neuron_pb2.DecodeNeuronsResponse, Progress | DecodedNeurons, tuple[DecodedNeuron, ...]]:
        """Reads off the weights which tokens neurons stand for: progress, and neurons, some together.

        neurons: (layer, neuron) pairs, or the id or tag of a neuron set; by default all of `layers`. The
        stream keeps what it has brought for `result`: those of a whole model are better asked for layer by layer.
        """
        request = requests.decode_neurons(neurons, **options)
        return AsyncStream(self._stream(self._stubs.neurons.DecodeNeurons, request, timeout), DecodeCollector())

    @takes_options_of(requests.find_neurons)
    def find_neurons(
        self,
        words: str | Iterable[str] | None = None,
        *,
        vector: "VectorLike | None" = None,
        timeout: float = float("inf"),
        **options: Unpack[FindNeuronsOptions],
    ) -> AsyncStream[neuron_pb2.FindNeuronsResponse, Progress | FoundNeurons, FoundNeurons]:
        """Finds the neurons that write most in favour of a word, of several together, or along a vector.

        They are stored as a neuron set with values, which set_neurons takes. vector: instead of words, a direction of
        the residual stream.
        """
        request = requests.find_neurons(words, vector=vector, **options)
        call = self._stream(self._stubs.neurons.FindNeurons, request, timeout)
        return AsyncStream(call, JobCollector(FoundNeurons.from_proto))

    @takes_options_of(requests.search_features)
    def search_features(
        self, autoencoder: str, *, timeout: float = float("inf"), **options: Unpack[SearchFeaturesOptions]
    ) -> AsyncStream[feature_pb2.SearchFeaturesResponse, Progress | FoundFeatures, FoundFeatures]:
        """Ranks the features of an autoencoder by texts, tokens, a direction or their names.

        Options: SearchFeaturesOptions.
        """
        request = requests.search_features(autoencoder, **options)
        call = self._stream(self._stubs.features.SearchFeatures, request, timeout)
        return AsyncStream(call, JobCollector(FoundFeatures.from_proto))

    @takes_options_of(requests.localize_neurons)
    def localize_neurons(
        self,
        method: LocalizationMethod,
        *,
        timeout: float = float("inf"),
        **options: Unpack[LocalizeNeuronsOptions],
    ) -> AsyncStream[neuron_pb2.LocalizeNeuronsResponse, Progress | LocalizedNeurons, LocalizedNeurons]:
        """Finds the neurons of a relation, a language, a kind of text or a fact, by a method of patchclamp.neurons.

        They are stored as neuron sets, one for each label, with evidence on held-out texts beside random sets.
        """
        call = self._stream(self._stubs.neurons.LocalizeNeurons, requests.localize_neurons(method, **options), timeout)
        return AsyncStream(call, JobCollector(LocalizedNeurons.from_proto))

    @takes_options_of(requests.evaluate_neuron_edit)
    def evaluate_neuron_edit(
        self,
        neurons: NeuronsLike,
        mode: NeuronEditModeName,
        targets: NeuronTestLike | Iterable[NeuronTestLike],
        *,
        timeout: float = float("inf"),
        **options: Unpack[EvaluateNeuronEditOptions],
    ) -> AsyncStream[neuron_pb2.EvaluateNeuronEditResponse, NeuronEditEvent, NeuronEditEffect]:
        """Measures what editing growing fractions of a set does to tests, beside random sets: points, then the effect.

        neurons: (layer, neuron) pairs, or the id or tag of a neuron set. targets: tests of what should change.
        """
        request = requests.evaluate_neuron_edit(neurons, mode, targets, **options)
        call = self._stream(self._stubs.neurons.EvaluateNeuronEdit, request, timeout)
        return AsyncStream(call, NeuronEditCollector())

    @takes_options_of(requests.census_neurons)
    def census_neurons(
        self, texts: TextsLike, *, timeout: float = float("inf"), **options: Unpack[CensusNeuronsOptions]
    ) -> AsyncStream[neuron_pb2.CensusNeuronsResponse, Progress | NeuronCensus, NeuronCensus]:
        """Counts which neurons are dead, rare, always on, detectors of tokens or n-grams, or positional.

        texts: texts, or the id or tag of a corpus. An interrupted census goes on from its last checkpoint.
        """
        call = self._stream(self._stubs.neurons.CensusNeurons, requests.census_neurons(texts, **options), timeout)
        return AsyncStream(call, JobCollector(NeuronCensus.from_proto))

    @takes_options_of(requests.describe_neurons)
    def describe_neurons(
        self,
        neurons: NeuronsLike,
        texts: TextsLike,
        *,
        timeout: float = float("inf"),
        **options: Unpack[DescribeNeuronsOptions],
    ) -> AsyncStream[neuron_pb2.DescribeNeuronsResponse, Progress | NeuronDescription, tuple[NeuronDescription, ...]]:
        """Returns the contexts in which neurons are largest, neuron by neuron, and scores descriptions of them."""
        request = requests.describe_neurons(neurons, texts, **options)
        return AsyncStream(self._stream(self._stubs.neurons.DescribeNeurons, request, timeout), DescribeCollector())

    @takes_options_of(requests.match_neurons)
    def match_neurons(
        self,
        other: str,
        texts: TextsLike,
        *,
        timeout: float = float("inf"),
        **options: Unpack[MatchNeuronsOptions],
    ) -> AsyncStream[neuron_pb2.MatchNeuronsResponse, Progress | MatchedNeurons, MatchedNeurons]:
        """Finds the neurons of another checkpoint, by its --match-model name, that go with these over the same texts.

        The mutual matches are stored as a neuron set of the other model.
        """
        request = requests.match_neurons(other, texts, **options)
        call = self._stream(self._stubs.neurons.MatchNeurons, request, timeout)
        return AsyncStream(call, JobCollector(MatchedNeurons.from_proto))

    async def compare_neuron_sets(
        self, neuron_sets: Iterable[str], *, top_k: int = 0, timeout: float | None = None
    ) -> tuple[NeuronSetComparison, ...]:
        """Returns the overlap of every two neuron sets, beside what is expected of random ones.

        top_k: how many of its best neurons each set is compared by; 0 takes all.
        """
        request = requests.compare_neuron_sets(neuron_sets, top_k)
        response = await self._unary(self._stubs.neurons.CompareNeuronSets, request, timeout)
        return tuple(map(NeuronSetComparison.from_proto, response.comparisons))

    @takes_options_of(requests.create_watch)
    async def create_watch(
        self,
        items: Iterable[monitoring_pb2.WatchItem],
        *,
        timeout: float | None = None,
        **options: Unpack[WatchOptions],
    ) -> CreatedWatch:
        """Stores what is to be watched (patchclamp.monitoring) as an artifact. Options: WatchOptions."""
        request = requests.create_watch(items, **options)
        return CreatedWatch.from_proto(await self._unary(self._stubs.monitoring.CreateWatch, request, timeout))

    @takes_options_of(requests.start_watch)
    async def start_watch(
        self, watch: str, name: str = "", *, timeout: float | None = None, **options: Unpack[StartWatchOptions]
    ) -> RunningWatch:
        """Measures a stored watch (id or tag) in all that is served from now on. Options: StartWatchOptions.

        name: its label in Prometheus; default the tag.
        """
        request = requests.start_watch(watch, name or watch, **options)
        response = await self._unary(self._stubs.monitoring.StartWatch, request, timeout)
        return RunningWatch.from_proto(response.watch)

    async def stop_watch(self, name: str, *, timeout: float | None = None) -> RunningWatch:
        """Ends a running watch, and returns what it was."""
        request = build(monitoring_pb2.StopWatchRequest, name=name)
        response = await self._unary(self._stubs.monitoring.StopWatch, request, timeout)
        return RunningWatch.from_proto(response.watch)

    async def list_watches(self, *, timeout: float | None = None) -> RunningWatches:
        """Returns the watches that run, and the caps of the server."""
        request = monitoring_pb2.ListWatchesRequest()
        return RunningWatches.from_proto(await self._unary(self._stubs.monitoring.ListWatches, request, timeout))

    async def watch_statistics(
        self, name: str, items: Iterable[str] = (), *, timeout: float | None = None
    ) -> WatchStatistics:
        """Returns what a running watch has seen since it started; of these items only, where some are named."""
        request = build(monitoring_pb2.GetWatchStatisticsRequest, name=name, items=items)
        return WatchStatistics.from_proto(
            await self._unary(self._stubs.monitoring.GetWatchStatistics, request, timeout)
        )

    @takes_options_of(requests.record_reference)
    def record_reference(
        self, name: str, *, timeout: float = float("inf"), **options: Unpack[ReferenceOptions]
    ) -> AsyncStream[monitoring_pb2.RecordReferenceResponse, Progress | Artifact, Artifact]:
        """Stores the distribution of the next tokens that a running watch sees. Options: ReferenceOptions."""
        call = self._stream(self._stubs.monitoring.RecordReference, requests.record_reference(name, **options), timeout)
        return AsyncStream(call, ReferenceCollector())

    @takes_options_of(requests.watch_activations)
    def watch_activations(
        self, name: str, *, timeout: float = float("inf"), **options: Unpack[FollowOptions]
    ) -> AsyncStream[monitoring_pb2.WatchActivationsResponse, Activations, ActivationCounts]:
        """Streams activations above their thresholds as they occur, in batches. Options: FollowOptions."""
        call = self._stream(
            self._stubs.monitoring.WatchActivations, requests.watch_activations(name, **options), timeout
        )
        return AsyncStream(call, ActivationCollector())

    @takes_options_of(requests.upload)
    async def put_artifact(
        self, data: bytes | Path, *, timeout: float | None = None, **options: Unpack[UploadOptions]
    ) -> Artifact:
        """Stores an artifact: a vector unless kind= says otherwise. Options: UploadOptions."""
        response = await self._repeated(self._stubs.artifacts.Upload, lambda: requests.upload(data, **options), timeout)
        return Artifact.from_proto(response.artifact)

    async def download_artifact(
        self,
        ref: str,
        format: ArtifactFormatName = "safetensors",
        *,
        layers: Iterable[int] = (),
        timeout: float | None = None,
    ) -> bytes:
        """Returns the artifact, or some layers of it, as a file of this format."""
        call = self._stream(self._stubs.artifacts.Download, requests.download(ref, format, layers), timeout)
        return await AsyncStream(call, DownloadCollector()).result()

    async def export_autoencoder(self, ref: str, *, timeout: float | None = None) -> ExportedAutoencoder:
        """Returns an autoencoder as the two files of SAELens."""
        call = self._stream(self._stubs.artifacts.Download, requests.download(ref, "saelens", ()), timeout)
        return await AsyncStream(call, ExportCollector()).result()

    async def get_artifact(self, ref: str, *, timeout: float | None = None) -> Artifact:
        """Returns the artifact that an id or a tag names."""
        request = build(artifact_pb2.GetArtifactRequest, ref=ref)
        response = await self._unary(self._stubs.artifacts.GetArtifact, request, timeout)
        return Artifact.from_proto(response.artifact)

    async def list_artifacts(
        self,
        kind: ArtifactKindName | None = None,
        *,
        model_fingerprint: str = "",
        timeout: float | None = None,
    ) -> AsyncIterator[Artifact]:
        """Yields all artifacts, page by page; the timeout is for each page."""
        page_token = ""
        while True:
            request = requests.list_artifacts(kind, model_fingerprint, page_token)
            page = await self._unary(self._stubs.artifacts.ListArtifacts, request, timeout)
            for artifact in page.artifacts:
                yield Artifact.from_proto(artifact)
            page_token = page.next_page_token
            if not page_token:
                return

    async def tag_artifact(
        self, tag: str, ref: str, *, replace: bool = False, timeout: float | None = None
    ) -> Artifact:
        """Points a tag at an artifact.

        replace: whether a tag that names another artifact is moved; otherwise that is refused with ALREADY_EXISTS.
        """
        request = requests.tag_artifact(tag, ref, replace)
        response = await self._unary(self._stubs.artifacts.TagArtifact, request, timeout)
        return Artifact.from_proto(response.artifact)

    async def untag_artifact(self, tag: str, *, timeout: float | None = None) -> None:
        """Removes a tag; the artifact stays."""
        await self._unary(self._stubs.artifacts.TagArtifact, build(artifact_pb2.TagArtifactRequest, tag=tag), timeout)

    async def delete_artifact(self, ref: str, *, timeout: float | None = None) -> DeletedArtifact:
        """Removes the artifact and its tags, and returns which.

        A tag is refused where the artifact has others as well: give the id.
        """
        request = build(artifact_pb2.DeleteArtifactRequest, ref=ref)
        return DeletedArtifact.from_proto(await self._unary(self._stubs.artifacts.DeleteArtifact, request, timeout))

    async def start_job(self, request: JobRequest, *, timeout: float | None = None) -> Job:
        """Begins a long call that goes on without this client. A builder of patchclamp.requests makes the request.

        The job ends with the server. A request that is refused is the failure of its job.
        """
        message = requests.start_job(request)
        response = await self._unary(self._stubs.jobs.StartJob, message, timeout)
        return Job.from_proto(response.job)

    def follow_job(
        self, job_id: str, *, timeout: float = float("inf")
    ) -> AsyncStream[job_pb2.FollowJobResponse, JobEvent, JobResult]:
        """Streams a job's events from the first on, and has its result. Closing the stream does not end the job."""
        call = self._stream(self._stubs.jobs.FollowJob, requests.follow_job(job_id), timeout)
        return AsyncStream(call, FollowCollector())

    async def job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Returns what is known of a job. One of another tenant is NOT_FOUND, and so is any a day after its end."""
        request = requests.get_job(job_id)
        response = await self._unary(self._stubs.jobs.GetJob, request, timeout)
        return Job.from_proto(response.job)

    async def jobs(self, *, timeout: float | None = None) -> tuple[Job, ...]:
        """Returns the jobs of this caller, the newest first."""
        response = await self._unary(self._stubs.jobs.ListJobs, job_pb2.ListJobsRequest(), timeout)
        return tuple(map(Job.from_proto, response.jobs))

    async def cancel_job(self, job_id: str, *, timeout: float | None = None) -> Job:
        """Ends a job that runs, and returns what it was; one that has ended stays as it is."""
        request = requests.cancel_job(job_id)
        response = await self._unary(self._stubs.jobs.CancelJob, request, timeout)
        return Job.from_proto(response.job)

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """Returns the models that are served."""
        response = await self._unary(self._stubs.models.ListModels, model_pb2.ListModelsRequest(), timeout)
        return tuple(map(Model.from_proto, response.models))

    @takes_options_of(requests.tokenize)
    async def tokenize(
        self, prompt: PromptLike | None = None, *, timeout: float | None = None, **options: Unpack[PromptOptions]
    ) -> Tokenization:
        """Returns the tokens of the prompt exactly as `generate` would render it."""
        request = requests.tokenize(prompt, **options)
        return Tokenization.from_proto(await self._unary(self._stubs.models.Tokenize, request, timeout))

    async def detokenize(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        model: str = "",
        timeout: float | None = None,
    ) -> Detokenization:
        """Returns the text of token ids, of all together and of each.

        skip_special_tokens: whether `text` leaves special tokens out.
        """
        request = requests.detokenize(ids, skip_special_tokens, model)
        return Detokenization.from_proto(await self._unary(self._stubs.models.Detokenize, request, timeout))

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Asks the standard health service, and returns "serving", "not_serving" or "unknown"."""
        return health_status(await self._unary(self._stubs.health, build(HealthRequest, service=service), timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
