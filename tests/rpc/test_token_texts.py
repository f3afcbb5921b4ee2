"""Tokens as words: the text beside every id that people read, and Detokenize. The model has one token for each byte."""

from collections.abc import Sequence

import grpc
import pytest
from statuses import failure

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import model_pb2
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp.v1.model_pb2_grpc import ModelServiceStub
from patchclamp_server.engine.sampler import drawn_seed

PROMPT = pb.Prompt(text="hello")
STOP = pb.StopConditions(max_tokens=6, ignore_eos=True)
LENS = program.Readout(name="lens", site=program.SITE_RESID_POST, layers=[1], logit_lens=program.LogitLensReadout(k=3))
TOP = program.Readout(name="top", site=program.SITE_MLP_POST, layers=[1], top_neurons=program.TopNeuronsReadout(k=3))
READ = program.Program(readouts=[LENS, TOP])


def tokenized(channel: grpc.Channel, text: str) -> list[int]:
    return list(ModelServiceStub(channel).Tokenize(model_pb2.TokenizeRequest(prompt=pb.Prompt(text=text))).ids)


def detokenized(channel: grpc.Channel, ids: Sequence[int], skip: bool = False) -> model_pb2.DetokenizeResponse:
    request = model_pb2.DetokenizeRequest(ids=ids, skip_special_tokens=skip)
    return ModelServiceStub(channel).Detokenize(request)


def pieces(channel: grpc.Channel, ids: Sequence[int]) -> list[str]:
    return list(detokenized(channel, ids).pieces)


def test_generated_tokens_and_their_alternatives_have_their_text(channel: grpc.Channel):
    request = pb.GenerateRequest(prompt=PROMPT, stop=STOP, logprobs=2)
    tokens = [token for response in GenerationServiceStub(channel).Generate(request) for token in response.tokens]
    assert [token.text for token in tokens] == pieces(channel, [token.id for token in tokens])
    for token in tokens:
        assert [top.text for top in token.top_logprobs] == pieces(channel, [top.id for top in token.top_logprobs])


def test_scored_tokens_and_their_alternatives_have_their_text(channel: grpc.Channel):
    request = pb.ScoreRequest(prompt=PROMPT, text=" you", top_logprobs=2, program=READ)
    scored = GenerationServiceStub(channel).Score(request)
    assert [token.text for token in scored.tokens] == [" ", "y", "o", "u"]
    tops = scored.tokens[0].top_logprobs
    assert [top.text for top in tops] == pieces(channel, [top.id for top in tops])
    assert [len(value.texts) for value in scored.prompt_readouts if value.name == "lens"] == [3] * 5


def test_a_logit_lens_reads_words_and_neurons_have_none(channel: grpc.Channel):
    responses = list(
        GenerationServiceStub(channel).Generate(pb.GenerateRequest(prompt=PROMPT, stop=STOP, program=READ))
    )
    values = [value for r in responses for token in r.tokens for value in token.readouts]
    values += [value for r in responses for value in r.prompt_readouts]
    assert {value.name for value in values} == {"lens", "top"}
    for value in values:
        assert list(value.texts) == (pieces(channel, value.ids) if value.name == "lens" else [])


def test_contributions_of_neurons_come_one_neuron_after_the_other(channel: grpc.Channel):
    ids = tokenized(channel, "ab")
    where = {"site": program.SITE_MLP_POST, "layers": [0], "scope": program.Scope(include=[{"last_k": 1}])}
    each = [
        program.Readout(name=f"{neurons}", logit_lens={"token_ids": ids, "neurons": neurons}, **where)
        for neurons in ([3, 9], [3], [9])
    ]
    request = pb.GenerateRequest(prompt=PROMPT, stop=STOP, program=program.Program(readouts=each))
    values = [v for r in GenerationServiceStub(channel).Generate(request) for v in r.prompt_readouts]
    both, *alone = (next(v for v in values if v.name == readout.name) for readout in each)
    assert list(both.texts) == ["a", "b", "a", "b"]
    assert list(both.values) == [v for one in alone for v in one.values]


def test_divergences_name_their_token(channel: grpc.Channel):
    request = pb.CompareRequest(request=pb.GenerateRequest(prompt=PROMPT, stop=STOP))
    responses = GenerationServiceStub(channel).Compare(request)
    found = [response.divergence for response in responses if response.HasField("divergence")]
    assert [each.text for each in found] == pieces(channel, [each.id for each in found])


def test_detokenize_is_the_inverse_of_tokenize(channel: grpc.Channel):
    answer = detokenized(channel, tokenized(channel, "a b"))
    assert (answer.text, list(answer.pieces)) == ("a b", ["a", " ", "b"])


def test_a_character_of_two_tokens_is_whole_in_the_text_and_replaced_in_each(channel: grpc.Channel):
    ids = tokenized(channel, "é")
    assert len(ids) == 2
    answer = detokenized(channel, ids)
    assert (answer.text, list(answer.pieces)) == ("é", ["\ufffd", "\ufffd"])
    assert detokenized(channel, ids[:1]).text == "\ufffd"


def test_special_tokens_are_shown_or_left_out_of_the_text(channel: grpc.Channel):
    end, letter = 2, tokenized(channel, "a")[0]
    assert detokenized(channel, [letter, end]).text == "a<|im_end|>"
    answer = detokenized(channel, [letter, end], skip=True)
    assert (answer.text, list(answer.pieces)) == ("a", ["a", "<|im_end|>"])


def test_no_tokens_have_no_text(channel: grpc.Channel):
    assert detokenized(channel, []) == model_pb2.DetokenizeResponse()


@pytest.mark.parametrize(
    ("ids", "field", "message"),
    [
        ([1, 10_000], "ids[1]", "expected a whole number from 0 to 258, got 10000"),
        ([1] * 257, "ids", "expected at most 256 tokens, as the context has, got 257"),
    ],
)
def test_ids_that_are_no_tokens_are_refused_by_their_place(
    channel: grpc.Channel, ids: list[int], field: str, message: str
):
    with pytest.raises(grpc.RpcError) as refused:
        detokenized(channel, ids)
    found = failure(refused.value)
    assert (found.code, found.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
    assert message in found.message


def test_a_number_of_tokens_beyond_all_is_refused_with_the_range(channel: grpc.Channel):
    request = pb.GenerateRequest(prompt=PROMPT, stop=pb.StopConditions(max_tokens=2**31))
    with pytest.raises(grpc.RpcError) as refused:
        list(GenerationServiceStub(channel).Generate(request))
    message = "stop.max_tokens: expected a whole number from 0 to 2147483647, got 2147483648"
    assert failure(refused.value).message == message


def test_a_seed_that_the_server_draws_is_a_number_of_every_language() -> None:
    seeds = [drawn_seed() for _ in range(200)]
    assert all(int(float(seed)) == seed for seed in seeds)
    assert len(set(seeds)) == 200


@pytest.mark.parametrize("compared", [False, True])
def test_the_seed_of_a_request_without_one_is_below_two_to_the_53(channel: grpc.Channel, compared: bool):
    stub = GenerationServiceStub(channel)
    request = pb.GenerateRequest(
        prompt=PROMPT, stop=pb.StopConditions(max_tokens=1), sampling=pb.Sampling(temperature=1)
    )
    for _ in range(4):
        if compared:
            answers = [r.text.response for r in stub.Compare(pb.CompareRequest(request=request))]
        else:
            answers = list(stub.Generate(request))
        assert all(answer.finished.seed < 2**53 for answer in answers)
        assert any(answer.finished.seed for answer in answers)
