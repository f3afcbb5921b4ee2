"""The HTTP port beside gRPC serves `/metrics` for Prometheus, and `/healthz` for probes that do not speak gRPC."""

import ssl
from collections.abc import Callable, Iterable
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

from patchclamp_server.addresses import Address
from patchclamp_server.security.tls_files import TlsFiles

# A connection that says nothing for so long is closed.
SILENCE_SECONDS = 10.0


class MetricsEndpoint:
    """Serves on a thread of its own until `close`."""

    def __init__(
        self, registry: CollectorRegistry, address: Address, is_serving: Callable[[], bool], tls: TlsFiles | None = None
    ) -> None:
        """`is_serving` returns what health says and is asked on other threads. OSError: the port is taken."""
        self._tls = tls
        certificate, key = (None, None) if tls is None else (str(tls.certificate), str(tls.key))
        served: tuple[WSGIServer, Thread] = start_http_server(
            address.port, addr=address.host, registry=registry, certfile=certificate, keyfile=key
        )
        self._server, self._thread = served
        self._server.set_app(_application(make_wsgi_app(registry), is_serving))
        # A connection that says nothing delays no other: its own thread does the handshake, and gives up in time.
        handler: type[WSGIRequestHandler] = self._server.RequestHandlerClass  # type: ignore[assignment]
        self._server.RequestHandlerClass = type("Handler", (handler,), {"timeout": SILENCE_SECONDS})
        if isinstance(self._server.socket, ssl.SSLSocket):
            self._server.socket.do_handshake_on_connect = False  # type: ignore[attr-defined]

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def renew_certificate(self) -> None:
        """Gives new connections the certificate that is in the files now."""
        if self._tls is not None and isinstance(self._server.socket, ssl.SSLSocket):
            self._server.socket.context.load_cert_chain(self._tls.certificate, self._tls.key)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _application(metrics: WSGIApplication, is_serving: Callable[[], bool]) -> WSGIApplication:
    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, start_response)
            case "/healthz":
                status, text = ("200 OK", "SERVING") if is_serving() else ("503 Service Unavailable", "NOT_SERVING")
            case _:
                status, text = "404 Not Found", "this port has /metrics and /healthz"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    return application
