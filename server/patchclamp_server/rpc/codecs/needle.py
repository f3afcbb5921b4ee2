"""Turns messages of needle tests, detection and evaluation of head edits into dataclasses, and results into
messages."""

from patchclamp.v1 import head_pb2 as pb
from patchclamp_server.analysis.heads.retrieval.detect import Detection, RetrievalHeads
from patchclamp_server.analysis.heads.retrieval.needle_run import NeedleRun
from patchclamp_server.analysis.heads.retrieval.needles import Needle, NeedleTest, Plan, plan
from patchclamp_server.analysis.heads.retrieval.stopping import StoppingRule
from patchclamp_server.analysis.heads.sets.edits import HeadEditMode
from patchclamp_server.analysis.heads.sets.evaluation import (
    MAX_RANDOM_SETS,
    EditEvaluation,
    HeadEditEffect,
    HeadMetrics,
)
from patchclamp_server.analysis.progress import Progress
from patchclamp_server.artifacts.head_sets import DEFAULT_THRESHOLD
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.field_checks import count, distinct, finite, known, required
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.rpc.codecs.artifact import decode_label, encode_artifact
from patchclamp_server.rpc.codecs.head import decode_heads, encode_head, encode_score
from patchclamp_server.rpc.codecs.progress import encode_progress

MAX_HAYSTACKS = 64
MAX_NEEDLES = 1024
# This bounds the prompts of all runs, which are written before the first of them begins.
MAX_TEST_TOKENS = 4 * 1024 * 1024
# This bounds the runs of all sets of heads.
MAX_EDITED_RUNS = 10_000
DEFAULT_RANDOM_SETS = 10

MODES: dict[int, HeadEditMode] = {pb.HeadEditMode.Value(f"HEAD_EDIT_MODE_{mode.name}"): mode for mode in HeadEditMode}


def decode_detection(request: pb.DetectRetrievalHeadsRequest, info: ModelInfo) -> Detection:
    """Returns a checked job. Searches all texts for all needles: call it in a thread."""
    threshold = request.threshold if request.HasField("threshold") else DEFAULT_THRESHOLD
    if not 0.0 < threshold <= 1.0:
        raise InvalidArgument("threshold", f"expected a number above 0 and at most 1, got {threshold:g}")
    stopping = _stopping(request.stopping, info) if request.HasField("stopping") else None
    description, tags = decode_label(request)
    test, _ = _needle_test(request.test, info)
    return Detection(test, threshold, stopping, description, tags)


def encode_detection(event: Progress | NeedleRun | RetrievalHeads) -> pb.DetectRetrievalHeadsResponse:
    match event:
        case Progress():
            return encode_progress(event, pb.DetectRetrievalHeadsResponse)
        case NeedleRun():
            run = pb.NeedleRun(
                needle=event.needle,
                length=event.length,
                depth=event.depth,
                recall=event.recall,
                success=event.success,
                answer=event.answer,
            )
            return pb.DetectRetrievalHeadsResponse(run=run)
        case RetrievalHeads():
            scores = [encode_score(s.head, s.score, s.low, s.high, always_on=s.always_on) for s in event.scores]
            result = pb.RetrievalHeads(
                artifact=encode_artifact(event.artifact),
                scores=scores,
                runs=event.runs,
                successes=event.successes,
                threshold=event.threshold,
                fraction_above_threshold=event.fraction_above_threshold,
                stability=event.stability,
                stopped_early=event.stopped_early,
            )
            return pb.DetectRetrievalHeadsResponse(result=result)


def decode_edit_evaluation(request: pb.EvaluateHeadEditRequest, info: ModelInfo) -> EditEvaluation:
    """Returns a job that is checked but for its heads. Searches all texts for all needles: call it in a thread."""
    required(request, "heads", "")
    heads = decode_heads(request.heads, "heads")
    mode = known(request.mode, MODES, "mode", pb.HeadEditMode.keys()[1:])
    scale = finite(request.scale, "scale")
    if scale and mode is not HeadEditMode.SCALE:
        raise InvalidArgument("scale", f"is a parameter of the mode scale; the mode is {mode.value}")
    random_sets = count(request.random_sets or DEFAULT_RANDOM_SETS, "random_sets", low=1, high=MAX_RANDOM_SETS)
    test, planned = _needle_test(request.test, info)
    runs = (2 + random_sets) * len(planned.placements)
    if runs > MAX_EDITED_RUNS:
        message = (
            f"{len(planned.placements)} runs of {2 + random_sets} sets of heads (none, these and random ones) are"
            f" {runs}; at most {MAX_EDITED_RUNS} are made: set max_runs, or ask for fewer random sets"
        )
        raise InvalidArgument("test.max_runs", message)
    return EditEvaluation(heads, mode, scale, random_sets, request.seed, test, tuple(request.texts))


def encode_edit_evaluation(event: Progress | HeadEditEffect) -> pb.EvaluateHeadEditResponse:
    if isinstance(event, Progress):
        return encode_progress(event, pb.EvaluateHeadEditResponse)
    effect = pb.HeadEditEffect(
        unedited=_metrics(event.unedited),
        edited=_metrics(event.edited),
        random=[_metrics(drawn) for drawn in event.random],
        random_success_mean=event.random_success_mean,
        random_success_deviation=event.random_success_deviation,
        random_perplexity_mean=event.random_perplexity_mean,
        random_perplexity_deviation=event.random_perplexity_deviation,
    )
    return pb.EvaluateHeadEditResponse(result=effect)


def _needle_test(proto: pb.NeedleTest, info: ModelInfo) -> tuple[NeedleTest, Plan]:
    """Returns the field `test` of a request, and its runs."""
    if len(proto.haystacks) > MAX_HAYSTACKS:
        raise InvalidArgument("test.haystacks", f"expected at most {MAX_HAYSTACKS}, got {len(proto.haystacks)}")
    if len(proto.needles) > MAX_NEEDLES:
        raise InvalidArgument("test.needles", f"expected at most {MAX_NEEDLES}, got {len(proto.needles)}")
    test = NeedleTest(
        haystacks=tuple(proto.haystacks),
        needles=tuple(Needle(n.question, n.needle, n.answer) for n in proto.needles),
        lengths=distinct(proto.lengths, "test.lengths"),
        depths=distinct(proto.depths, "test.depths"),
        seed=proto.seed,
        max_runs=proto.max_runs,
    )
    planned = plan(test, info)
    tokens = sum(placement.length for placement in planned.placements)
    if tokens > MAX_TEST_TOKENS:
        message = f"{len(planned.placements)} prompts of {tokens} tokens; at most {MAX_TEST_TOKENS} are run"
        raise InvalidArgument("test.max_runs", message)
    return test, planned


def _stopping(proto: pb.StoppingRule, info: ModelInfo) -> StoppingRule:
    default = StoppingRule()
    n_heads = info.n_layers * info.n_heads
    rule = StoppingRule(
        top_k=proto.top_k or min(default.top_k, n_heads),
        agreement=proto.agreement if proto.HasField("agreement") else default.agreement,
        window=proto.window or default.window,
        min_successes=proto.min_successes or default.min_successes,
    )
    rule.check(n_heads, "stopping")
    return rule


def _metrics(metrics: HeadMetrics) -> pb.HeadMetrics:
    return pb.HeadMetrics(
        runs=metrics.runs,
        successes=metrics.successes,
        mean_recall=metrics.mean_recall,
        perplexity=metrics.perplexity,
        heads=[encode_head(head) for head in metrics.heads],
    )
