"""Grounding through a real channel: tokens with their sources, the report, the metric, and what is refused."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from live import LiveServer
from statuses import failure
from test_bad_input import add, floats
from test_generation_service import generate, request
from test_session import Client
from tokenizers import pre_tokenizers

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2 as program
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.sites import Site

LAYERS, HEADS = 2, 4
PROMPT = "abababababab"
# Of the byte tokenizer: three special tokens come first.
A = 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index("a")


@pytest.fixture(scope="module")
def live_server(live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of its own, with head sets in its store."""
    with LiveServer(live_server.model, tmp_path_factory.mktemp("artifacts")) as server:
        put(server, "all", torch.ones(LAYERS, HEADS))
        put(server, "some", torch.tensor([[0.0, 0.2, 0.0, 0.0], [0.6, 0.0, 0.0, 0.3]]), threshold=0.25)
        put(server, "none", torch.zeros(LAYERS, HEADS), threshold=0.1)
        put(server, "wide", torch.ones(LAYERS, HEADS + 1))
        put(server, "foreign", torch.ones(LAYERS, HEADS), model="sha256:other")
        server.server.services.store.put(
            ArtifactKind.VECTOR,
            {"layer.0": torch.ones(32)},
            model_fingerprint=server.model.info.fingerprint,
            site=Site.RESID_POST,
            tags=("vector",),
        )
        yield server


def put(server: LiveServer, tag: str, scores: torch.Tensor, model: str = "", **evidence: float) -> None:
    server.server.services.store.put(
        ArtifactKind.HEAD_SET,
        {"scores": scores},
        model_fingerprint=model or server.model.info.fingerprint,
        evidence=evidence,
        tags=(tag,),
    )


def grounding(head_set: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": pb.Prompt(text=PROMPT), "grounding": pb.Grounding(head_set=head_set, **fields)}


@pytest.fixture(scope="module")
def only_a(live_server: LiveServer) -> program.Program:
    """The last residual state is what reads as "a", so that every token is one of the prompt."""
    (row,) = live_server.model.decoder.unembedding.rows(torch.tensor([A]))
    replace = program.ReplaceVector(vector=program.Vector(values=floats(*(100 * row).tolist())))
    return program.Program(edits=[add(name="a", replace=replace)])


def test_every_token_carries_where_it_was_copied_from(channel: grpc.Channel, only_a: program.Program):
    """Against a readout of all heads that the client asks for."""
    everything = program.Readout(site=program.SITE_ATTN_Z, all_layers=True, heads=program.HeadReadout())
    asked = program.Program(edits=only_a.edits, readouts=[everything])
    text, tokens, _ = generate(channel, program=asked, **grounding("all"))
    assert text == "a" * 8
    looks = {(v.position, v.layer): v for t in tokens for v in t.readouts}
    for token in tokens[1:]:
        expected = [
            (at, layer, head)
            for layer in range(LAYERS)
            for head, at in enumerate(looks[token.position - 1, layer].ids)
            if at < len(PROMPT) and PROMPT[at] == "a"
        ]
        assert sorted((s.position, s.layer, s.head) for s in token.sources) == sorted(expected)
        probabilities = [s.probability for s in token.sources]
        assert probabilities == sorted(probabilities, reverse=True)
    assert any(token.sources for token in tokens)


def test_the_report_is_that_of_the_tokens(channel: grpc.Channel, only_a: program.Program):
    _, tokens, finished = generate(channel, program=only_a, **grounding("all"))
    report, grounded = finished.grounding, [t for t in tokens if t.sources]
    assert 0 < report.grounded_tokens == len(grounded)
    assert report.grounded_ratio == pytest.approx(len(grounded) / len(tokens))
    assert sum(r.tokens for r in report.ranges) == len(grounded)
    best = {t.sources[0].position for t in grounded}
    assert best == {p for r in report.ranges for p in range(r.start, r.end)}
    assert all(r.text == PROMPT[r.start : r.end] for r in report.ranges)


def test_the_receipt_and_the_readouts_are_those_of_the_same_request_without_it(
    channel: grpc.Channel, only_a: program.Program
):
    plain = generate(channel, program=only_a, prompt=pb.Prompt(text=PROMPT))
    grounded = generate(channel, program=only_a, **grounding("all"))
    assert grounded[2].receipt.program_fingerprint == plain[2].receipt.program_fingerprint
    assert grounded[2].receipt.edits[0].name == "a"
    assert [t.id for t in grounded[1]] == [t.id for t in plain[1]]
    assert not any(t.readouts for t in grounded[1])
    assert not plain[2].HasField("grounding")


def test_a_request_without_a_program_is_grounded_and_its_receipt_is_empty(channel: grpc.Channel):
    _, _, plain = generate(channel)
    _, tokens, finished = generate(channel, **grounding("all"))
    assert finished.HasField("grounding")
    assert finished.receipt.program_fingerprint == plain.receipt.program_fingerprint
    assert not finished.receipt.edits
    assert finished.grounding.grounded_tokens == sum(bool(t.sources) for t in tokens)


@pytest.mark.parametrize(
    ("fields", "heads"), [({}, {(1, 0), (1, 3)}), ({"top_k": 1}, {(1, 0)}), ({"top_k": 3}, {(1, 0), (1, 3), (0, 1)})]
)
def test_only_the_heads_of_the_set_are_asked(
    channel: grpc.Channel, only_a: program.Program, fields: dict[str, int], heads: set[tuple[int, int]]
):
    _, every, _ = generate(channel, program=only_a, **grounding("all"))
    _, tokens, _ = generate(channel, program=only_a, **grounding("some", **fields))
    for of_all, of_some in zip(every, tokens, strict=True):
        assert [s for s in of_all.sources if (s.layer, s.head) in heads] == list(of_some.sources)


def test_a_prompt_that_is_all_in_the_cache_grounds_its_first_token_too(channel: grpc.Channel, only_a: program.Program):
    asked = {**grounding("all"), "prompt": pb.Prompt(text="ab" * 32)}
    first, again = (generate(channel, program=only_a, **asked) for _ in range(2))
    assert again[2].usage.cached_prompt_tokens > 0
    assert [list(t.sources) for t in again[1]] == [list(t.sources) for t in first[1]]
    assert again[1][0].sources


def test_sessions_bring_sources_in_lockstep_with_their_tokens(channel: grpc.Channel, only_a: program.Program):
    _, expected, _ = generate(channel, program=only_a, **grounding("all"))
    client = Client(channel, program=only_a, **grounding("all"))
    for token in expected[:3]:
        client.send(advance=pb.Advance(tokens=1))
        response = next(client.responses)
        assert [list(t.sources) for t in response.tokens] == [list(token.sources)]
    client.send(stop=pb.Stop())
    finished = client.finished()
    client.close()
    assert finished.grounding.grounded_tokens == sum(bool(t.sources) for t in expected[:3])


def test_both_sides_of_a_comparison_are_grounded(channel: grpc.Channel, only_a: program.Program):
    """Each as a request of its own would be. A prompt the model wrote itself: without the edit it goes on repeating."""
    _, written, _ = generate(channel, stop=pb.StopConditions(max_tokens=80, ignore_eos=True))
    asked = {**grounding("all"), "prompt": pb.Prompt(tokens=pb.TokenIds(ids=[A, *(t.id for t in written)]))}
    responses = list(
        GenerationServiceStub(channel).Compare(pb.CompareRequest(request=request(program=only_a, **asked)))
    )
    for side, edits in ((pb.COMPARE_SIDE_EDITED, only_a), (pb.COMPARE_SIDE_BASELINE, program.Program())):
        texts = [r.text.response for r in responses if r.text.side == side]
        _, tokens, finished = generate(channel, program=edits, **asked)
        assert [list(t.sources) for r in texts for t in r.tokens] == [list(t.sources) for t in tokens]
        assert texts[-1].finished.grounding == finished.grounding
        assert finished.grounding.grounded_tokens > 0


def test_finished_requests_are_observed_by_their_grounded_share(
    live_server: LiveServer, channel: grpc.Channel, only_a: program.Program
):
    count, total = (live_server.metric(f"patchclamp_grounded_ratio_{part}") for part in ("count", "sum"))
    _, _, finished = generate(channel, program=only_a, **grounding("all"))
    generate(channel)
    assert live_server.metric("patchclamp_grounded_ratio_count") == count + 1
    assert live_server.metric("patchclamp_grounded_ratio_sum") == pytest.approx(
        total + finished.grounding.grounded_ratio
    )


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"head_set": ""}, grpc.StatusCode.INVALID_ARGUMENT, "grounding.head_set"),
        ({"head_set": "unheard-of"}, grpc.StatusCode.NOT_FOUND, "grounding.head_set"),
        ({"head_set": "vector"}, grpc.StatusCode.INVALID_ARGUMENT, "grounding.head_set"),
        ({"head_set": "foreign"}, grpc.StatusCode.FAILED_PRECONDITION, "grounding.head_set"),
        ({"head_set": "wide"}, grpc.StatusCode.FAILED_PRECONDITION, "grounding.head_set"),
        ({"head_set": "none"}, grpc.StatusCode.FAILED_PRECONDITION, "grounding.head_set"),
        ({"head_set": "all", "top_k": LAYERS * HEADS + 1}, grpc.StatusCode.INVALID_ARGUMENT, "grounding.top_k"),
    ],
)
def test_refused(channel: grpc.Channel, fields: dict[str, Any], code: grpc.StatusCode, field: str):
    with pytest.raises(grpc.RpcError) as error:
        generate(channel, **{**grounding("all"), "grounding": pb.Grounding(**fields)})
    refusal = failure(error.value)
    assert refusal.code is code
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        assert refusal.fields == [field]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (
            program.Program(edits=[program.Edit(site=4, layers=[0], heads=program.HeadEdit(heads=[0], uniform=False))]),
            "program.edits[0].heads.uniform",
        ),
        (
            program.Program(readouts=[program.Readout(site=5, layers=[0], heads=program.HeadReadout())]),
            "program.readouts[0].site",
        ),
        (
            program.Program(
                readouts=[program.Readout(site=4, layers=[0], heads=program.HeadReadout(heads=[1, HEADS]))]
            ),
            "program.readouts[0].heads.heads[1]",
        ),
    ],
)
def test_refused_parts_of_programs(channel: grpc.Channel, message: program.Program, field: str):
    with pytest.raises(grpc.RpcError) as error:
        generate(channel, program=message)
    assert failure(error.value).fields == [field]


def test_a_uniform_head_is_an_edit_whose_receipt_counts_the_query(channel: grpc.Channel):
    """All heads: the whole query becomes 0."""
    uniform = program.HeadEdit(heads=range(HEADS), uniform=True)
    edit = program.Edit(name="blind", site=program.SITE_ATTN_Z, all_layers=True, heads=uniform)
    where = program.Readout(site=program.SITE_ATTN_Z, all_layers=True, heads=program.HeadReadout())
    _, tokens, finished = generate(channel, program=program.Program(edits=[edit], readouts=[where]))
    assert finished.receipt.edits[0].mean_relative_change == pytest.approx(1.0)
    for token in tokens[:-1]:
        for value in token.readouts:
            assert list(value.ids) == [0] * HEADS
            assert list(value.values) == pytest.approx([1 / (token.position + 1)] * HEADS)
