"""TLS and mTLS with real certificates, renewed while the server runs."""

import shutil
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Issued
from live import LiveServer
from secured import RELOAD_SECONDS, Stream, generation, refusal, until

from patchclamp import Client, PatchclampError
from patchclamp.v1 import model_pb2, model_pb2_grpc
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.security.configuration import ConfigurationError


@dataclass
class Place:
    """Files of a server: `install` puts a certificate where the server looks."""

    directory: Path
    authority: Authority

    @property
    def files(self) -> dict[str, str]:
        return {
            "tls_certificate": str(self.directory / "server.pem"),
            "tls_key": str(self.directory / "server.key"),
        }

    def install(self, issued: Issued) -> None:
        shutil.copy(issued.key, self.directory / "server.key")
        shutil.copy(issued.certificate, self.directory / "server.pem")

    def served(self, model: Any, **config: Any) -> LiveServer:
        return LiveServer(
            model, self.directory / "artifacts", reload_seconds=RELOAD_SECONDS, **{**self.files, **config}
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    authority = Authority(tmp_path / "ca")
    place = Place(tmp_path, authority)
    place.install(authority.issue())
    return place


@pytest.fixture
def server(live_server: LiveServer, place: Place) -> Iterator[LiveServer]:
    with place.served(live_server.model) as server:
        yield server


def channel(server: LiveServer, root: Path, client: Issued | None = None) -> grpc.Channel:
    pair = (None, None) if client is None else (client.key.read_bytes(), client.certificate.read_bytes())
    credentials = grpc.ssl_channel_credentials(root.read_bytes(), *pair)
    # A pool of its own: else gRPC would give a second channel the connection of the first.
    return grpc.secure_channel(server.address, credentials, [("grpc.use_local_subchannel_pool", 1)])


def serves(channel: grpc.Channel) -> bool:
    with channel:
        return bool(model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models)


def unavailable(channel: grpc.Channel) -> bool:
    with channel:
        models = model_pb2_grpc.ModelServiceStub(channel)
        answer = refusal(lambda: models.ListModels(model_pb2.ListModelsRequest()))
    return answer.code is grpc.StatusCode.UNAVAILABLE


def reloads(server: LiveServer, outcome: str) -> float:
    return server.metric(f'patchclamp_config_reloads_total{{file="tls",outcome="{outcome}"}}')


def test_a_client_that_knows_the_authority_is_served(server: LiveServer, place: Place):
    with channel(server, place.authority.root) as secure:
        assert list(GenerationServiceStub(secure).Generate(generation()))[-1].HasField("finished")


def test_a_client_that_trusts_another_authority_leaves(server: LiveServer, tmp_path: Path):
    assert unavailable(channel(server, Authority(tmp_path / "other").root))


def test_plain_text_is_not_served(server: LiveServer):
    assert unavailable(grpc.insecure_channel(server.address))


def test_a_renewed_certificate_is_for_new_connections_and_the_running_stream_goes_on(server: LiveServer, place: Place):
    with channel(server, place.authority.root) as old:
        stream = Stream(old, ())
        stream.tokens(2)
        renewed = Authority(place.directory / "renewed")
        place.install(renewed.issue())
        # Both files change, and may be read when only one has.
        until(lambda: reloads(server, "ok") >= 1)
        assert serves(channel(server, renewed.root))
        assert unavailable(channel(server, place.authority.root))
        assert len(stream.tokens(2)) == 2
        stream.end()


def test_a_broken_certificate_keeps_the_old_one_and_counts(server: LiveServer, place: Place):
    (place.directory / "server.pem").write_text("-----BEGIN CERTIFICATE-----\nbroken\n-----END CERTIFICATE-----\n")
    until(lambda: reloads(server, "failed") == 1)
    assert serves(channel(server, place.authority.root))


def test_a_key_that_belongs_to_another_certificate_is_not_served(server: LiveServer, place: Place):
    shutil.copy(place.authority.issue(file="another").key, place.directory / "server.key")
    until(lambda: reloads(server, "failed") == 1)
    assert serves(channel(server, place.authority.root))


def test_mtls_serves_clients_of_its_authority_and_nobody_else(live_server: LiveServer, place: Place):
    clients = Authority(place.directory / "clients", "clients")
    with place.served(live_server.model, tls_client_ca=str(clients.root)) as server:
        root = place.authority.root
        assert serves(channel(server, root, clients.issue("research")))
        assert unavailable(channel(server, root))
        assert unavailable(channel(server, root, place.authority.issue("research")))


def test_a_renewed_client_authority_is_asked_of_new_connections(live_server: LiveServer, place: Place):
    root, roots = place.authority.root, place.directory / "clients.pem"
    old, new = Authority(place.directory / "old", "old"), Authority(place.directory / "new", "new")
    shutil.copy(old.root, roots)
    with place.served(live_server.model, tls_client_ca=str(roots)) as server:
        assert serves(channel(server, root, old.issue("research")))
        shutil.copy(new.root, roots)
        until(lambda: reloads(server, "ok") == 1)
        assert serves(channel(server, root, new.issue("research")))
        assert unavailable(channel(server, root, old.issue("research")))


@pytest.mark.parametrize(
    "issued", [{"common_name": "research"}, {"common_name": "pod-7", "names": ("research",)}], ids=["CN", "SAN"]
)
def test_a_clients_certificate_names_its_tenant(live_server: LiveServer, place: Place, issued: dict[str, Any]):
    (place.directory / "policy").write_text("tenants: {research: {methods: ['ModelService/*']}}")
    files = {"tls_client_ca": str(place.authority.root), "policy": str(place.directory / "policy")}
    with place.served(live_server.model, **files) as server:
        client = place.authority.issue(**issued, file="client")
        assert serves(channel(server, place.authority.root, client))
        assert server.metric('patchclamp_tenant_requests_total{code="OK",tenant="research"}') == 1
        with channel(server, place.authority.root, client) as secure:
            answer = refusal(lambda: list(GenerationServiceStub(secure).Generate(generation())))
        assert (answer.code, answer.reason) == (grpc.StatusCode.PERMISSION_DENIED, "METHOD_NOT_ALLOWED")
        stranger = place.authority.issue("stranger")
        with channel(server, place.authority.root, stranger) as secure:
            answer = refusal(lambda: list(GenerationServiceStub(secure).Generate(generation())))
        assert (answer.code, answer.reason) == (grpc.StatusCode.PERMISSION_DENIED, "TENANT_UNKNOWN")


def test_the_client_connects_by_mtls(live_server: LiveServer, place: Place):
    with place.served(live_server.model, tls_client_ca=str(place.authority.root)) as server:
        mine = place.authority.issue("research")
        files = {"certificate": mine.certificate, "key": mine.key}
        with Client(server.address, tls=place.authority.root, **files) as client:
            assert client.models()
        with Client(server.address, tls=place.authority.root) as client, pytest.raises(PatchclampError) as caught:
            client.models(timeout=20)
        assert caught.value.code == "UNAVAILABLE"


def test_metrics_are_served_with_the_certificate_and_its_renewal(live_server: LiveServer, place: Place):
    with place.served(live_server.model, metrics_tls=True) as server:

        def scrape(root: Path) -> bytes:
            context = ssl.create_default_context(cafile=str(root))
            url = f"https://localhost:{server.server.metrics_port}/metrics"
            with urllib.request.urlopen(url, context=context, timeout=20) as response:
                return bytes(response.read())

        # Beside a connection that never begins its handshake.
        with socket.create_connection(("localhost", server.server.metrics_port)):
            assert b"patchclamp_requests_total" in scrape(place.authority.root)
        renewed = Authority(place.directory / "renewed")
        place.install(renewed.issue())

        def is_renewed() -> bool:
            try:
                return bool(scrape(renewed.root))
            except OSError:
                return False

        until(is_renewed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tls_key": None}, "--tls-certificate and --tls-key belong together"),
        ({"tls_certificate": None, "tls_key": None, "tls_client_ca": "ca.pem"}, "--tls-client-ca needs"),
        ({"tls_certificate": "/nowhere/server.pem"}, "cannot read /nowhere/server.pem: No such file"),
        ({"tls_client_ca": __file__}, "holds no certificates of a CA"),
        ({"tls_key": __file__}, "are not a certificate and its key"),
        ({"tls_certificate": None, "tls_key": None, "metrics_tls": True}, "--metrics-tls needs"),
    ],
)
def test_files_that_cannot_be_used_are_an_error_at_the_start(
    live_server: LiveServer, place: Place, change: dict[str, Any], message: str
):
    with pytest.raises(ConfigurationError, match=message):
        place.served(live_server.model, **change)
