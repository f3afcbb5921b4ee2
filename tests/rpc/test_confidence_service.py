"""Confidence through a real channel: the report of every call that generates or scores, and what is refused where."""

import math
from typing import Any

import grpc
import pytest
from statuses import failure
from test_bad_input import add
from test_generation_service import STRONG, generate, request
from test_session import Client

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub

EVERY = pb.Confidence()
YES_OR_NO = pb.Confidence(options=["yes", "no"])
STEERED = program.Program(edits=[add(name="push", add=STRONG)])


def test_the_last_layer_is_the_model_itself(channel: grpc.Channel):
    _, tokens, finished = generate(channel, confidence=EVERY, logprobs=0, program=STEERED)
    report = finished.confidence
    assert (list(report.layers), report.tokens, list(report.options)) == ([0, 1], 8, [])
    assert report.layer_agreement[1] == 1.0
    assert report.layer_probability[1] == pytest.approx(sum(math.exp(t.logprob) for t in tokens) / 8, rel=1e-4)
    assert report.consistency == report.layer_agreement[0]
    assert 0.0 < report.layer_probability[0] < 1.0


def test_a_sampled_token_is_not_always_the_most_likely_of_the_last_layer(channel: grpc.Channel):
    sampling = pb.Sampling(temperature=3.0, seed=4)
    _, tokens, finished = generate(channel, confidence=EVERY, logprobs=1, sampling=sampling)
    chosen = sum(t.id == t.top_logprobs[0].id for t in tokens) / 8
    assert chosen < 1.0
    assert finished.confidence.layer_agreement[1] == chosen


def test_the_answer_and_its_receipt_are_those_without_it(channel: grpc.Channel):
    plain = generate(channel, program=STEERED)
    asked = generate(channel, program=STEERED, confidence=EVERY)
    assert [t.id for t in asked[1]] == [t.id for t in plain[1]]
    assert not any(t.readouts for t in asked[1])
    assert asked[2].receipt.program_fingerprint == plain[2].receipt.program_fingerprint
    assert not plain[2].HasField("confidence")


def test_options_share_the_probability_of_the_first_token(channel: grpc.Channel):
    _, _, finished = generate(channel, confidence=YES_OR_NO)
    report = finished.confidence
    assert report.tokens == 1
    assert [option.option for option in report.options] == ["yes", "no"]
    assert len({option.token for option in report.options}) == 2
    for layer in range(2):
        assert sum(option.probability[layer] for option in report.options) == pytest.approx(1.0)
    said = [report.options[0].probability[layer] > 0.5 for layer in range(2)]
    assert list(report.layer_agreement) == [float(said[0] == said[1]), 1.0]
    assert report.consistency == report.layer_agreement[0]


def test_a_threshold_moves_what_a_layer_says(channel: grpc.Channel):
    _, _, plain = generate(channel, confidence=YES_OR_NO)
    first = plain.confidence.options[0].probability
    for balance in (-1e-3, 1e-3):
        asked = pb.Confidence(options=["yes", "no"], layers=[1, 0], thresholds=[first[1] - 1e-3, first[0] + balance])
        _, _, finished = generate(channel, confidence=asked)
        assert list(finished.confidence.layers) == [0, 1]
        assert list(finished.confidence.layer_agreement) == [float(balance < 0), 1.0]


def test_an_early_layer_alone_is_compared_with_the_last(channel: grpc.Channel):
    _, _, every = generate(channel, confidence=YES_OR_NO)
    _, _, finished = generate(channel, confidence=pb.Confidence(options=["yes", "no"], layers=[0]))
    assert list(finished.confidence.layers) == [0]
    assert finished.confidence.consistency == every.confidence.consistency
    assert list(finished.confidence.options[1].probability) == [every.confidence.options[1].probability[0]]


def test_a_score_says_how_far_the_layers_agree_on_the_continuation(channel: grpc.Channel):
    asked = pb.ScoreRequest(prompt=pb.Prompt(text="hello"), text=" there", program=STEERED, confidence=EVERY)
    answer = GenerationServiceStub(channel).Score(asked)
    report = answer.confidence
    assert report.tokens == len(answer.tokens) == 6
    expected = sum(math.exp(token.logprob) for token in answer.tokens) / 6
    assert report.layer_probability[1] == pytest.approx(expected, rel=1e-4)
    asked.ClearField("confidence")
    assert not GenerationServiceStub(channel).Score(asked).HasField("confidence")


def test_a_score_reads_options_beside_other_readouts(channel: grpc.Channel):
    lens = program.Readout(
        name="lens", site=program.SITE_RESID_POST, layers=[1], logit_lens=program.LogitLensReadout(k=1)
    )
    asked = pb.ScoreRequest(prompt=pb.Prompt(text="hello"), text="yes", confidence=YES_OR_NO)
    asked.program.readouts.append(lens)
    answer = GenerationServiceStub(channel).Score(asked)
    assert answer.confidence.options[0].token == answer.tokens[0].id
    assert [value.name for value in answer.prompt_readouts] == ["lens"] * 5


def test_an_answer_of_no_tokens_has_no_confidence(channel: grpc.Channel):
    _, _, finished = generate(channel, confidence=YES_OR_NO, stop=pb.StopConditions(max_tokens=0))
    assert (finished.confidence.tokens, finished.confidence.consistency) == (0, 0.0)
    assert [list(option.probability) for option in finished.confidence.options] == [[], []]


def test_a_session_reports_what_was_granted(channel: grpc.Channel):
    client = Client(channel, confidence=EVERY)
    client.send(advance=pb.Advance(tokens=3))
    client.tokens(3)
    client.send(stop=pb.Stop())
    finished = client.finished()
    client.close()
    assert finished.confidence.tokens == 3


def test_both_sides_of_a_comparison_have_a_report(channel: grpc.Channel):
    asked = pb.CompareRequest(request=request(program=STEERED, confidence=EVERY))
    responses = [r.text for r in GenerationServiceStub(channel).Compare(asked) if r.HasField("text")]
    for side, edits in ((pb.COMPARE_SIDE_EDITED, STEERED), (pb.COMPARE_SIDE_BASELINE, program.Program())):
        [finished] = [t.response.finished for t in responses if t.side == side and t.response.HasField("finished")]
        _, _, alone = generate(channel, program=edits, confidence=EVERY)
        assert list(finished.confidence.layer_agreement) == list(alone.confidence.layer_agreement)
        assert list(finished.confidence.layer_probability) == pytest.approx(list(alone.confidence.layer_probability))


WRONG: dict[str, Any] = {"prompt": pb.Prompt(text="hello"), "confidence": pb.Confidence(layers=[7])}


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda stub: stub.Score(pb.ScoreRequest(text="yes", **WRONG)), "confidence.layers[0]"),
        (
            lambda stub: list(stub.Compare(pb.CompareRequest(request=pb.GenerateRequest(**WRONG)))),
            "request.confidence.layers[0]",
        ),
        (
            lambda stub: list(
                stub.Session(iter([pb.SessionRequest(start=pb.SessionStart(request=pb.GenerateRequest(**WRONG)))]))
            ),
            "start.request.confidence.layers[0]",
        ),
    ],
    ids=["score", "compare", "session"],
)
def test_paths_of_refusals_begin_where_the_request_does(channel: grpc.Channel, call: Any, field: str):
    with pytest.raises(grpc.RpcError) as error:
        call(GenerationServiceStub(channel))
    refusal = failure(error.value)
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
