"""Attention heads: what the clients send to HeadService, and what they make of the answers."""

from collections.abc import Callable
from typing import Any

import pytest
from canned import HEAD_SET, Generations, Heads

from patchclamp import AsyncClient, Client
from patchclamp.heads import (
    CleanCorruptPair,
    Grounding,
    Head,
    Needle,
    NeedleTest,
    StoppingRule,
    TemporalFact,
    selection_message,
)
from patchclamp.names import CIRCUIT_METHODS, HEAD_EDIT_MODES, HEAD_SCORE_METHODS
from patchclamp.requests import download, upload
from patchclamp.results import HeadScore, NeedleGrid, NeedleRun, Progress, score_matrix
from patchclamp.v1 import artifact_pb2, generation_pb2
from patchclamp.v1 import head_pb2 as pb

Serve = Callable[..., str]
PAIR = CleanCorruptPair("When Mary and John", "When Mary and Mary", " Mary", " John")


def test_heads_are_listed_or_the_best_of_a_set() -> None:
    listed = selection_message([(18, 6), Head(17, 3)])
    assert [(each.layer, each.head) for each in listed.heads.heads] == [(18, 6), (17, 3)]
    assert selection_message("retrieval", 3) == pb.HeadSelection(head_set="retrieval", top_k=3)


@pytest.mark.parametrize(("heads", "top_k"), [([(1, 2)], 3), ([], 0)])
def test_a_contradiction_in_a_selection_is_refused(heads: Any, top_k: int) -> None:
    with pytest.raises(ValueError, match="head"):
        selection_message(heads, top_k)


def test_a_head_is_written_as_people_write_it() -> None:
    assert str(Head(18, 6)) == "L18H6"


def test_detection_sends_the_test_and_returns_scores_and_runs(serve: Serve) -> None:
    server = Heads()
    events: list[object] = []
    test = NeedleTest(["text"], [Needle("where?", "It is here.", "here")], [256], [0.0, 0.5], seed=7, max_runs=9)
    with Client(serve(heads=server)) as client:
        result = client.detect_retrieval_heads(
            test, threshold=0.0, stopping=StoppingRule(top_k=5, agreement=0.5), description="mine", tags=["retrieval"]
        ).result(events.append)
    needle = pb.Needle(question="where?", needle="It is here.", answer="here")
    assert server.request == pb.DetectRetrievalHeadsRequest(
        test=pb.NeedleTest(haystacks=["text"], needles=[needle], lengths=[256], depths=[0, 0.5], seed=7, max_runs=9),
        threshold=0.0,
        stopping=pb.StoppingRule(top_k=5, agreement=0.5),
        description="mine",
        tags=["retrieval"],
    )
    assert [type(event) for event in events[:2]] == [Progress, NeedleRun]
    assert result.scores[0] == HeadScore(Head(1, 2), 0.75, 0.625, 0.875, True)
    assert result.artifact.kind == "head_set"
    assert [(run.length, run.success) for run in result.runs] == [(256, True), (256, False), (512, True)]
    assert (result.successes, result.stopped_early, result.stability) == (2, True, 0.9)


def test_a_detection_without_arguments_leaves_everything_to_the_server(serve: Serve) -> None:
    server = Heads()
    with Client(serve(heads=server)) as client:
        client.detect_retrieval_heads().result()
    assert server.request == pb.DetectRetrievalHeadsRequest()


def test_a_stopping_rule_of_defaults_is_still_sent(serve: Serve) -> None:
    server = Heads()
    with Client(serve(heads=server)) as client:
        client.detect_retrieval_heads(stopping=StoppingRule()).result()
    assert server.request.HasField("stopping")


def test_scores_are_a_matrix_of_layers_and_heads(serve: Serve) -> None:
    with Client(serve(heads=Heads())) as client:
        result = client.score_heads("induction").result()
    assert score_matrix(result.scores) == ((0.0, 0.25, 0.0), (0.0, 0.0, 0.75))


def test_a_score_of_one_measurement_has_no_interval() -> None:
    score = HeadScore.from_proto(pb.HeadScore(head=pb.HeadId(layer=1), score=0.5))
    assert (score.low, score.high) == (None, None)
    assert HeadScore.from_proto(pb.HeadScore(low=0.0, high=0.0)).low == 0.0


@pytest.mark.parametrize("heads", [[], [Head(0, 0), Head(1, 1)]])
def test_scores_of_some_heads_only_are_no_matrix(heads: list[Head]) -> None:
    with pytest.raises(ValueError, match="one for each"):
        score_matrix(HeadScore(head, 1.0) for head in heads)


def test_a_needle_grid_counts_successes_by_depth_and_length() -> None:
    def run(length: int, depth: float, success: bool) -> NeedleRun:
        return NeedleRun(0, length, depth, 0.5, success, "")

    grid = NeedleGrid.of([run(512, 0.9, True), run(256, 0.1, True), run(256, 0.1, False), run(256, 0.9, False)])
    assert (grid.lengths, grid.depths) == ((256, 512), (0.1, 0.9))
    assert grid.cells == (((1, 2), None), ((0, 1), (1, 1)))


def test_a_score_sends_its_method_and_settings(serve: Serve) -> None:
    server = Heads()
    fact = TemporalFact("In 1999 the president was", " Clinton", True)
    with Client(serve(heads=server)) as client:
        client.score_heads(
            "temporal", ngram=3, sequence_tokens=32, sequences=2, seed=5, facts=[fact], tags=["t"]
        ).result()
    assert server.request == pb.ScoreHeadsRequest(
        method=pb.HEAD_SCORE_METHOD_TEMPORAL,
        ngram=3,
        sequence_tokens=32,
        sequences=2,
        seed=5,
        facts=[pb.TemporalFact(prompt="In 1999 the president was", answer=" Clinton", time_conditioned=True)],
        tags=["t"],
    )


def test_every_word_of_the_contract_has_a_name() -> None:
    assert list(HEAD_SCORE_METHODS) == [
        "induction",
        "previous_token",
        "ngram",
        "successor",
        "ov_nuclear_norm",
        "temporal",
    ]
    assert list(HEAD_EDIT_MODES) == ["zero", "mean", "uniform", "scale"]
    assert list(CIRCUIT_METHODS) == ["mean_ablation", "activation_patching", "path_patching"]


def test_an_edit_of_heads_is_measured_beside_random_heads(serve: Serve) -> None:
    server = Heads()
    with Client(serve(heads=server)) as client:
        effect = client.evaluate_head_edit(
            "retrieval", "uniform", top_k=3, random_sets=2, seed=1, test=NeedleTest(max_runs=12), texts="a text"
        ).result()
    assert server.request == pb.EvaluateHeadEditRequest(
        heads=pb.HeadSelection(head_set="retrieval", top_k=3),
        mode=pb.HEAD_EDIT_MODE_UNIFORM,
        random_sets=2,
        seed=1,
        test=pb.NeedleTest(max_runs=12),
        texts=["a text"],
    )
    assert (effect.unedited.successes, effect.edited.successes, effect.random_success_mean) == (7, 0, 7.0)
    assert effect.edited.heads == (Head(1, 2),)
    assert [each.perplexity for each in effect.random] == [26.5, 26.25]


def test_a_scale_is_sent_with_its_mode(serve: Serve) -> None:
    server = Heads()
    with Client(serve(heads=server)) as client:
        client.evaluate_head_edit([(1, 2)], "scale", scale=0.5).result()
    assert (server.request.mode, server.request.scale) == (pb.HEAD_EDIT_MODE_SCALE, 0.5)


@pytest.mark.parametrize(("mode", "options"), [("scale", {}), ("zero", {"scale": 0.5})])
def test_a_scale_comes_with_its_mode_alone(mode: Any, options: Any) -> None:
    with Client() as client, pytest.raises(ValueError, match='"scale"'):
        client.evaluate_head_edit([(1, 2)], mode, **options)


def test_a_circuit_is_found_on_pairs_of_prompts(serve: Serve) -> None:
    server = Heads()
    with Client(serve(heads=server)) as client:
        circuit = client.find_circuit(
            [PAIR], "path_patching", circuit_size=5, random_sets=3, seed=2, tags=["ioi"]
        ).result()
    [pair] = server.request.pairs
    assert (pair.clean.text, pair.corrupt.text) == ("When Mary and John", "When Mary and Mary")
    assert (pair.clean_answer, pair.corrupt_answer) == (" Mary", " John")
    assert server.request.method == pb.CIRCUIT_METHOD_PATH_PATCHING
    assert (server.request.circuit_size, server.request.random_sets, server.request.seed) == (5, 3, 2)
    assert circuit.effects[0] == HeadScore(Head(0, 1), -0.5, -0.625, -0.375, False)
    assert (circuit.clean_metric, circuit.corrupt_metric) == (3.5, -3.25)
    assert (circuit.faithfulness, circuit.random_faithfulness_mean) == (0.875, 0.125)


def test_head_sets_are_compared_by_stated_definitions(serve: Serve) -> None:
    server = Heads()
    with Client(serve(heads=server)) as client:
        [found] = client.compare_head_sets(["one", "two"], top_k=4)
    assert server.request == pb.CompareHeadSetsRequest(head_sets=["one", "two"], top_k=4)
    assert (found.common, found.expected_common, found.jaccard) == (3, 0.25, 0.5)
    assert (found.overlap_coefficient, found.rank_correlation) == (0.75, 0.95)


def test_one_head_set_is_nothing_to_compare() -> None:
    with Client() as client, pytest.raises(TypeError, match="head_sets: expected several"):
        client.compare_head_sets("one")


def test_parts_of_a_logit_difference_are_by_head_and_source(serve: Serve) -> None:
    server = Heads()
    with Client(serve(heads=server)) as client:
        found = client.attribute_logits("The cat", " sat", contrast=" ran", top_heads=0)
    assert server.request.HasField("top_heads")
    assert (server.request.prompt.text, server.request.target, server.request.contrast) == ("The cat", " sat", " ran")
    assert found.embedding + sum(found.mlps) + found.biases + sum(h.part for h in found.heads) == found.parts_sum
    assert next(each for each in found.heads if each.head == Head(1, 2)).sources == (0.25, 1.75)


def test_grounding_is_asked_for_by_head_set(serve: Serve) -> None:
    server = Generations()
    with Client(serve(generation=server)) as client:
        result = client.generate("hi", grounding=Grounding("retrieval", top_k=10)).result()
        assert server.request.grounding == generation_pb2.Grounding(head_set="retrieval", top_k=10)
        client.generate("hi", grounding="retrieval").result()
    assert server.request.grounding == generation_pb2.Grounding(head_set="retrieval")
    first, second = result.tokens
    [source] = first.sources
    assert (source.position, source.layer, source.head, source.probability) == (4, 1, 2, 0.5)
    assert second.sources == ()
    report = result.grounding
    assert report is not None
    assert (report.grounded_ratio, report.grounded_tokens) == (0.5, 1)
    assert (report.ranges[0].start, report.ranges[0].end, report.ranges[0].text) == (4, 5, " a\n")
    assert str(report) == "grounding: 1 tokens (50%) copied from 1 range of the prompt"


def test_head_scores_are_uploaded_and_downloaded_as_published_json() -> None:
    header, chunk = upload(b"{}", kind="head_set", format="head_score_json")
    assert header.header.kind == artifact_pb2.ARTIFACT_KIND_HEAD_SET
    assert header.header.format == artifact_pb2.ARTIFACT_FORMAT_HEAD_SCORE_JSON
    assert chunk.chunk == b"{}"
    assert download("retrieval", "head_score_json", ()).format == artifact_pb2.ARTIFACT_FORMAT_HEAD_SCORE_JSON


async def test_the_async_client_does_the_same(serve: Serve) -> None:
    async with AsyncClient(serve(generation=Generations(), heads=Heads())) as client:
        grounded = await client.generate("hi", grounding="retrieval").result()
        detected = await client.detect_retrieval_heads().result()
        scored = await client.score_heads("successor").result()
        effect = await client.evaluate_head_edit("retrieval", "zero").result()
        circuit = await client.find_circuit([PAIR], "mean_ablation").result()
        [compared] = await client.compare_head_sets(["one", "two"])
        attributed = await client.attribute_logits("The cat", " sat")
    assert grounded.grounding is not None
    assert detected.artifact.id == scored.artifact.id == circuit.artifact.id == HEAD_SET.id
    assert (effect.edited.successes, compared.common, len(attributed.heads)) == (0, 3, 6)


def test_heads_in_text_are_listed_ones_and_all_other_text_is_a_set() -> None:
    assert selection_message("L18H6,L17H3") == selection_message([(18, 6), (17, 3)])
    assert selection_message("retrieval").head_set == "retrieval"
