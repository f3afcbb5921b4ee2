"""What is served as asked but can hardly have been meant: in the receipt, and before the first token where known."""

import grpc
import pytest
from test_bad_input import add
from test_generation_service import STRONG, generate, request
from test_session import Client

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub

CONTEXT = 256
BEYOND = program.REQUEST_WARNING_CODE_BEYOND_CONTEXT
STRONG_EDIT = program.REQUEST_WARNING_CODE_STRONG_EDIT


def steered(strength: float) -> program.Program:
    return program.Program(edits=[add(add=STRONG, strength=1e-3), add(add=STRONG, strength=strength, name="push")])


def told(receipt: program.Receipt) -> list[tuple[int, str]]:
    return [(warning.code, warning.field) for warning in receipt.warnings]


def responses_of(channel: grpc.Channel, **fields: object) -> list[pb.GenerateResponse]:
    return list(GenerationServiceStub(channel).Generate(request(**fields)))


def test_an_edit_stronger_than_what_it_edits_is_warned_of(channel: grpc.Channel):
    finished = generate(channel, prompt=pb.Prompt(text="strong"), program=steered(1e9))[2]
    assert told(finished.receipt) == [(STRONG_EDIT, "program.edits[1]")]
    [warning] = finished.receipt.warnings
    assert "'push'" in warning.message
    assert "%" in warning.message


def test_an_edit_that_leaves_most_of_it_is_not(channel: grpc.Channel):
    finished = generate(channel, prompt=pb.Prompt(text="mild"), program=steered(2e-3))[2]
    assert finished.receipt.edits[1].mean_relative_change < 0.5
    assert not finished.receipt.warnings


@pytest.mark.parametrize("op", ["scale", "uniform"])
def test_taking_all_heads_away_is_not(channel: grpc.Channel, op: str):
    heads = program.HeadEdit(heads=range(4), **{op: 0.0 if op == "scale" else True})
    edit = program.Edit(site=program.SITE_ATTN_Z, all_layers=True, heads=heads)
    finished = generate(channel, prompt=pb.Prompt(text=op), program=program.Program(edits=[edit]))[2]
    assert finished.receipt.edits[0].mean_relative_change == pytest.approx(1.0, abs=1e-3)
    assert not finished.receipt.warnings


def test_a_score_warns_too(channel: grpc.Channel):
    asked = pb.ScoreRequest(prompt=pb.Prompt(text="score"), text=" me", program=steered(1e9))
    assert told(GenerationServiceStub(channel).Score(asked).receipt) == [(STRONG_EDIT, "program.edits[1]")]


def test_more_tokens_than_the_context_has_room_for_are_warned_of_before_the_first_one(channel: grpc.Channel):
    prompt = pb.Prompt(tokens=pb.TokenIds(ids=[5] * (CONTEXT - 10)))
    responses = responses_of(channel, prompt=prompt, stop=pb.StopConditions(max_tokens=2**31 - 1, ignore_eos=True))
    first, finished = responses[0], responses[-1].finished
    assert [(w.code, w.field) for w in first.warnings] == [(BEYOND, "stop.max_tokens")]
    assert "room for 10 tokens" in first.warnings[0].message
    assert not any(response.warnings for response in responses[1:])
    assert told(finished.receipt) == [(BEYOND, "stop.max_tokens")]
    assert (finished.reason, finished.usage.generated_tokens) == (pb.FINISH_REASON_LENGTH, 10)


def test_as_many_as_there_is_room_for_are_not(channel: grpc.Channel):
    stop = pb.StopConditions(max_tokens=CONTEXT - 5, ignore_eos=True)
    responses = responses_of(channel, stop=stop)
    assert responses[-1].finished.usage.generated_tokens == CONTEXT - 5
    assert not responses[0].warnings
    assert not responses[-1].finished.receipt.warnings


def test_who_asks_for_no_number_of_tokens_is_not_warned(channel: grpc.Channel):
    responses = responses_of(channel, stop=pb.StopConditions(ignore_eos=True))
    assert responses[-1].finished.usage.generated_tokens == CONTEXT - 5
    assert not responses[0].warnings
    assert not responses[-1].finished.receipt.warnings


def test_a_session_is_warned_of_both(channel: grpc.Channel):
    session = Client(channel, program=steered(1e9), stop=pb.StopConditions(max_tokens=9999, ignore_eos=True))
    session.send(advance=pb.Advance(tokens=2))
    session.tokens(2)
    session.send(stop=pb.Stop())
    finished = session.finished()
    session.close()
    assert told(finished.receipt) == [(BEYOND, "stop.max_tokens"), (STRONG_EDIT, "program.edits[1]")]


def test_the_receipt_has_the_threshold_of_a_gate(channel: grpc.Channel):
    condition = program.Condition(
        site=program.SITE_RESID_PRE,
        vector=STRONG.vector,
        comparison=program.COMPARISON_ABOVE,
        threshold=1.25,
    )
    edits = [add(add=STRONG, gate=program.Gate(condition=condition)), add(add=STRONG)]
    gated, free = generate(channel, program=program.Program(edits=edits))[2].receipt.edits
    assert gated.gate_threshold == 1.25
    assert not free.HasField("gate_threshold")
