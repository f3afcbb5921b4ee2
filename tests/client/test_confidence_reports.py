"""Confidence in the client: how it is asked for, and the report."""

from collections.abc import Callable

import pytest
from canned import Generations

from patchclamp import AsyncClient, Client
from patchclamp.confidence import Confidence
from patchclamp.v1 import generation_pb2

Serve = Callable[..., str]

ASKED = Confidence(layers=[3, 1], options=[" yes", " no"], thresholds=[0.25, 0.5])
SENT = generation_pb2.Confidence(layers=[3, 1], options=[" yes", " no"], thresholds=[0.25, 0.5])


def test_a_generation_asks_for_it_and_has_the_report(serve: Serve) -> None:
    server = Generations()
    with Client(serve(generation=server)) as client:
        plain = client.generate("hi").result()
        every = client.generate("hi", confidence=True).result()
        assert server.request.confidence == generation_pb2.Confidence()
        client.generate("hi", confidence=False).result()
        assert not server.request.HasField("confidence")
        report = client.generate("hi", confidence=ASKED).result().confidence
    assert server.request.confidence == SENT
    assert plain.confidence is None
    assert every.confidence is not None
    assert str(every.confidence) == "confidence: layers before the last agree by 37.5% over 2 tokens"
    assert report is not None
    assert (report.consistency, report.layers, report.layer_agreement) == (0.375, (0, 1, 2), (0.25, 0.5, 1.0))
    assert [(own.option, own.probability[0]) for own in report.options] == [(" yes", 0.5), (" no", 0.5)]
    assert len(repr(report)) < 500


def test_one_layer_needs_no_list() -> None:
    assert Confidence(layers=2).message() == generation_pb2.Confidence(layers=[2])


def test_scores_comparisons_and_sessions_ask_for_it_alike(serve: Serve) -> None:
    server = Generations()
    with Client(serve(generation=server)) as client:
        scored = client.score("hi", " you", confidence=ASKED)
        assert server.request.confidence == SENT
        compared = client.compare("hi", confidence=True).result()
        assert server.request.confidence == generation_pb2.Confidence()
        with client.session("hi", confidence=True) as session:
            followed = session.result()
    for found in (scored.confidence, compared.edited.confidence, compared.baseline.confidence, followed.confidence):
        assert found is not None
        assert found.tokens > 0


async def test_the_async_client_does_the_same(serve: Serve) -> None:
    async with AsyncClient(serve(generation=Generations())) as client:
        result = await client.generate("hi", confidence=True).result()
    assert result.confidence is not None
    assert result.confidence.layer_probability == pytest.approx((0.125, 0.25, 0.75))
