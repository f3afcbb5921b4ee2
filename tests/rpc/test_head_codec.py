"""Requests of HeadService as dataclasses: defaults as head.proto states them, and bounds that say what is accepted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patchclamp.v1 import generation_pb2
from patchclamp.v1 import head_pb2 as pb
from patchclamp_server.analysis.heads.circuits.methods import CIRCUIT_METHODS
from patchclamp_server.analysis.heads.retrieval.detect import Detection
from patchclamp_server.analysis.heads.retrieval.needles import Needle, NeedleTest
from patchclamp_server.analysis.heads.retrieval.stopping import StoppingRule
from patchclamp_server.analysis.heads.scores.scoring import Fact, Scoring
from patchclamp_server.analysis.heads.sets.edits import HeadEditMode
from patchclamp_server.analysis.heads.sets.evaluation import EditEvaluation
from patchclamp_server.artifacts.head_sets import Head, HeadSelection
from patchclamp_server.artifacts.types import Tags
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.load import LoadedModel, load_model
from patchclamp_server.rpc.codecs import circuit as circuit_codec
from patchclamp_server.rpc.codecs import head as head_codec
from patchclamp_server.rpc.codecs import needle as needle_codec
from patchclamp_server.rpc.codecs.circuit import decode_attribution, decode_circuit
from patchclamp_server.rpc.codecs.head import decode_scoring
from patchclamp_server.rpc.codecs.needle import decode_detection, decode_edit_evaluation
from patchclamp_server.text.prompt import PromptEncoder

NEEDLE = pb.Needle(question="Who?", needle="Ann did.", answer="Ann")
HEADS = pb.HeadSelection(heads=pb.HeadIds(heads=[pb.HeadId(layer=1, head=3)]))
INDUCTION = pb.HEAD_SCORE_METHOD_INDUCTION


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(str(tiny_llama_dir))


@pytest.fixture(scope="module")
def large(model: LoadedModel) -> ModelInfo:
    """As the tiny model (two layers of four heads, a token a byte), but with room for everything that has a default."""
    return replace(model.info, context_length=16_384, n_layers=4)


@pytest.fixture(scope="module")
def prompts(model: LoadedModel, large: ModelInfo) -> PromptEncoder:
    return PromptEncoder(model.tokenizer, large)


def prompt(text: str) -> generation_pb2.Prompt:
    return generation_pb2.Prompt(text=text)


def pair(**fields: Any) -> pb.CleanCorruptPair:
    right = {"clean": prompt("ab"), "corrupt": prompt("cd"), "clean_answer": " x", "corrupt_answer": "yz"}
    return pb.CleanCorruptPair(**{**right, **fields})


def circuit(**fields: Any) -> pb.FindCircuitRequest:
    return pb.FindCircuitRequest(**{"method": pb.CIRCUIT_METHOD_PATH_PATCHING, "pairs": [pair()], **fields})


def refused(decode: Any, *args: Any) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        decode(*args)
    return caught.value


def test_a_detection_that_says_nothing_is_the_built_in_one(large: ModelInfo) -> None:
    assert decode_detection(pb.DetectRetrievalHeadsRequest(), large) == Detection()


def test_a_detection_has_what_it_was_given(large: ModelInfo) -> None:
    test = pb.NeedleTest(haystacks=["Hay."], needles=[NEEDLE], lengths=[100], depths=[0.5], seed=2**64 - 1, max_runs=7)
    stopping = pb.StoppingRule(top_k=3, agreement=0.5, window=2, min_successes=4)
    request = pb.DetectRetrievalHeadsRequest(
        test=test, threshold=0.2, stopping=stopping, description="needles", tags=["a", "b"]
    )
    asked = NeedleTest(("Hay.",), (Needle("Who?", "Ann did.", "Ann"),), (100,), (0.5,), 2**64 - 1, 7)
    expected = Detection(asked, 0.2, StoppingRule(3, 0.5, 2, 4), "needles", Tags(("a", "b")))
    assert decode_detection(request, large) == expected


def test_a_rule_without_numbers_is_the_default_rule_as_far_as_there_are_heads(
    large: ModelInfo, model: LoadedModel
) -> None:
    request = pb.DetectRetrievalHeadsRequest(stopping=pb.StoppingRule())
    assert decode_detection(request, large).stopping == StoppingRule()
    request.test.lengths.append(150)
    assert decode_detection(request, model.info).stopping == replace(StoppingRule(), top_k=8)


def test_a_scoring_that_says_nothing_has_the_defaults(large: ModelInfo, prompts: PromptEncoder) -> None:
    request = pb.ScoreHeadsRequest(method=INDUCTION)
    assert decode_scoring(request, prompts, large) == Scoring("induction")


def test_a_scoring_has_the_parameters_of_its_method(large: ModelInfo, prompts: PromptEncoder) -> None:
    ngram = pb.ScoreHeadsRequest(
        method=pb.HEAD_SCORE_METHOD_NGRAM, ngram=3, sequence_tokens=16, sequences=2, seed=5, tags=["t"], description="d"
    )
    expected = Scoring("ngram", 3, 16, 2, 5, description="d", tags=Tags(("t",)))
    assert decode_scoring(ngram, prompts, large) == expected
    fact = pb.TemporalFact(prompt="In 1920", answer=" x", time_conditioned=True)
    temporal = pb.ScoreHeadsRequest(method=pb.HEAD_SCORE_METHOD_TEMPORAL, facts=[fact])
    assert decode_scoring(temporal, prompts, large).facts == (Fact("In 1920", " x", True),)


@pytest.mark.parametrize(
    ("method", "fields", "field"),
    [
        ("induction", {"ngram": 2}, "ngram"),
        ("successor", {"sequences": 2}, "sequences"),
        ("ov_nuclear_norm", {"sequence_tokens": 8}, "sequence_tokens"),
        ("previous_token", {"facts": [pb.TemporalFact(prompt="x", answer="y")]}, "facts"),
    ],
)
def test_a_parameter_of_another_method_is_refused(
    large: ModelInfo, prompts: PromptEncoder, method: str, fields: dict[str, Any], field: str
) -> None:
    number = pb.HeadScoreMethod.Value(f"HEAD_SCORE_METHOD_{method.upper()}")
    refusal = refused(decode_scoring, pb.ScoreHeadsRequest(method=number, **fields), prompts, large)
    assert (refusal.field, method in refusal.message) == (field, True)


def test_an_edit_that_says_nothing_is_measured_beside_ten_sets_on_the_built_in_test(large: ModelInfo) -> None:
    request = pb.EvaluateHeadEditRequest(heads=HEADS, mode=pb.HEAD_EDIT_MODE_ZERO)
    heads = HeadSelection((Head(1, 3),))
    assert decode_edit_evaluation(request, large) == EditEvaluation(heads)
    assert EditEvaluation(heads).random_sets == 10


@pytest.mark.parametrize("mode", HeadEditMode)
def test_every_mode_of_the_contract_is_a_mode_of_the_library(large: ModelInfo, mode: HeadEditMode) -> None:
    number = pb.HeadEditMode.Value(f"HEAD_EDIT_MODE_{mode.name}")
    request = pb.EvaluateHeadEditRequest(heads=pb.HeadSelection(head_set="tag", top_k=4), mode=number)
    assert decode_edit_evaluation(request, large) == EditEvaluation(HeadSelection(head_set="tag", top_k=4), mode)
    assert len(needle_codec.MODES) == len(pb.HeadEditMode.keys()) - 1


def test_a_circuit_that_says_nothing_has_ten_heads_beside_ten_random_ones(
    large: ModelInfo, prompts: PromptEncoder, model: LoadedModel
) -> None:
    job = decode_circuit(circuit(), prompts, large)
    assert (job.method, job.circuit_size, job.random_sets, job.seed) == ("path_patching", 10, 10, 0)
    # Of eight heads.
    assert decode_circuit(circuit(), prompts, model.info).circuit_size == 8


def test_answers_are_their_first_tokens(large: ModelInfo, prompts: PromptEncoder) -> None:
    [found] = decode_circuit(circuit(), prompts, large).pairs
    assert found.clean == prompts.encode_text("ab").ids
    assert (found.clean_answer, found.corrupt_answer) == (
        prompts.encode_continuation(" ")[0],
        prompts.encode_continuation("y")[0],
    )


def test_every_method_of_the_contract_is_a_method_of_the_library(large: ModelInfo, prompts: PromptEncoder) -> None:
    names = [decode_circuit(circuit(method=n), prompts, large).method for n in pb.CircuitMethod.values()[1:]]
    assert names == list(CIRCUIT_METHODS)


def test_an_attribution_splits_ten_heads_unless_it_says_another_number(
    large: ModelInfo, prompts: PromptEncoder
) -> None:
    request = pb.AttributeLogitsRequest(prompt=prompt("ab"), target="xy")
    asked = decode_attribution(request, prompts, large)
    assert (asked.target, asked.contrast, asked.top_heads) == (prompts.encode_continuation("x")[0], None, 10)
    request.top_heads, request.contrast = 0, "y"
    asked = decode_attribution(request, prompts, large)
    assert (asked.contrast, asked.top_heads) == (prompts.encode_continuation("y")[0], 0)


# Jobs that are too large: the message says the bound.


def test_prompts_of_a_needle_test_have_a_bound(large: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle_codec, "MAX_TEST_TOKENS", 1000)
    request = pb.DetectRetrievalHeadsRequest(test=pb.NeedleTest(lengths=[201], max_runs=5))
    refusal = refused(decode_detection, request, large)
    assert (refusal.field, "1005" in refusal.message, "1000" in refusal.message) == ("test.max_runs", True, True)
    request.test.max_runs = 4
    assert decode_detection(request, large).test.max_runs == 4


def test_runs_of_all_sets_of_heads_have_a_bound(large: ModelInfo) -> None:
    request = pb.EvaluateHeadEditRequest(heads=HEADS, mode=pb.HEAD_EDIT_MODE_ZERO, random_sets=100)
    refusal = refused(decode_edit_evaluation, request, large)
    assert (refusal.field, "10000" in refusal.message) == ("test.max_runs", True)
    request.test.max_runs = 98
    assert decode_edit_evaluation(request, large).random_sets == 100


def test_random_text_has_a_bound(large: ModelInfo, prompts: PromptEncoder) -> None:
    request = pb.ScoreHeadsRequest(method=INDUCTION, sequence_tokens=1024, sequences=17)
    refusal = refused(decode_scoring, request, prompts, large)
    assert (refusal.field, "from 1 to 16" in refusal.message) == ("sequences", True)
    request.sequences = 16
    assert decode_scoring(request, prompts, large).sequences == 16
    request.sequence_tokens = 1025
    assert refused(decode_scoring, request, prompts, large).field == "sequence_tokens"


def test_facts_have_a_bound_and_so_has_their_text(
    large: ModelInfo, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = pb.TemporalFact(prompt="x" * 100, answer="y")
    request = pb.ScoreHeadsRequest(method=pb.HEAD_SCORE_METHOD_TEMPORAL, facts=[fact] * 257)
    refusal = refused(decode_scoring, request, prompts, large)
    assert (refusal.field, "256" in refusal.message) == ("facts", True)
    monkeypatch.setattr(head_codec, "MAX_FACTS_BYTES", 1000)
    del request.facts[9:]
    refusal = refused(decode_scoring, request, prompts, large)
    assert (refusal.field, "1000" in refusal.message) == ("facts", True)


def test_activations_of_a_pair_have_a_bound(
    large: ModelInfo, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two runs, four bytes, four layers, a residual stream and outputs of heads of 32 each.
    monkeypatch.setattr(circuit_codec, "MAX_ACTIVATION_BYTES", 10 * (2 * 4 * 4 * (32 + 32)))
    assert decode_circuit(circuit(pairs=[pair(clean=prompt("x" * 10))]), prompts, large).pairs
    request = circuit(pairs=[pair(), pair(corrupt=prompt("x" * 11))])
    refusal = refused(decode_circuit, request, prompts, large)
    assert (refusal.field, "10 are held" in refusal.message) == ("pairs[1].corrupt", True)


def test_an_attribution_fits_into_a_message(large: ModelInfo, prompts: PromptEncoder) -> None:
    request = pb.AttributeLogitsRequest(prompt=prompt("x" * 4097), target="x")
    assert refused(decode_attribution, request, prompts, large).field == "prompt"
    request.prompt.text = "x" * 4096
    many = replace(large, n_layers=100)
    request.top_heads = 200
    refusal = refused(decode_attribution, request, prompts, many)
    assert (refusal.field, "at most 127" in refusal.message) == ("top_heads", True)
    request.top_heads = 127
    assert decode_attribution(request, prompts, many).top_heads == 127
