"""HeadService through a real channel: detect, score, edit, circuits, comparison, attribution; refusals; cancelled jobs.

Heads of the tiny random llama (two layers of four) are scored and searched; the embedded model has heads to detect.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.json_format import MessageToDict
from live import LiveServer
from statuses import Failure, failure

from patchclamp.v1 import artifact_pb2, generation_pb2
from patchclamp.v1 import head_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.head_pb2_grpc import HeadServiceStub
from patchclamp_server.analysis.heads.circuits.runs import run
from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.model.load import load_model
from patchclamp_server.model.sites import Site

LAYERS, HEADS, CONTEXT = 2, 4, 256
NEEDLE = pb.Needle(question="Which key?", needle="The key is of red glass.", answer="red glass")
# A token a byte; two runs.
TEST = pb.NeedleTest(
    haystacks=["It rained. Nobody came. " * 5], needles=[NEEDLE], lengths=[150, 180], depths=[0.5], max_runs=2
)
TEXTS = ["Nobody came that day, and it rained. " * 4]
PRINTABLE = [chr(i) for i in range(33, 127)]
SEQUENCES = {"sequence_tokens": 16, "sequences": 3}


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(load_model(str(tiny_llama_dir)), tmp_path_factory.mktemp("artifacts")) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> HeadServiceStub:
    return HeadServiceStub(channel)


@pytest.fixture(scope="module")
def store(server: LiveServer) -> ArtifactStore:
    """The server's own, with head sets that others have made, and what is none."""
    store = ArtifactStore(server.server.config.artifacts_url)
    fingerprint = server.model.info.fingerprint
    scores = torch.tensor([[0.0, 0.7, 0.05, 0.0], [0.3, 0.0, 0.0, 0.9]])
    sets = {
        "known": (scores, fingerprint, {"threshold": 0.5}),
        "unreached": (scores, fingerprint, {"threshold": 2.0}),
        "foreign": (scores, "sha256:" + "0" * 64, {}),
        "wide": (torch.rand(LAYERS, HEADS + 1), fingerprint, {}),
    }
    for tag, (values, made_for, evidence) in sets.items():
        store.put(ArtifactKind.HEAD_SET, {"scores": values}, model_fingerprint=made_for, evidence=evidence, tags=[tag])
    vector = {"layer.0": torch.ones(32)}
    store.put(ArtifactKind.VECTOR, vector, model_fingerprint=fingerprint, site=Site.RESID_POST, tags=["vector"])
    return store


@pytest.fixture(scope="module")
def pairs(server: LiveServer) -> list[pb.CleanCorruptPair]:
    """Prompts that differ where heads alone look, with the answers that tell them apart best."""
    tokenizer, decoder = server.model.tokenizer, server.model.decoder
    answers = torch.tensor([tokenizer.encode(answer, add_special_tokens=False)[0] for answer in PRINTABLE])
    found = []
    for clean, corrupt in (("AAAAAAAA is", "zzzzzzzz is"), ("~~~~~~~~ is", "++++++++ is")):
        ends = [run(decoder, tuple(tokenizer.encode(text))).end for text in (clean, corrupt)]
        logits = decoder.logits(torch.stack(ends))[:, answers]
        told = logits[0] - logits[1]
        found.append(
            pb.CleanCorruptPair(
                clean=text_prompt(clean),
                corrupt=text_prompt(corrupt),
                clean_answer=PRINTABLE[int(told.argmax())],
                corrupt_answer=PRINTABLE[int(told.argmin())],
            )
        )
    return found


def text_prompt(text: str) -> generation_pb2.Prompt:
    return generation_pb2.Prompt(text=text)


def listed(*heads: tuple[int, int]) -> pb.HeadSelection:
    return pb.HeadSelection(heads=pb.HeadIds(heads=[pb.HeadId(layer=layer, head=head) for layer, head in heads]))


def pair_of(head: pb.HeadId) -> tuple[int, int]:
    return head.layer, head.head


def detection(**fields: Any) -> pb.DetectRetrievalHeadsRequest:
    return pb.DetectRetrievalHeadsRequest(**{"test": TEST, **fields})


def detection_of(**fields: Any) -> pb.DetectRetrievalHeadsRequest:
    """A detection with a test that is right, but for these fields."""
    test = pb.NeedleTest()
    test.CopyFrom(TEST)
    for name in fields:
        test.ClearField(name)
    test.MergeFrom(pb.NeedleTest(**fields))
    return detection(test=test)


def scoring(method: str, **fields: Any) -> pb.ScoreHeadsRequest:
    return pb.ScoreHeadsRequest(method=f"HEAD_SCORE_METHOD_{method.upper()}", **fields)


def facts(*extra: pb.TemporalFact, **fields: Any) -> pb.ScoreHeadsRequest:
    given = [pb.TemporalFact(prompt=f"In 19{i}0 it", answer=" was", time_conditioned=i < 2) for i in range(4)]
    return scoring("temporal", facts=[*given, *extra], **fields)


def edit(mode: str = "zero", **fields: Any) -> pb.EvaluateHeadEditRequest:
    right = {"heads": listed((0, 1), (1, 3)), "random_sets": 2, "test": TEST, "texts": TEXTS}
    return pb.EvaluateHeadEditRequest(**{**right, "mode": f"HEAD_EDIT_MODE_{mode.upper()}", **fields})


def circuit(pairs: list[pb.CleanCorruptPair], method: str = "path_patching", **fields: Any) -> pb.FindCircuitRequest:
    number = pb.CircuitMethod.Value(f"CIRCUIT_METHOD_{method.upper()}")
    return pb.FindCircuitRequest(**{"method": number, "pairs": pairs, "circuit_size": 2, "random_sets": 3, **fields})


def cat(**fields: Any) -> pb.FindCircuitRequest:
    """A circuit of one pair that is right, but for these fields."""
    right = {"clean": text_prompt("cat"), "corrupt": text_prompt("rat"), "clean_answer": "c", "corrupt_answer": "r"}
    return circuit([pb.CleanCorruptPair(**{**right, **fields})])


def attribution(**fields: Any) -> pb.AttributeLogitsRequest:
    return pb.AttributeLogitsRequest(**{"prompt": text_prompt("hello"), "target": "a", **fields})


def comparison(*refs: str, top_k: int = 0) -> pb.CompareHeadSetsRequest:
    return pb.CompareHeadSetsRequest(head_sets=refs, top_k=top_k)


def result(events: Any) -> Any:
    *_, last = events
    assert last.WhichOneof("event") == "result"
    return last.result


def steps(events: list[Any]) -> list[tuple[str, int, int]]:
    return [(e.progress.stage, e.progress.done, e.progress.total) for e in events]


def refusal(call: Callable[[], Any]) -> Failure:
    with pytest.raises(grpc.RpcError) as caught:
        ended(call())
    return failure(caught.value)


def ended(answer: Any) -> None:
    """To the end of a stream; a call with one response has ended."""
    if isinstance(answer, grpc.Call):
        list(answer)


def field_of(refused: Failure) -> str:
    return str(refused.details["ErrorInfo"].metadata["field"])


def generate(channel: grpc.Channel, prompt: generation_pb2.Prompt, tokens: int, **fields: Any) -> Any:
    stop = generation_pb2.StopConditions(max_tokens=tokens)
    request = generation_pb2.GenerateRequest(prompt=prompt, stop=stop, **fields)
    responses = list(GenerationServiceStub(channel).Generate(request))
    return [token for r in responses for token in r.tokens], responses[-1].finished


# Scores.


@pytest.mark.parametrize("method", ["induction", "previous_token", "ngram"])
def test_scores_of_all_heads_come_after_the_progress_and_are_stored(
    stub: HeadServiceStub, store: ArtifactStore, server: LiveServer, method: str
) -> None:
    *progress, last = stub.ScoreHeads(scoring(method, **SEQUENCES, description="of words", tags=[method]))
    assert steps(progress) == [("sequences", n, 3) for n in (1, 2, 3)]
    found = last.result.scores
    stored, low, high = store.get(method).head_scores()
    assert {pair_of(s.head): s.score for s in found} == {
        (layer, head): float(stored[layer, head]) for layer in range(LAYERS) for head in range(HEADS)
    }
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
    assert low is not None
    assert high is not None
    for s in found:
        assert (s.low, s.high) == (float(low[pair_of(s.head)]), float(high[pair_of(s.head)]))
    artifact = last.result.artifact
    assert (artifact.kind, artifact.tags) == (artifact_pb2.ARTIFACT_KIND_HEAD_SET, [method])
    assert (artifact.description, artifact.model_fingerprint) == ("of words", server.model.info.fingerprint)
    assert MessageToDict(artifact.provenance)["method"] == method


def test_one_measurement_has_no_interval(stub: HeadServiceStub) -> None:
    found = result(stub.ScoreHeads(scoring("ov_nuclear_norm")))
    assert len(found.scores) == LAYERS * HEADS
    assert not any(s.HasField("low") or s.HasField("high") for s in found.scores)


def test_successors_are_scored_from_the_weights(stub: HeadServiceStub) -> None:
    *progress, last = stub.ScoreHeads(scoring("successor"))
    assert steps(progress) == [("layers", 1, 2), ("layers", 2, 2), ("vocabulary", 1, 2), ("vocabulary", 2, 2)]
    assert all(0 <= s.low <= s.score <= s.high <= 1 for s in last.result.scores)


def test_temporal_facts_are_requests_of_the_engine(stub: HeadServiceStub, server: LiveServer) -> None:
    before = server.server.engine.stats().steps
    *progress, last = stub.ScoreHeads(facts(seed=2**64 - 1))
    n = 4 * (1 + LAYERS * HEADS)
    assert steps(progress)[-1] == ("effects", n, n)
    assert len(last.result.scores) == LAYERS * HEADS
    assert server.server.engine.stats().steps > before


# Edits.


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform", "scale"])
def test_an_edit_is_measured_beside_random_sets_in_every_mode(stub: HeadServiceStub, mode: str) -> None:
    request = edit(mode, scale=2.0 if mode == "scale" else 0.0)
    *progress, last = stub.EvaluateHeadEdit(request)
    # Two needles and a text, under no edit, that of the heads and two random ones.
    assert steps(progress) == [("metrics", n, 12) for n in range(1, 13)]
    effect = last.result
    assert [pair_of(head) for head in effect.edited.heads] == [(0, 1), (1, 3)]
    assert not effect.unedited.heads
    assert effect.edited.perplexity != pytest.approx(effect.unedited.perplexity, rel=1e-6)
    assert [m.runs for m in (effect.unedited, effect.edited, *effect.random)] == [2] * 4
    drawn = [m.perplexity for m in effect.random]
    assert effect.random_perplexity_mean == pytest.approx(sum(drawn) / 2)
    assert effect.random_perplexity_deviation == pytest.approx(abs(drawn[0] - drawn[1]) / 2)
    assert (effect.random_success_mean, effect.random_success_deviation) == (0, 0)


def test_an_edit_that_changes_nothing_changes_nothing(stub: HeadServiceStub) -> None:
    effect = result(stub.EvaluateHeadEdit(edit("scale", scale=1.0)))
    assert effect.edited.perplexity == pytest.approx(effect.unedited.perplexity, rel=1e-5)


def test_the_best_heads_of_a_stored_set_are_edited(stub: HeadServiceStub, store: ArtifactStore) -> None:
    def edited(**fields: Any) -> list[tuple[int, int]]:
        effect = result(stub.EvaluateHeadEdit(edit(heads=pb.HeadSelection(head_set="known", **fields))))
        return [pair_of(head) for head in effect.edited.heads]

    # Those with at least the threshold of the set, 0.5, then as many as are asked for.
    assert edited() == [(1, 3), (0, 1)]
    assert edited(top_k=3) == [(1, 3), (0, 1), (1, 0)]


# Circuits.


@pytest.mark.parametrize("method", ["mean_ablation", "activation_patching", "path_patching"])
def test_a_circuit_is_a_head_set_that_the_next_call_can_edit(
    stub: HeadServiceStub, store: ArtifactStore, pairs: list[pb.CleanCorruptPair], method: str
) -> None:
    *progress, last = stub.FindCircuit(circuit(pairs, method, tags=[method], description="cats"))
    ends = {stage: (done, total) for stage, done, total in steps(progress)}
    assert ends == {"prompts": (4, 4), "effects": (16, 16), "faithfulness": (2, 2)}
    found = last.result
    sizes = [abs(effect.score) for effect in found.effects]
    assert (len(sizes), sizes) == (LAYERS * HEADS, sorted(sizes, reverse=True))
    assert all(effect.low <= effect.score <= effect.high for effect in found.effects)
    assert found.clean_metric > found.corrupt_metric
    assert found.artifact.tags == [method]
    evidence = MessageToDict(found.artifact.evidence)
    assert evidence["faithfulness"] == pytest.approx(found.faithfulness)
    assert found.random_faithfulness_mean == pytest.approx(sum(evidence["random_faithfulness"]) / 3)
    effect = result(stub.EvaluateHeadEdit(edit("mean", heads=pb.HeadSelection(head_set=method), random_sets=1)))
    assert [pair_of(head) for head in effect.edited.heads] == [pair_of(effect.head) for effect in found.effects[:2]]


def test_equal_searches_at_once_take_turns_and_find_the_same(
    stub: HeadServiceStub, pairs: list[pb.CleanCorruptPair]
) -> None:
    calls = [stub.FindCircuit(circuit(pairs, seed=4)) for _ in range(4)]
    found = [result(call) for call in calls]
    assert all(each == found[0] for each in found)


# Comparison and attribution.


def test_every_pair_of_head_sets_is_compared(stub: HeadServiceStub, store: ArtifactStore) -> None:
    result(stub.ScoreHeads(scoring("induction", **SEQUENCES, tags=["induced"])))
    found = stub.CompareHeadSets(comparison("known", "induced", "foreign", top_k=3)).comparisons
    assert [(c.first, c.second) for c in found] == [(0, 1), (0, 2), (1, 2)]
    same = found[1]
    assert (same.jaccard, same.overlap_coefficient, same.common) == (1.0, 1.0, 3)
    assert same.rank_correlation == pytest.approx(1.0)
    assert same.expected_common == 3 * 3 / 8
    known, foreign = found[0], found[2]
    assert (known.common, known.rank_correlation) == (foreign.common, pytest.approx(foreign.rank_correlation))


def test_without_a_number_heads_above_the_threshold_are_compared(stub: HeadServiceStub, store: ArtifactStore) -> None:
    # Two heads above 0.5, three above 0.1, which is the threshold of a set that states none.
    [found] = stub.CompareHeadSets(comparison("known", "foreign")).comparisons
    assert (found.common, found.jaccard, found.overlap_coefficient) == (2, pytest.approx(2 / 3), 1.0)


def test_parts_of_a_logit_difference_sum_to_it(stub: HeadServiceStub) -> None:
    found = stub.AttributeLogits(attribution(contrast="b", top_heads=3))
    parts = found.embedding + sum(found.mlps) + found.biases + sum(head.part for head in found.heads)
    assert parts == pytest.approx(found.parts_sum, abs=1e-9)
    assert found.parts_sum == pytest.approx(found.logit_difference, abs=1e-4)
    assert (len(found.mlps), len(found.heads)) == (LAYERS, LAYERS * HEADS)
    assert [len(head.sources) for head in found.heads] == [5] * 3 + [0] * 5
    assert all(sum(head.sources) == pytest.approx(head.part, abs=1e-9) for head in found.heads[:3])


def test_without_a_contrast_the_logit_itself_is_attributed(stub: HeadServiceStub, server: LiveServer) -> None:
    tokenizer, decoder = server.model.tokenizer, server.model.decoder
    logits = decoder.logits(run(decoder, tuple(tokenizer.encode("hello"))).end[None])[0]
    found = stub.AttributeLogits(attribution(target="a rest that is ignored"))
    assert found.logit_difference == pytest.approx(float(logits[tokenizer.encode("a")[-1]]), abs=1e-5)


# Detection.


def test_a_model_that_finds_no_needle_has_no_retrieval_heads(stub: HeadServiceStub) -> None:
    call = stub.DetectRetrievalHeads(detection())
    events = [next(call) for _ in range(4)]
    assert [e.WhichOneof("event") for e in events] == ["run", "progress"] * 2
    assert sorted((e.run.needle, e.run.length, e.run.depth) for e in events[::2]) == [(0, 150, 0.5), (0, 180, 0.5)]
    assert steps(events[1::2]) == [("needles", 1, 2), ("needles", 2, 2)]
    refused = refusal(lambda: call)
    assert (refused.code, field_of(refused)) == (grpc.StatusCode.FAILED_PRECONDITION, "test")


@pytest.fixture(scope="module")
def embedded_channel(embedded_server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(embedded_server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def detected(embedded_channel: grpc.Channel) -> list[pb.DetectRetrievalHeadsResponse]:
    """Three runs, stored as "retrieval"."""
    test = pb.NeedleTest(lengths=[100], depths=[0.2, 0.8], max_runs=3, seed=5)
    request = pb.DetectRetrievalHeadsRequest(test=test, tags=["retrieval"], replace_tags=True)
    return list(HeadServiceStub(embedded_channel).DetectRetrievalHeads(request))


def test_retrieval_heads_of_a_real_model_come_after_their_runs(
    detected: list[pb.DetectRetrievalHeadsResponse], embedded_server: LiveServer
) -> None:
    info = embedded_server.model.info
    *events, last = detected
    assert [e.WhichOneof("event") for e in events] == ["run", "progress"] * 3
    found = last.result
    assert found.successes == sum(e.run.success for e in events[::2]) >= 2
    assert (found.runs, found.threshold, found.stopped_early) == (3, pytest.approx(0.1), False)
    assert len({pair_of(s.head) for s in found.scores}) == len(found.scores) == info.n_layers * info.n_heads
    assert found.scores[0].score > 0.3
    assert all(s.low <= s.score <= s.high for s in found.scores)
    above = sum(s.score >= found.threshold for s in found.scores)
    assert found.fraction_above_threshold == pytest.approx(above / len(found.scores))
    always = [s.score for s in found.scores if s.always_on]
    assert always
    assert min(always) > 0
    assert found.artifact.tags == ["retrieval"]


def test_detected_heads_can_be_compared_at_once(
    detected: list[pb.DetectRetrievalHeadsResponse], embedded_channel: grpc.Channel
) -> None:
    stub = HeadServiceStub(embedded_channel)
    induction = result(stub.ScoreHeads(scoring("induction", sequence_tokens=8, sequences=1)))
    found = stub.CompareHeadSets(comparison("retrieval", induction.artifact.id, "retrieval", top_k=10)).comparisons
    assert [(c.first, c.second, c.common) for c in found][1] == (0, 2, 10)
    assert found[0].common < 10
    assert found[0].rank_correlation < found[1].rank_correlation


def test_detected_heads_ground_an_answer_at_once(
    detected: list[pb.DetectRetrievalHeadsResponse], embedded_channel: grpc.Channel, embedded_server: LiveServer
) -> None:
    best = {pair_of(s.head) for s in detected[-1].result.scores[:5]}
    content = "Repeat the sentence: The secret ingredient of the soup is smoked paprika."
    chat = generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content=content)])
    grounding = generation_pb2.Grounding(head_set="retrieval", top_k=5)
    tokens, finished = generate(embedded_channel, generation_pb2.Prompt(chat=chat), 16, grounding=grounding)
    sources = [source for token in tokens for source in token.sources]
    assert {(source.layer, source.head) for source in sources} <= best
    assert finished.grounding.grounded_tokens == sum(bool(token.sources) for token in tokens)
    assert finished.grounding.grounded_ratio > 0.4
    assert "paprika" in "".join(r.text for r in finished.grounding.ranges)


# What is refused.

WRONG = grpc.StatusCode.INVALID_ARGUMENT
UNKNOWN = grpc.StatusCode.NOT_FOUND
UNFIT = grpc.StatusCode.FAILED_PRECONDITION
NAN, INF = float("nan"), float("inf")
LONG = text_prompt("x" * (CONTEXT + 1))

REFUSED: dict[str, tuple[str, Any, grpc.StatusCode, str]] = {
    # Detection
    "detection by another model": ("DetectRetrievalHeads", detection(model="gpt-17"), UNKNOWN, "model"),
    "threshold of zero": ("DetectRetrievalHeads", detection(threshold=0), WRONG, "threshold"),
    "threshold above one": ("DetectRetrievalHeads", detection(threshold=1.5), WRONG, "threshold"),
    "threshold that is no number": ("DetectRetrievalHeads", detection(threshold=NAN), WRONG, "threshold"),
    "tag that is no name": ("DetectRetrievalHeads", detection(tags=["fine", "../up"]), WRONG, "tags[1]"),
    "long description": ("DetectRetrievalHeads", detection(description="x" * 10_001), WRONG, "description"),
    "stopping by more heads than there are": (
        "DetectRetrievalHeads",
        detection(stopping=pb.StoppingRule(top_k=9)),
        WRONG,
        "stopping.top_k",
    ),
    "stopping at no agreement": (
        "DetectRetrievalHeads",
        detection(stopping=pb.StoppingRule(top_k=1, agreement=0)),
        WRONG,
        "stopping.agreement",
    ),
    "empty haystack": ("DetectRetrievalHeads", detection_of(haystacks=["Hay.", " "]), WRONG, "test.haystacks[1]"),
    "too many haystacks": ("DetectRetrievalHeads", detection_of(haystacks=["Hay."] * 65), WRONG, "test.haystacks"),
    "needle in the haystack": (
        "DetectRetrievalHeads",
        detection_of(haystacks=[f"Hay. {NEEDLE.needle}"]),
        WRONG,
        "test.haystacks[0]",
    ),
    "empty question": (
        "DetectRetrievalHeads",
        detection_of(needles=[NEEDLE, pb.Needle(needle="a b", answer="b")]),
        WRONG,
        "test.needles[1].question",
    ),
    "answer that is not in the needle": (
        "DetectRetrievalHeads",
        detection_of(needles=[pb.Needle(question="Who?", needle="Ann did.", answer="Bob")]),
        WRONG,
        "test.needles[0].answer",
    ),
    "too many needles": ("DetectRetrievalHeads", detection_of(needles=[NEEDLE] * 1025), WRONG, "test.needles"),
    "length of zero": ("DetectRetrievalHeads", detection_of(lengths=[150, 0]), WRONG, "test.lengths[1]"),
    "length beyond the context": (
        "DetectRetrievalHeads",
        detection_of(lengths=[CONTEXT + 1]),
        WRONG,
        "test.lengths[0]",
    ),
    "length without room for the answer": (
        "DetectRetrievalHeads",
        detection_of(lengths=[CONTEXT]),
        WRONG,
        "test.lengths",
    ),
    "length without room for text": ("DetectRetrievalHeads", detection_of(lengths=[60]), WRONG, "test.lengths"),
    "length given twice": ("DetectRetrievalHeads", detection_of(lengths=[150, 160, 150]), WRONG, "test.lengths[2]"),
    "default lengths beyond the context": ("DetectRetrievalHeads", detection_of(lengths=[]), WRONG, "test.lengths"),
    "depth above one": ("DetectRetrievalHeads", detection_of(depths=[0.5, 1.1]), WRONG, "test.depths[1]"),
    "depth that is no number": ("DetectRetrievalHeads", detection_of(depths=[NAN]), WRONG, "test.depths[0]"),
    "depth given twice": ("DetectRetrievalHeads", detection_of(depths=[0.5, 0.5]), WRONG, "test.depths[1]"),
    "more combinations than are drawn from": (
        "DetectRetrievalHeads",
        detection_of(needles=[NEEDLE] * 1000, depths=[i / 100 for i in range(100)]),
        WRONG,
        "test",
    ),
    "more runs than are made": (
        "DetectRetrievalHeads",
        detection_of(needles=[NEEDLE] * 1000, lengths=[150, 151, 152, 153, 154], max_runs=5000),
        WRONG,
        "test.max_runs",
    ),
    # Scores
    "scores by another model": ("ScoreHeads", scoring("induction", model="gpt-17"), UNKNOWN, "model"),
    "no method": ("ScoreHeads", pb.ScoreHeadsRequest(), WRONG, "method"),
    "unknown method": ("ScoreHeads", pb.ScoreHeadsRequest(method=99), WRONG, "method"),
    "sequences beyond the context": ("ScoreHeads", scoring("induction", sequence_tokens=129), WRONG, "sequence_tokens"),
    "sequence of one token": ("ScoreHeads", scoring("induction", sequence_tokens=1), WRONG, "sequence_tokens"),
    "negative number of sequences": ("ScoreHeads", scoring("induction", sequences=2**32 - 1), WRONG, "sequences"),
    "run longer than a sequence": ("ScoreHeads", scoring("ngram", sequence_tokens=8, ngram=9), WRONG, "ngram"),
    "huge ngram": ("ScoreHeads", scoring("ngram", ngram=2**32 - 1), WRONG, "ngram"),
    "parameter of another method": ("ScoreHeads", scoring("induction", ngram=2), WRONG, "ngram"),
    "tag of scores that is no name": ("ScoreHeads", scoring("successor", tags=[""]), WRONG, "tags[0]"),
    "fact without a prompt": ("ScoreHeads", facts(pb.TemporalFact(answer="x")), WRONG, "facts[4].prompt"),
    "fact without an answer": ("ScoreHeads", facts(pb.TemporalFact(prompt="x")), WRONG, "facts[4].answer"),
    "fact beyond the context": (
        "ScoreHeads",
        facts(pb.TemporalFact(prompt="x" * 200, answer="y" * 57)),
        WRONG,
        "facts[4]",
    ),
    "prompt of a fact beyond the context": (
        "ScoreHeads",
        facts(pb.TemporalFact(prompt="x" * 257, answer="y")),
        WRONG,
        "facts[4].prompt",
    ),
    "facts of one kind": (
        "ScoreHeads",
        scoring("temporal", facts=[pb.TemporalFact(prompt="x", answer="y")] * 4),
        WRONG,
        "facts",
    ),
    # Edits
    "edit of another model": ("EvaluateHeadEdit", edit(model="gpt-17"), UNKNOWN, "model"),
    "no heads": ("EvaluateHeadEdit", edit(heads=None), WRONG, "heads"),
    "heads without a source": ("EvaluateHeadEdit", edit(heads=pb.HeadSelection(top_k=1)), WRONG, "heads.source"),
    "empty list of heads": ("EvaluateHeadEdit", edit(heads=listed()), WRONG, "heads.heads.heads"),
    "unknown layer": ("EvaluateHeadEdit", edit(heads=listed((0, 0), (2, 0))), WRONG, "heads.heads.heads[1].layer"),
    "unknown head": ("EvaluateHeadEdit", edit(heads=listed((0, 4))), WRONG, "heads.heads.heads[0].head"),
    "head given twice": ("EvaluateHeadEdit", edit(heads=listed((0, 1), (0, 1))), WRONG, "heads.heads.heads[1]"),
    "best of listed heads": (
        "EvaluateHeadEdit",
        edit(heads=pb.HeadSelection(heads=listed((0, 1)).heads, top_k=1)),
        WRONG,
        "heads.top_k",
    ),
    "head set without a name": ("EvaluateHeadEdit", edit(heads=pb.HeadSelection(head_set="")), WRONG, "heads.head_set"),
    "unknown head set": ("EvaluateHeadEdit", edit(heads=pb.HeadSelection(head_set="no")), UNKNOWN, "heads.head_set"),
    "vector as a head set": (
        "EvaluateHeadEdit",
        edit(heads=pb.HeadSelection(head_set="vector")),
        WRONG,
        "heads.head_set",
    ),
    "head set of another model": (
        "EvaluateHeadEdit",
        edit(heads=pb.HeadSelection(head_set="foreign")),
        UNFIT,
        "heads.head_set",
    ),
    "head set of another shape": (
        "EvaluateHeadEdit",
        edit(heads=pb.HeadSelection(head_set="wide")),
        UNFIT,
        "heads.head_set",
    ),
    "head set that no head is in": (
        "EvaluateHeadEdit",
        edit(heads=pb.HeadSelection(head_set="unreached")),
        UNFIT,
        "heads.head_set",
    ),
    "more of the best than there are": (
        "EvaluateHeadEdit",
        edit(heads=pb.HeadSelection(head_set="known", top_k=9)),
        WRONG,
        "heads.top_k",
    ),
    "too many heads for random sets": (
        "EvaluateHeadEdit",
        edit(heads=pb.HeadSelection(head_set="known", top_k=5)),
        WRONG,
        "heads",
    ),
    "no mode": ("EvaluateHeadEdit", edit("unspecified"), WRONG, "mode"),
    "unknown mode": ("EvaluateHeadEdit", pb.EvaluateHeadEditRequest(heads=listed((0, 1)), mode=9), WRONG, "mode"),
    "scale that is no number": ("EvaluateHeadEdit", edit("scale", scale=NAN), WRONG, "scale"),
    "infinite scale": ("EvaluateHeadEdit", edit("scale", scale=INF), WRONG, "scale"),
    "scale of another mode": ("EvaluateHeadEdit", edit("mean", scale=1), WRONG, "scale"),
    "too many random sets": ("EvaluateHeadEdit", edit(random_sets=101), WRONG, "random_sets"),
    "text of one token": ("EvaluateHeadEdit", edit(texts=[*TEXTS, ""]), WRONG, "texts[1]"),
    "more text than is scored": ("EvaluateHeadEdit", edit(texts=["x" * 256 * 257]), WRONG, "texts"),
    "test of an edit beyond the context": (
        "EvaluateHeadEdit",
        edit(test=pb.NeedleTest(lengths=[999])),
        WRONG,
        "test.lengths[0]",
    ),
    # Circuits
    "circuit of another model": ("FindCircuit", circuit([], model="gpt-17"), UNKNOWN, "model"),
    "no circuit method": ("FindCircuit", pb.FindCircuitRequest(), WRONG, "method"),
    "no pairs": ("FindCircuit", circuit([]), WRONG, "pairs"),
    "too many pairs": ("FindCircuit", circuit([pb.CleanCorruptPair()] * 1025), WRONG, "pairs"),
    "pair without a clean prompt": ("FindCircuit", cat(clean=None), WRONG, "pairs[0].clean.form"),
    "pair with an empty prompt": ("FindCircuit", cat(corrupt=text_prompt("")), WRONG, "pairs[0].corrupt.text"),
    "prompt of a pair beyond the context": ("FindCircuit", cat(clean=LONG), WRONG, "pairs[0].clean.text"),
    "prompts of unequal length": ("FindCircuit", cat(corrupt=text_prompt("rats")), WRONG, "pairs[0].corrupt"),
    "pair without an answer": ("FindCircuit", cat(clean_answer=""), WRONG, "pairs[0].clean_answer"),
    "answers that begin alike": ("FindCircuit", cat(corrupt_answer="cx"), WRONG, "pairs[0].corrupt_answer"),
    "prompts that are one": ("FindCircuit", cat(corrupt=text_prompt("cat")), WRONG, "pairs[0]"),
    "circuit of more heads than there are": (
        "FindCircuit",
        circuit([pb.CleanCorruptPair()], circuit_size=9),
        WRONG,
        "circuit_size",
    ),
    "too many random circuits": (
        "FindCircuit",
        circuit([pb.CleanCorruptPair()], random_sets=101),
        WRONG,
        "random_sets",
    ),
    "tag of a circuit that is no name": (
        "FindCircuit",
        circuit([pb.CleanCorruptPair()], tags=["a b"]),
        WRONG,
        "tags[0]",
    ),
    # Comparison
    "one head set": ("CompareHeadSets", comparison("known"), WRONG, "head_sets"),
    "too many head sets": ("CompareHeadSets", comparison(*["known"] * 65), WRONG, "head_sets"),
    "unknown head set to compare": ("CompareHeadSets", comparison("known", "no"), UNKNOWN, "head_sets[1]"),
    "head set to compare without a name": ("CompareHeadSets", comparison("known", ""), WRONG, "head_sets[1]"),
    "vector to compare": ("CompareHeadSets", comparison("vector", "known"), WRONG, "head_sets[0]"),
    "head sets of two shapes": ("CompareHeadSets", comparison("known", "wide"), WRONG, "head_sets[1]"),
    "head set without heads to compare": ("CompareHeadSets", comparison("known", "unreached"), UNFIT, "head_sets[1]"),
    "comparison of more heads than there are": (
        "CompareHeadSets",
        comparison("known", "foreign", top_k=9),
        WRONG,
        "top_k",
    ),
    # Attribution
    "attribution by another model": ("AttributeLogits", attribution(model="gpt-17"), UNKNOWN, "model"),
    "no prompt": ("AttributeLogits", attribution(prompt=None), WRONG, "prompt.form"),
    "prompt beyond the context": ("AttributeLogits", attribution(prompt=LONG), WRONG, "prompt.text"),
    "no target": ("AttributeLogits", attribution(target=""), WRONG, "target"),
    "contrast that begins as the target does": ("AttributeLogits", attribution(contrast="ab"), WRONG, "contrast"),
}


@pytest.mark.parametrize(("method", "request_", "code", "field"), REFUSED.values(), ids=REFUSED.keys())
def test_is_refused_by_field(
    stub: HeadServiceStub, store: ArtifactStore, method: str, request_: Any, code: grpc.StatusCode, field: str
) -> None:
    refused = refusal(lambda: getattr(stub, method)(request_))
    assert (refused.code, field_of(refused)) == (code, field)
    assert refused.message.startswith(f"{field}: ")


def test_refusals_all_at_once_leave_a_server_that_answers(
    stub: HeadServiceStub, channel: grpc.Channel, server: LiveServer, store: ArtifactStore
) -> None:
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda row: refusal(lambda: getattr(stub, row[0])(row[1])).code, REFUSED.values()))
    assert codes == [code for _, _, code, _ in REFUSED.values()]
    tokens, _ = generate(channel, text_prompt("hello"), 4)
    assert len(tokens) == 4
    assert is_idle(server)


TOO_SMALL: dict[str, tuple[str, Any, str]] = {
    "needles": ("DetectRetrievalHeads", detection(), "test.lengths"),
    "edited needles": ("EvaluateHeadEdit", edit(), "test.lengths"),
    "facts": ("ScoreHeads", facts(pb.TemporalFact(prompt="x" * 100, answer="y")), "facts"),
}


@pytest.mark.parametrize(("method", "request_", "field"), TOO_SMALL.values(), ids=TOO_SMALL.keys())
def test_what_the_cache_has_no_room_for_is_refused_by_the_field_it_is_made_of(
    server: LiveServer, tmp_path: Path, method: str, request_: Any, field: str
) -> None:
    engine = EngineConfig(kv_cache_tokens=64)
    with LiveServer(server.model, tmp_path, engine=engine) as small, grpc.insecure_channel(small.address) as channel:
        refused = refusal(lambda: getattr(HeadServiceStub(channel), method)(request_))
    assert (refused.code, field_of(refused)) == (WRONG, field)


def test_a_scale_that_no_activation_survives_is_refused(stub: HeadServiceStub) -> None:
    refused = refusal(lambda: stub.EvaluateHeadEdit(edit("scale", scale=1e300)))
    assert (refused.code, field_of(refused)) == (WRONG, "scale")


# Calls that end early.


def in_flight(server: LiveServer, method: str) -> float:
    labels = f'method="{method}",service="patchclamp.v1.HeadService"'
    return server.metric(f"patchclamp_requests_in_flight{{{labels}}}")


def is_idle(server: LiveServer) -> bool:
    stats = server.server.engine.stats()
    while stats.running or stats.waiting:
        stats = server.server.engine.stats()
    return stats.kv_blocks_free == stats.kv_blocks_total


LONG_TEST = pb.NeedleTest(
    haystacks=TEST.haystacks, needles=[NEEDLE], lengths=[150, 160, 170, 180], depths=[i / 100 for i in range(100)]
)
LONG_FACTS = [
    pb.TemporalFact(prompt=f"In 19{i} it" + " was" * 30, answer=" so", time_conditioned=i % 2 == 0) for i in range(240)
]
LONG_JOBS: dict[str, tuple[str, Any]] = {
    "detection": ("DetectRetrievalHeads", detection(test=LONG_TEST)),
    "edits": ("EvaluateHeadEdit", edit(test=LONG_TEST, random_sets=10)),
    "temporal facts": ("ScoreHeads", scoring("temporal", facts=LONG_FACTS)),
}


@pytest.mark.parametrize(("method", "request_"), LONG_JOBS.values(), ids=LONG_JOBS.keys())
def test_cancelling_a_call_cancels_every_request_it_has_in_the_engine(
    stub: HeadServiceStub, server: LiveServer, method: str, request_: Any
) -> None:
    cancelled = 'patchclamp_sequences_finished_total{outcome="cancelled"}'
    before = server.metric(cancelled)
    call = getattr(stub, method)(request_)
    next(call)
    assert in_flight(server, method) == 1
    call.cancel()
    while in_flight(server, method):
        pass
    assert is_idle(server)
    assert server.metric(cancelled) > before


THREADED: dict[str, Callable[[list[pb.CleanCorruptPair]], tuple[str, Any]]] = {
    "circuit": lambda pairs: ("FindCircuit", circuit(pairs * 50, "mean_ablation", tags=["never"])),
    "scores": lambda pairs: ("ScoreHeads", scoring("induction", sequences=200, sequence_tokens=16, tags=["never"])),
}


@pytest.mark.parametrize("job", THREADED.values(), ids=THREADED.keys())
def test_a_job_that_computes_is_over_before_the_next_one_begins(
    stub: HeadServiceStub, store: ArtifactStore, pairs: list[pb.CleanCorruptPair], job: Any
) -> None:
    method, request_ = job(pairs)
    request_.tags[:] = [f"done-{method}"]
    call = getattr(stub, method)(request_)
    next(call)
    assert stub.AttributeLogits(attribution()).heads
    assert stub.CompareHeadSets(comparison("known", f"done-{method}", top_k=1)).comparisons
    assert result(call).artifact.tags == request_.tags


@pytest.mark.parametrize("job", THREADED.values(), ids=THREADED.keys())
def test_cancelling_a_call_ends_its_thread_and_then_it_is_the_turn_of_the_next(
    stub: HeadServiceStub, store: ArtifactStore, pairs: list[pb.CleanCorruptPair], job: Any
) -> None:
    method, request_ = job(pairs)
    call = getattr(stub, method)(request_)
    progress = next(call).progress
    assert (progress.done, progress.total >= 200) == (1, True)
    waiting = stub.AttributeLogits.future(attribution())
    call.cancel()
    assert waiting.result().heads
    assert refusal(lambda: stub.CompareHeadSets(comparison("known", "never"))).code is UNKNOWN


def test_a_job_that_is_cancelled_before_its_turn_never_runs(
    stub: HeadServiceStub, store: ArtifactStore, server: LiveServer, pairs: list[pb.CleanCorruptPair]
) -> None:
    first = stub.FindCircuit(circuit(pairs * 200, "mean_ablation"))
    next(first)
    second = stub.ScoreHeads(scoring("induction", **SEQUENCES, tags=["too-late"]))
    while not in_flight(server, "ScoreHeads"):
        pass
    second.cancel()
    while in_flight(server, "ScoreHeads"):
        pass
    first.cancel()
    assert stub.AttributeLogits(attribution()).heads
    assert refusal(lambda: stub.CompareHeadSets(comparison("known", "too-late"))).code is UNKNOWN


def test_a_job_that_waits_for_the_engine_alone_passes_one_that_computes(
    stub: HeadServiceStub, server: LiveServer, pairs: list[pb.CleanCorruptPair]
) -> None:
    computing = stub.FindCircuit(circuit(pairs * 500, "mean_ablation"))
    next(computing)
    assert result(stub.EvaluateHeadEdit(edit())).edited.runs == 2
    assert result(stub.ScoreHeads(facts())).scores
    assert in_flight(server, "FindCircuit") == 1
    computing.cancel()
