"""Generate, Score, Compare, ListModels and Tokenize through a real channel."""

import math
from typing import Any

import grpc
import pytest
from live import LiveServer
from statuses import failure
from test_bad_input import add, condition, neurons, scale, vector

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import model_pb2, model_pb2_grpc
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub

STRONG = program.AddVector(vector=vector(*[3.0 if i % 2 else -2.0 for i in range(32)]))


def request(**fields: Any) -> pb.GenerateRequest:
    right = {"prompt": pb.Prompt(text="hello"), "stop": pb.StopConditions(max_tokens=8, ignore_eos=True)}
    return pb.GenerateRequest(**{**right, **fields})


def generate(channel: grpc.Channel, **fields: Any) -> tuple[str, list[pb.GeneratedToken], pb.Finished]:
    responses = list(GenerationServiceStub(channel).Generate(request(**fields)))
    assert [r.HasField("finished") for r in responses] == [False] * (len(responses) - 1) + [True]
    tokens = [token for r in responses for token in r.tokens]
    return "".join(r.text for r in responses), tokens, responses[-1].finished


def test_generate_streams_every_token_and_then_finishes(channel: grpc.Channel):
    text, tokens, finished = generate(channel)
    assert [t.position for t in tokens] == list(range(5, 13))
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.generated_tokens) == (5, 8)
    assert text


def test_an_edit_changes_the_text_and_the_receipt_says_where(channel: grpc.Channel):
    plain = generate(channel)
    edited = generate(channel, program=program.Program(edits=[add(name="push", add=STRONG)]))
    assert [t.id for t in edited[1]] != [t.id for t in plain[1]]
    [receipt] = edited[2].receipt.edits
    assert edited[2].receipt.touched
    # Five prompt tokens and seven generated ones pass through the model, at one layer.
    assert (receipt.name, receipt.rows + receipt.rows_from_cache) == ("push", 12)
    assert receipt.mean_relative_change > 0


def test_the_same_seed_gives_the_same_sample(channel: grpc.Channel):
    sampling = pb.Sampling(temperature=1.5, seed=2**64 - 1)
    first, second = generate(channel, sampling=sampling), generate(channel, sampling=sampling)
    assert first[2].seed == 2**64 - 1
    assert [t.id for t in first[1]] == [t.id for t in second[1]]


def test_a_seed_chosen_by_the_server_repeats_the_sample(channel: grpc.Channel):
    first = generate(channel, sampling=pb.Sampling(temperature=1.5))
    second = generate(channel, sampling=pb.Sampling(temperature=1.5, seed=first[2].seed))
    assert [t.id for t in first[1]] == [t.id for t in second[1]]


def test_log_probabilities_come_with_each_token(channel: grpc.Channel):
    _, tokens, _ = generate(channel, logprobs=3)
    assert all(len(t.top_logprobs) == 3 for t in tokens)
    # Greedy: the token chosen is the most likely one.
    assert [(t.id, t.logprob) for t in tokens] == [(t.top_logprobs[0].id, t.top_logprobs[0].logprob) for t in tokens]


def test_no_log_probabilities_unless_asked_for(channel: grpc.Channel):
    _, tokens, _ = generate(channel)
    assert not any(t.HasField("logprob") for t in tokens)


def test_no_tokens_when_none_are_wanted(channel: grpc.Channel):
    text, tokens, finished = generate(channel, stop=pb.StopConditions(max_tokens=0))
    assert (text, tokens, finished.reason) == ("", [], pb.FINISH_REASON_LENGTH)


def test_a_stop_token_ends_generation(channel: grpc.Channel):
    _, tokens, _ = generate(channel)
    stop = pb.StopConditions(max_tokens=8, ignore_eos=True, token_ids=[tokens[2].id])
    first_hit = [t.id for t in tokens].index(tokens[2].id)
    _, stopped, finished = generate(channel, stop=stop)
    assert finished.reason == pb.FINISH_REASON_STOP_TOKEN
    assert len(stopped) <= first_hit + 1


def test_readouts_belong_to_the_token_they_come_with(channel: grpc.Channel):
    readout = program.Readout(
        name="norms",
        site=program.SITE_RESID_POST,
        all_layers=True,
        projection=program.ProjectionReadout(vectors=[vector()]),
    )
    responses = list(GenerationServiceStub(channel).Generate(request(program=program.Program(readouts=[readout]))))
    prompt = [v for r in responses for v in r.prompt_readouts]
    assert sorted((v.position, v.layer) for v in prompt) == [(p, layer) for p in range(5) for layer in range(2)]
    tokens = [t for r in responses for t in r.tokens]
    assert len(tokens) == 8
    # The last token never passes through the model.
    for token in tokens[:-1]:
        assert [(v.name, v.position, v.layer) for v in token.readouts] == [
            ("norms", token.position, layer) for layer in range(2)
        ]


def test_an_abort_condition_ends_the_stream_with_its_path(channel: grpc.Channel):
    fires = program.AbortCondition(name="always", condition=condition(threshold=-1e9))
    with pytest.raises(grpc.RpcError) as caught:
        list(GenerationServiceStub(channel).Generate(request(program=program.Program(abort_when=[fires]))))
    aborted = failure(caught.value)
    assert aborted.code is grpc.StatusCode.ABORTED
    assert aborted.reason == "ABORT_CONDITION_FIRED"


def test_a_deadline_ends_the_stream(channel: grpc.Channel):
    long = request(stop=pb.StopConditions(max_tokens=250, ignore_eos=True))
    with pytest.raises(grpc.RpcError) as caught:
        for _ in GenerationServiceStub(channel).Generate(long, timeout=0.02):
            pass
    assert failure(caught.value).code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_cancelled_stream_gives_back_its_kv_blocks(live_server: LiveServer, channel: grpc.Channel):
    long = request(stop=pb.StopConditions(max_tokens=250, ignore_eos=True))
    cancelled = 'patchclamp_sequences_finished_total{outcome="cancelled"}'
    before = live_server.metric(cancelled)
    streams = [GenerationServiceStub(channel).Generate(long) for _ in range(8)]
    for stream in streams:
        next(stream)
        stream.cancel()
    # Runs after the others have been let go, since the engine works on one batch.
    generate(channel)
    stats = live_server.server.engine.stats()
    while stats.running:
        stats = live_server.server.engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert live_server.metric(cancelled) > before


def test_a_client_that_reads_slowly_gets_several_tokens_at_once_and_loses_none(live_server: LiveServer):
    # Eight kilobytes of readouts a token, so that the transport soon takes no more.
    wide = program.Readout(
        site=program.SITE_RESID_POST,
        all_layers=True,
        projection=program.ProjectionReadout(vectors=[vector()] * 1000),
        scope=program.Scope(include=[program.TokenSelector(phase=program.PHASE_GENERATED)]),
    )
    fields = {"program": program.Program(readouts=[wide]), "stop": pb.StopConditions(max_tokens=60, ignore_eos=True)}
    stats = live_server.server.engine.stats
    before = stats().decode_tokens
    with grpc.insecure_channel(live_server.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        stream = GenerationServiceStub(channel).Generate(request(**fields))
        # More than the transport takes, and less than what a client may leave unread before its sequence is held back.
        while stats().decode_tokens < before + 16:
            pass
        responses = list(stream)
    tokens = [token for r in responses for token in r.tokens]
    assert [t.position for t in tokens] == list(range(5, 65))
    assert all(len(v.values) == 1000 for t in tokens[:-1] for v in t.readouts)
    assert len(responses) < len(tokens)


def test_score_gives_the_log_probability_of_each_token(channel: grpc.Channel):
    _, tokens, _ = generate(channel, logprobs=0)
    continuation = pb.TokenIds(ids=[t.id for t in tokens])
    scored = GenerationServiceStub(channel).Score(
        pb.ScoreRequest(prompt=pb.Prompt(text="hello"), tokens=continuation, top_logprobs=2)
    )
    assert [t.id for t in scored.tokens] == list(continuation.ids)
    assert [t.position for t in scored.tokens] == [t.position for t in tokens]
    assert [t.logprob for t in scored.tokens] == pytest.approx([t.logprob for t in tokens], abs=1e-4)
    assert scored.total_logprob == pytest.approx(sum(t.logprob for t in tokens), abs=1e-3)
    assert scored.perplexity == pytest.approx(math.exp(-scored.total_logprob / len(tokens)))
    assert all(len(t.top_logprobs) == 2 for t in scored.tokens)


def test_score_of_text_and_of_its_tokens_agree(channel: grpc.Channel):
    stub = GenerationServiceStub(channel)
    prompt = pb.Prompt(text="hello")
    ids = (
        model_pb2_grpc.ModelServiceStub(channel).Tokenize(model_pb2.TokenizeRequest(prompt=pb.Prompt(text=" you"))).ids
    )
    by_text = stub.Score(pb.ScoreRequest(prompt=prompt, text=" you"))
    by_tokens = stub.Score(pb.ScoreRequest(prompt=prompt, tokens=pb.TokenIds(ids=ids)))
    assert by_text.tokens == by_tokens.tokens


def test_score_runs_the_program(channel: grpc.Channel):
    stub = GenerationServiceStub(channel)
    plain = stub.Score(pb.ScoreRequest(prompt=pb.Prompt(text="hello"), text=" you"))
    edits = [add(add=STRONG), neurons(scale(1, 2, 3))]
    edited = stub.Score(
        pb.ScoreRequest(prompt=pb.Prompt(text="hello"), text=" you", program=program.Program(edits=edits))
    )
    assert edited.receipt.touched
    assert edited.total_logprob != pytest.approx(plain.total_logprob, abs=1e-3)


def compare(channel: grpc.Channel, **fields: Any) -> list[pb.CompareResponse]:
    return list(GenerationServiceStub(channel).Compare(pb.CompareRequest(request=request(**fields))))


def side(responses: list[pb.CompareResponse], which: "pb.CompareSide.ValueType") -> list[int]:
    texts = [r.text.response for r in responses if r.HasField("text") and r.text.side == which]
    assert [r.HasField("finished") for r in texts].count(True) == 1
    return [token.id for r in texts for token in r.tokens]


def test_compare_streams_both_texts_and_sums_up_the_divergence(channel: grpc.Channel):
    edits = program.Program(edits=[add(add=STRONG)])
    responses = compare(channel, program=edits)
    assert side(responses, pb.COMPARE_SIDE_BASELINE) == [t.id for t in generate(channel)[1]]
    edited = side(responses, pb.COMPARE_SIDE_EDITED)
    assert edited == [t.id for t in generate(channel, program=edits)[1]]
    divergences = [r.divergence for r in responses if r.HasField("divergence")]
    assert [d.id for d in divergences] == edited
    assert [d.position for d in divergences] == list(range(5, 13))
    summary = responses[-1].summary
    assert summary.positions == 8
    assert summary.mean_kl == pytest.approx(sum(d.kl for d in divergences) / 8)
    assert summary.max_kl == max(d.kl for d in divergences) > 0


def test_compare_of_no_edit_finds_no_divergence(channel: grpc.Channel):
    summary = compare(channel)[-1].summary
    assert summary.max_kl == pytest.approx(0.0, abs=1e-6)
    assert summary.top1_agreement == 1.0


def test_compare_gives_both_sides_the_same_seed(channel: grpc.Channel):
    responses = compare(channel, sampling=pb.Sampling(temperature=2.0))
    assert side(responses, pb.COMPARE_SIDE_BASELINE) == side(responses, pb.COMPARE_SIDE_EDITED)


def test_the_served_model_is_listed_and_can_be_named(live_server: LiveServer, channel: grpc.Channel):
    [model] = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models
    assert model.fingerprint == live_server.model.info.fingerprint
    assert (model.architecture, model.n_layers, model.d_model) == ("llama", 2, 32)
    sites = {s.site: s.width for s in model.sites}
    assert (sites[program.SITE_RESID_PRE], sites[program.SITE_MLP_POST]) == (32, 64)
    assert (sites[program.SITE_MLP_GATE], sites[program.SITE_MLP_UP]) == (64, 64)
    assert generate(channel, model=model.name)[1]


def test_tokenize_shows_a_chat_as_generate_runs_it(channel: grpc.Channel):
    chat = pb.Prompt(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")]))
    answer = model_pb2_grpc.ModelServiceStub(channel).Tokenize(model_pb2.TokenizeRequest(prompt=chat))
    assert len(answer.ids) == len(answer.pieces) == len(answer.roles)
    assert "".join(answer.pieces).endswith("assistant\n")
    assert answer.roles[-1] == "assistant"
    assert generate(channel, prompt=chat)[2].usage.prompt_tokens == len(answer.ids)


def test_a_bias_of_a_token_decides_what_is_drawn(channel: grpc.Channel):
    _, tokens, _ = generate(channel, sampling=pb.Sampling(logit_bias={65: 100.0}))
    assert [token.id for token in tokens] == [65] * 8


def test_the_end_comes_after_the_least_number_of_tokens(channel: grpc.Channel):
    """Ends are tokens of the model, stop tokens and stop strings; the tiny model has one token a byte."""
    likely = pb.Sampling(logit_bias={2: 50.0, 65: 49.0})
    eos = pb.StopConditions(max_tokens=8, min_tokens=5)
    _, tokens, finished = generate(channel, sampling=likely, stop=eos)
    assert [token.id for token in tokens] == [65] * 5 + [2]
    assert finished.reason == pb.FINISH_REASON_EOS
    string = pb.StopConditions(max_tokens=8, min_tokens=3, ignore_eos=True, strings=[piece(channel, 65)])
    text, tokens, finished = generate(channel, sampling=pb.Sampling(logit_bias={65: 50.0}), stop=string)
    assert (len(tokens), len(text), finished.reason) == (4, 3, pb.FINISH_REASON_STOP_STRING)


def piece(channel: grpc.Channel, id: int) -> str:
    return model_pb2_grpc.ModelServiceStub(channel).Detokenize(model_pb2.DetokenizeRequest(ids=[id])).text


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": pb.Sampling(logit_bias={10**6: 1.0})}, "sampling.logit_bias[1000000]"),
        ({"sampling": pb.Sampling(logit_bias={5: float("nan")})}, "sampling.logit_bias[5]"),
        ({"sampling": pb.Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))}, "sampling.logit_bias"),
        ({"samples": 129}, "samples"),
        ({"stop": pb.StopConditions(max_tokens=2, min_tokens=3)}, "stop.min_tokens"),
        ({"stop": pb.StopConditions(max_tokens=2, to_context_end=True)}, "stop.to_context_end"),
    ],
)
def test_wrong_biases_and_limits_are_refused(channel: grpc.Channel, fields: dict[str, Any], field: str):
    with pytest.raises(grpc.RpcError) as caught:
        list(GenerationServiceStub(channel).Generate(request(**fields)))
    assert failure(caught.value).fields == [field]


def test_samples_are_those_of_their_seeds_and_share_the_prompt(channel: grpc.Channel, live_server: LiveServer):
    prompt = pb.Prompt(text="A prompt of its own, which is longer than one block of the KV cache: " + "ho " * 20)
    several = request(prompt=prompt, sampling=pb.Sampling(temperature=1.5, seed=7), samples=4)
    before = live_server.server.engine.stats()
    responses = list(GenerationServiceStub(channel).Generate(several))
    computed = live_server.server.engine.stats().prefill_tokens - before.prefill_tokens
    texts = ["".join(r.text for r in responses if r.sample == number) for number in range(4)]
    ended = [r.finished for r in responses if r.HasField("finished")]
    assert sorted(finished.seed for finished in ended) == [7, 8, 9, 10]
    alone = [
        generate(channel, prompt=prompt, sampling=pb.Sampling(temperature=1.5, seed=seed))[0] for seed in (7, 8, 9, 10)
    ]
    assert texts == alone
    length, size = ended[0].usage.prompt_tokens, live_server.server.config.engine.kv_block_size
    # The rest of the prompt behind its last whole block is computed by each.
    assert computed <= length + 3 * size
    assert length > 4 * size


def test_a_session_and_a_comparison_have_one_sample(channel: grpc.Channel):
    several = request(samples=2)
    with pytest.raises(grpc.RpcError) as caught:
        list(GenerationServiceStub(channel).Compare(pb.CompareRequest(request=several)))
    assert failure(caught.value).fields == ["request.samples"]
    start = pb.SessionRequest(start=pb.SessionStart(request=several))
    with pytest.raises(grpc.RpcError) as caught:
        list(GenerationServiceStub(channel).Session(iter([start])))
    assert failure(caught.value).fields == ["start.request.samples"]


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_tokens_of_the_prompt_have_the_log_probabilities_of_a_score(channel: grpc.Channel, max_tokens: int):
    ids = list(range(5, 60))
    prompt = pb.Prompt(tokens=pb.TokenIds(ids=ids))
    for _ in range(2):  # the second time the prompt is known to the prefix cache
        asked = request(prompt=prompt, stop=pb.StopConditions(max_tokens=max_tokens, ignore_eos=True))
        asked.prompt_logprobs = 2
        responses = list(GenerationServiceStub(channel).Generate(asked))
        told = [token for r in responses for token in r.prompt_tokens]
        rest = pb.ScoreRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=ids[:1])), tokens=pb.TokenIds(ids=ids[1:]))
        rest.top_logprobs = 2
        scored = GenerationServiceStub(channel).Score(rest)
        assert not told[0].HasField("logprob")
        assert told[1:] == list(scored.tokens)
        assert [token.id for token in told] == ids
        assert sum(len(r.tokens) for r in responses) == max_tokens


def test_a_prompt_of_one_token_is_told_without_a_log_probability(channel: grpc.Channel):
    asked = request(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[5])), prompt_logprobs=0, samples=2)
    responses = list(GenerationServiceStub(channel).Generate(asked))
    told = [token for r in responses for token in r.prompt_tokens]
    assert [(token.id, token.position, token.HasField("logprob")) for token in told] == [(5, 0, False)] * 2
    assert sum(len(r.tokens) for r in responses) == 16
