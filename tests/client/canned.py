"""Servicers that answer with fixed messages, and remember what they were asked."""

from collections.abc import Iterator
from typing import Any

from patchclamp.v1 import (
    artifact_pb2,
    generation_pb2,
    head_pb2,
    job_pb2,
    model_pb2,
    monitoring_pb2,
    program_pb2,
    sparse_policy_pb2,
    sparsity_pb2,
)
from patchclamp.v1.generation_pb2_grpc import GenerationServiceServicer
from patchclamp.v1.head_pb2_grpc import HeadServiceServicer
from patchclamp.v1.job_pb2_grpc import JobServiceServicer
from patchclamp.v1.model_pb2_grpc import ModelServiceServicer
from patchclamp.v1.monitoring_pb2_grpc import MonitoringServiceServicer
from patchclamp.v1.sparsity_pb2_grpc import SparsityServiceServicer

QUALITY = sparsity_pb2.QualityCard(
    perplexity_ratio=1.0206,
    divergence=0.0224,
    top1_agreement=0.902,
    sparsity=0.5,
    bytes_read_16=0.682,
    documents=2,
    scored_tokens=510,
    dense_perplexity=37.22,
)
RANDOM = sparsity_pb2.QualityCard(perplexity_ratio=99.3627, bytes_read_16=0.5, sparsity=0.5)
PROFILE = artifact_pb2.Artifact(
    id="sha256:" + "ab" * 32, tags=["mine"], kind=artifact_pb2.ARTIFACT_KIND_SPARSITY_PROFILE
)
HEAD_SET = artifact_pb2.Artifact(id="sha256:" + "cd" * 32, tags=["retrieval"], kind=artifact_pb2.ARTIFACT_KIND_HEAD_SET)
WATCH = artifact_pb2.Artifact(id="sha256:" + "ef" * 32, kind=artifact_pb2.ARTIFACT_KIND_WATCH)
REFERENCE = artifact_pb2.Artifact(id="sha256:" + "01" * 32, kind=artifact_pb2.ARTIFACT_KIND_WATCH_REFERENCE)


class Sparsities(SparsityServiceServicer):
    """Two evaluations come in the wrong order on purpose."""

    def __init__(self) -> None:
        self.request: Any = None

    def CalibrateProfile(self, request: Any, context: Any) -> Iterator[sparsity_pb2.CalibrateProfileResponse]:
        self.request = request
        progress = sparsity_pb2.SparsityProgress(stage="calibration", done=1, total=2)
        yield sparsity_pb2.CalibrateProfileResponse(progress=progress)
        result = sparsity_pb2.CalibratedProfile(artifact=PROFILE, quality=QUALITY, random_control=RANDOM)
        yield sparsity_pb2.CalibrateProfileResponse(result=result)

    def EvaluateProfile(self, request: Any, context: Any) -> Iterator[sparsity_pb2.EvaluateProfileResponse]:
        self.request = request
        progress = sparsity_pb2.SparsityProgress(stage="quality", done=0, total=2)
        yield sparsity_pb2.EvaluateProfileResponse(progress=progress)
        speed = sparsity_pb2.SpeedCard(
            dense_seconds_per_token=0.02, sparse_seconds_per_token=0.016, speedup=1.25, tokens=64
        )
        for index in reversed(range(len(request.sparsities))):
            policy = request.sparsities[index].policy
            evaluation = sparsity_pb2.SparsityEvaluation(
                index=index,
                policy=policy.WhichOneof("policy") or "fovea",
                keep_ratio=policy.keep_ratio,
                quality=QUALITY,
                random_control=RANDOM,
                speed=speed if request.measure_speed else None,
            )
            yield sparsity_pb2.EvaluateProfileResponse(evaluation=evaluation)

    def PredictCoreNeurons(self, request: Any, context: Any) -> sparsity_pb2.PredictCoreNeuronsResponse:
        self.request = request
        layers = [
            sparsity_pb2.LayerNeurons(layer=3, neurons=[1, 2, 5]),
            sparsity_pb2.LayerNeurons(layer=4, neurons=list(range(10, 30))),
        ]
        return sparsity_pb2.PredictCoreNeuronsResponse(
            prompts=[sparsity_pb2.CoreNeurons(layers=layers) for _ in request.prompts],
            overlaps=[sparsity_pb2.CoreOverlap(first=0, second=1, jaccard=[0.5, 0.25], mean_jaccard=0.375)],
        )


def head_score(
    layer: int, head: int, score: float, width: float | None = 0.0, always_on: bool = False
) -> head_pb2.HeadScore:
    """`width` None: without an interval."""
    return head_pb2.HeadScore(
        head=head_pb2.HeadId(layer=layer, head=head),
        score=score,
        low=None if width is None else score - width,
        high=None if width is None else score + width,
        always_on=always_on,
    )


class Heads(HeadServiceServicer):
    """A model of two layers and three heads, of which L1H2 retrieves."""

    def __init__(self) -> None:
        self.request: Any = None
        self.scores = [
            head_score(1, 2, 0.75, 0.125, always_on=True),
            head_score(0, 1, 0.25, 0.125),
            *(head_score(layer, head, 0.0) for layer, head in ((0, 0), (0, 2), (1, 0), (1, 1))),
        ]

    def DetectRetrievalHeads(self, request: Any, context: Any) -> Iterator[head_pb2.DetectRetrievalHeadsResponse]:
        self.request = request
        progress = head_pb2.HeadProgress(stage="needles", done=1, total=3)
        yield head_pb2.DetectRetrievalHeadsResponse(progress=progress)
        for length, depth, success in ((256, 0.1, True), (256, 0.1, False), (512, 0.5, True)):
            run = head_pb2.NeedleRun(length=length, depth=depth, success=success, recall=0.75, answer="a sandwich")
            yield head_pb2.DetectRetrievalHeadsResponse(run=run)
        result = head_pb2.RetrievalHeads(
            artifact=HEAD_SET,
            scores=self.scores,
            runs=3,
            successes=2,
            threshold=0.1,
            fraction_above_threshold=1 / 3,
            stability=0.9,
            stopped_early=True,
        )
        yield head_pb2.DetectRetrievalHeadsResponse(result=result)

    def ScoreHeads(self, request: Any, context: Any) -> Iterator[head_pb2.ScoreHeadsResponse]:
        self.request = request
        scores = [head_score(s.head.layer, s.head.head, s.score, None) for s in self.scores]
        yield head_pb2.ScoreHeadsResponse(result=head_pb2.ScoredHeads(artifact=HEAD_SET, scores=scores))

    def EvaluateHeadEdit(self, request: Any, context: Any) -> Iterator[head_pb2.EvaluateHeadEditResponse]:
        self.request = request

        def metrics(successes: int, perplexity: float, *heads: tuple[int, int]) -> head_pb2.HeadMetrics:
            ids = [head_pb2.HeadId(layer=layer, head=head) for layer, head in heads]
            return head_pb2.HeadMetrics(
                runs=12, successes=successes, mean_recall=successes / 12, perplexity=perplexity, heads=ids
            )

        effect = head_pb2.HeadEditEffect(
            unedited=metrics(7, 26.2),
            edited=metrics(0, 27.9, (1, 2)),
            random=[metrics(8, 26.5, (0, 0)), metrics(6, 26.25, (1, 1))],
            random_success_mean=7.0,
            random_success_deviation=1.0,
            random_perplexity_mean=26.375,
            random_perplexity_deviation=0.125,
        )
        yield head_pb2.EvaluateHeadEditResponse(progress=head_pb2.HeadProgress(stage="edited", done=1, total=1))
        yield head_pb2.EvaluateHeadEditResponse(result=effect)

    def FindCircuit(self, request: Any, context: Any) -> Iterator[head_pb2.FindCircuitResponse]:
        self.request = request
        effects = [head_score(0, 1, -0.5, 0.125), head_score(1, 2, 0.25, 0.125), *self.scores[2:]]
        circuit = head_pb2.Circuit(
            artifact=HEAD_SET,
            effects=effects,
            clean_metric=3.5,
            corrupt_metric=-3.25,
            faithfulness=0.875,
            random_faithfulness_mean=0.125,
            random_faithfulness_deviation=0.0625,
        )
        yield head_pb2.FindCircuitResponse(result=circuit)

    def CompareHeadSets(self, request: Any, context: Any) -> head_pb2.CompareHeadSetsResponse:
        self.request = request
        comparison = head_pb2.HeadSetComparison(
            first=0,
            second=1,
            jaccard=0.5,
            overlap_coefficient=0.75,
            expected_common=0.25,
            common=3,
            rank_correlation=0.95,
        )
        return head_pb2.CompareHeadSetsResponse(comparisons=[comparison])

    def AttributeLogits(self, request: Any, context: Any) -> head_pb2.AttributeLogitsResponse:
        self.request = request
        parts = {(1, 2): 2.0, (0, 1): -0.5}
        heads = [
            head_pb2.HeadAttribution(
                head=head_pb2.HeadId(layer=layer, head=head),
                part=parts.get((layer, head), 0.0),
                sources=[0.25, 1.75] if (layer, head) == (1, 2) else [],
            )
            for layer in range(2)
            for head in range(3)
        ]
        return head_pb2.AttributeLogitsResponse(
            logit_difference=2.5, parts_sum=2.5, embedding=0.5, mlps=[0.25, 0.125], biases=0.125, heads=heads
        )


class Monitoring(MonitoringServiceServicer):
    """One watch of two items, which drifts once it has a reference."""

    def __init__(self) -> None:
        self.request: Any = None
        self.watch = monitoring_pb2.RunningWatch(
            name="safety",
            watch=WATCH.id,
            items=["joy", "suspects/L12N3"],
            sampling_rate=0.5,
            phases=[program_pb2.PHASE_GENERATED],
            window_tokens=64,
            buckets=[-1.0, 0.0, 1.0],
            reference=REFERENCE.id,
            tokens=100,
        )
        self.watch.started.FromSeconds(0)

    def CreateWatch(self, request: Any, context: Any) -> monitoring_pb2.CreateWatchResponse:
        self.request = request
        return monitoring_pb2.CreateWatchResponse(artifact=WATCH, items=self.watch.items)

    def StartWatch(self, request: Any, context: Any) -> monitoring_pb2.StartWatchResponse:
        self.request = request
        return monitoring_pb2.StartWatchResponse(watch=self.watch)

    def StopWatch(self, request: Any, context: Any) -> monitoring_pb2.StopWatchResponse:
        self.request = request
        return monitoring_pb2.StopWatchResponse(watch=self.watch)

    def ListWatches(self, request: Any, context: Any) -> monitoring_pb2.ListWatchesResponse:
        listed = monitoring_pb2.RunningWatch()
        listed.CopyFrom(self.watch)
        running, refused = monitoring_pb2.WATCH_STATE_RUNNING, monitoring_pb2.WATCH_STATE_REFUSED
        listed.replicas.add(replica="here-1", state=running, tokens=100)
        listed.replicas.add(replica="there-2", state=refused, reason="16 watches are running")
        return monitoring_pb2.ListWatchesResponse(watches=[listed], max_watches=16, max_items=4096, replica="here-1")

    def GetWatchStatistics(self, request: Any, context: Any) -> monitoring_pb2.GetWatchStatisticsResponse:
        self.request = request
        quantile = monitoring_pb2.Quantile(probability=0.5, value=0.25)
        figures = {"tokens": 100, "fired": 25, "mean": 0.5, "standard_deviation": 1.5, "min": -2.0, "max": 3.0}
        drift = {"drift": 0.75, "drift_noise": 0.25, "drift_excess": 0.5}
        passed = {"not_finite": 2, "tokens_left_out": 3}
        items = [
            monitoring_pb2.ItemStatistics(
                name="joy",
                quantiles=[quantile],
                kind=monitoring_pb2.WATCH_ITEM_KIND_DIRECTION,
                threshold=1.5,
                **drift,
                **figures,
            ),
            monitoring_pb2.ItemStatistics(name="suspects/L12N3", quantiles=[quantile], **passed, **figures),
        ]
        kind = monitoring_pb2.KindStatistics(
            kind=monitoring_pb2.WATCH_ITEM_KIND_DIRECTION,
            items=1,
            values=100,
            fired=25,
            mean=0.5,
            min=-2.0,
            max=3.0,
            buckets=[-1.0, 1.0],
            values_left_out=4,
        )
        return monitoring_pb2.GetWatchStatisticsResponse(
            watch=self.watch,
            items=items,
            mean_drift=0.75,
            max_drift=0.75,
            mean_drift_noise=0.25,
            max_drift_noise=0.375,
            mean_drift_excess=0.5,
            max_drift_excess=0.375,
            kinds=[kind],
            calibration=monitoring_pb2.WatchCalibration(
                scale=monitoring_pb2.WATCH_SCALE_FIRST_TOKENS, tokens=100, total=1024
            ),
            sink_tokens=7,
        )

    def RecordReference(self, request: Any, context: Any) -> Iterator[monitoring_pb2.RecordReferenceResponse]:
        self.request = request
        progress = monitoring_pb2.RecordReferenceProgress(tokens=32, total=64)
        yield monitoring_pb2.RecordReferenceResponse(progress=progress)
        yield monitoring_pb2.RecordReferenceResponse(result=REFERENCE)

    def WatchActivations(self, request: Any, context: Any) -> Iterator[monitoring_pb2.WatchActivationsResponse]:
        self.request = request
        for number in (1, 2):
            activation = monitoring_pb2.Activation(
                item="joy",
                value=2.5,
                token_id=7,
                token=" day",
                position=9,
                sequence=number,
                phase=program_pb2.PHASE_GENERATED,
            )
            activation.time.FromMilliseconds(1500)
            yield monitoring_pb2.WatchActivationsResponse(activations=[activation], dropped=3 * (number - 1))


class Jobs(JobServiceServicer):
    """Begins whatever it is asked for."""

    def __init__(self) -> None:
        self.request: Any = None

    def StartJob(self, request: Any, context: Any) -> job_pb2.StartJobResponse:
        self.request = request
        return job_pb2.StartJobResponse(job=job_pb2.Job(id="job-1", state=job_pb2.JOB_STATE_RUNNING))


class Models(ModelServiceServicer):
    """Every prompt is two tokens."""

    def ListModels(self, request: Any, context: Any) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse()

    def Tokenize(self, request: Any, context: Any) -> model_pb2.TokenizeResponse:
        return model_pb2.TokenizeResponse(ids=[1, 2], pieces=["The", " cat"])

    def Detokenize(self, request: Any, context: Any) -> model_pb2.DetokenizeResponse:
        pieces = ["The", " cat"][: len(request.ids)]
        return model_pb2.DetokenizeResponse(text="".join(pieces), pieces=pieces)


class Generations(GenerationServiceServicer):
    """Two tokens; a report of whatever was asked for."""

    def __init__(self) -> None:
        self.request: Any = None

    def Generate(self, request: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:
        self.request = request
        grounded = request.HasField("grounding")
        source = generation_pb2.CopySource(position=4, layer=1, head=2, probability=0.5)
        yield generation_pb2.GenerateResponse(
            text="a sandwich",
            tokens=[
                generation_pb2.GeneratedToken(id=7, position=9, sources=[source] if grounded else []),
                generation_pb2.GeneratedToken(id=8, position=10),
            ],
        )
        place = generation_pb2.GroundedRange(start=4, end=5, tokens=1, text=" a\n")
        finished = generation_pb2.Finished(
            reason=generation_pb2.FINISH_REASON_EOS,
            sparsity=sparsity_report(request.sparsity) if request.HasField("sparsity") else None,
            grounding=generation_pb2.GroundingReport(grounded_ratio=0.5, grounded_tokens=1, ranges=[place])
            if grounded
            else None,
            confidence=confidence_report(request.confidence) if request.HasField("confidence") else None,
        )
        yield generation_pb2.GenerateResponse(finished=finished)

    def Session(self, request_iterator: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:
        yield from self.Generate(next(request_iterator).start.request, context)

    def Score(self, request: Any, context: Any) -> generation_pb2.ScoreResponse:
        self.request = request
        report = sparsity_report(request.sparsity) if request.HasField("sparsity") else None
        confidence = confidence_report(request.confidence) if request.HasField("confidence") else None
        return generation_pb2.ScoreResponse(perplexity=2.0, sparsity=report, confidence=confidence)

    def Compare(self, request: Any, context: Any) -> Iterator[generation_pb2.CompareResponse]:
        for side in (generation_pb2.COMPARE_SIDE_EDITED, generation_pb2.COMPARE_SIDE_BASELINE):
            for response in self.Generate(request.request, context):
                yield generation_pb2.CompareResponse(text=generation_pb2.CompareText(side=side, response=response))
        yield generation_pb2.CompareResponse(summary=generation_pb2.CompareSummary(positions=2))


def confidence_report(asked: generation_pb2.Confidence) -> generation_pb2.ConfidenceReport:
    """Of three layers; each option is as likely as the others."""
    share = 1 / max(len(asked.options), 1)
    options = [
        generation_pb2.OptionConfidence(option=option, token=i, probability=[share] * 3)
        for i, option in enumerate(asked.options)
    ]
    return generation_pb2.ConfidenceReport(
        consistency=0.375,
        layers=[0, 1, 2],
        layer_agreement=[0.25, 0.5, 1.0],
        layer_probability=[0.125, 0.25, 0.75],
        options=options,
        tokens=1 if options else 2,
    )


def sparsity_report(asked: sparse_policy_pb2.Sparsity) -> sparse_policy_pb2.SparsityReport:
    """With a guard it tells of a fallback at position 10."""
    guard = sparse_policy_pb2.GuardReport(
        sampled_tokens=8, mean_divergence=0.25, top1_agreement=0.75, max_divergence=0.125, dense_from=10
    )
    return sparse_policy_pb2.SparsityReport(
        policy=asked.policy.WhichOneof("policy") or "fovea",
        profile=asked.profile,
        sparse_tokens=1,
        dense_tokens=1,
        active_ratio=0.5,
        guard=guard if asked.HasField("guard") else None,
    )
