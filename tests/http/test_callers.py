"""Who calls, for how long, and on what trace: what of HTTP passes through to gRPC."""

import ssl
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from certificates import Authority
from live import LiveServer
from live_front import LiveFront
from patience import PATIENCE_SECONDS
from patient_http import get, post, stream
from secured import Secured, secured

from patchclamp.connection import Connection
from patchclamp_http import Listening, create_app

POLICY = """
tenants:
  free: {}
  reader: {methods: ["GenerationService/Score"]}
  slow: {tokens_per_minute: 30}
"""


@pytest.fixture(scope="module")
def tenants(live_server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    with secured(live_server.model, directory, "free", "reader", "slow", policy=POLICY) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tenants: Secured) -> Iterator[LiveFront]:
    with LiveFront(tenants.server.address) as front:
        yield front


def complete(client: openai.OpenAI, **options: object) -> object:
    return client.completions.create(
        **{"model": client.models.list().data[0].id, "prompt": "hello", "max_tokens": 4, **options}  # type: ignore[call-overload]
    )


def test_the_api_key_is_the_bearer_token(guarded: LiveFront, tenants: Secured) -> None:
    with guarded.openai(api_key=tenants.tokens["free"]) as client:
        complete(client)


def test_a_wrong_key_is_refused_as_openai_does(guarded: LiveFront) -> None:
    with guarded.openai(api_key="sk-wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert caught.value.type == "authentication_error"


def test_a_key_that_no_header_of_grpc_can_carry_is_refused(guarded: LiveFront) -> None:
    headers = {"authorization": "Bearer sk-é".encode("latin-1")}
    answer = get(f"{guarded.url}/v1/models", headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "authorization")
    asked = {"prompt": {"text": "hello"}}
    over_connect = post(f"{guarded.url}/patchclamp.v1.ModelService/Tokenize", json=asked, headers=headers)
    assert (over_connect.status_code, over_connect.json()["code"]) == (400, "invalid_argument")


def test_what_a_tenant_may_not_call_is_refused_with_the_reason(guarded: LiveFront, tenants: Secured) -> None:
    with (
        guarded.openai(api_key=tenants.tokens["reader"]) as client,
        pytest.raises(openai.PermissionDeniedError) as caught,
    ):
        client.completions.create(model="tiny", prompt="hello")
    assert caught.value.code == "METHOD_NOT_ALLOWED"


def test_a_quota_says_when_to_come_back(guarded: LiveFront, tenants: Secured) -> None:
    with guarded.openai(api_key=tenants.tokens["slow"]) as client:
        complete(client, max_tokens=8, n=20)
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client)
    assert caught.value.code == "QUOTA_EXCEEDED"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_health_needs_no_token(guarded: LiveFront) -> None:
    with urllib.request.urlopen(f"{guarded.url}/health") as answer:
        assert answer.status == 200


def test_a_deadline_in_the_headers_ends_the_call(front: LiveFront, model: str) -> None:
    with front.openai() as client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(
            model=model,
            prompt="hello",
            max_tokens=250,
            extra_body={"ignore_eos": True},
            extra_headers={"x-request-timeout-ms": "5"},
        )
    assert (caught.value.status_code, caught.value.code) == (504, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_caller_who_leaves_frees_the_sequence(
    front: LiveFront, model: str, live_server: LiveServer, streamed: bool
) -> None:
    cancelled = 'patchclamp_sequences_finished_total{outcome="cancelled"}'
    before = live_server.metric(cancelled)
    body = {"model": model, "prompt": ["hello"] * 8, "max_tokens": 250, "ignore_eos": True, "stream": streamed}
    if streamed:
        with stream("POST", f"{front.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{front.url}/v1/completions", json=body, timeout=httpx.Timeout(30.0, read=0.05))
    end = time.monotonic() + PATIENCE_SECONDS
    while live_server.server.engine.stats().running and time.monotonic() < end:
        time.sleep(0.01)
    stats = live_server.server.engine.stats()
    assert stats.running == 0
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert live_server.metric(cancelled) > before


def test_the_front_may_be_reached_by_tls(live_server: LiveServer, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    issued = authority.issue()
    listening = Listening("127.0.0.1", 0, certificate=issued.certificate, key=issued.key)
    with LiveFront(live_server.address, listening) as front:
        trusting = ssl.create_default_context(cafile=str(authority.root))
        with urllib.request.urlopen(f"{front.url}/health", context=trusting) as answer:
            assert answer.status == 200


def test_callers_may_be_asked_for_a_certificate(live_server: LiveServer, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    issued, own = authority.issue(), authority.issue("client")
    listening = Listening("127.0.0.1", 0, issued.certificate, issued.key, client_ca=authority.root)
    with LiveFront(live_server.address, listening) as front:
        trusting = ssl.create_default_context(cafile=str(authority.root))
        with pytest.raises(httpx.TransportError):
            get(f"{front.url}/health", verify=trusting)
        trusting.load_cert_chain(own.certificate, own.key)
        assert get(f"{front.url}/health", verify=trusting).status_code == 200


def test_tokens_are_not_sent_to_another_host_in_clear() -> None:
    with pytest.raises(ValueError, match="without TLS"):
        create_app(Connection("patchclamp.example:50051"))


def test_health_says_why_there_is_none() -> None:
    with LiveFront("127.0.0.1:1") as front:
        answer = httpx.get(f"{front.url}/health", timeout=30)
    assert answer.status_code == 503
    assert answer.json() == {"status": "unavailable"}


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with LiveFront("127.0.0.1:1") as front, front.openai() as client, pytest.raises(openai.APIStatusError) as caught:
        client.models.list()
    assert caught.value.status_code == 503
