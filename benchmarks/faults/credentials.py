"""What clients of a secured server show: the right things, and the wrong ones."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from certificates import Authority, Issued

from patchclamp_server.security.tokens import new_token

EXPIRED_SECONDS = 3600.0


class Secrets:
    """A server that speaks TLS with clients of its own authority, and a stranger's authority."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._own, self._strangers = Authority(directory / "own"), Authority(directory / "strangers")
        self._server = self._own.issue("localhost")
        self._client = self._own.issue("client")
        self._stranger = self._strangers.issue("client")
        self._token, good = new_token("tenant")
        self._old_token, expired = new_token("tenant", time.time() - EXPIRED_SECONDS)
        self._tokens = directory / "tokens"
        self._tokens.write_text(f"{good.line}\n{expired.line}\n")

    @property
    def options(self) -> tuple[str, ...]:
        """Of the server."""
        return (
            f"--tls-certificate={self._server.certificate}",
            f"--tls-key={self._server.key}",
            f"--tls-client-ca={self._own.root}",
            f"--tokens={self._tokens}",
        )

    def good(self, address: str) -> grpc.Channel:
        return self._channel(address, self._own, self._client, self._token)

    def with_an_expired_token(self, address: str) -> grpc.Channel:
        return self._channel(address, self._own, self._client, self._old_token)

    @contextmanager
    def bad(self, address: str) -> Iterator[dict[str, grpc.Channel]]:
        """Those whose handshake must fail, by what is bad about them."""
        channels = {
            "no TLS": grpc.insecure_channel(address),
            "no certificate": self._channel(address, self._own, None, self._token),
            "a stranger's certificate": self._channel(address, self._own, self._stranger, self._token),
            "trust in a stranger alone": self._channel(address, self._strangers, self._client, self._token),
        }
        try:
            yield channels
        finally:
            for channel in channels.values():
                channel.close()

    def _channel(self, address: str, trusted: Authority, shown: Issued | None, token: str) -> grpc.Channel:
        tls = grpc.ssl_channel_credentials(
            trusted.root.read_bytes(),
            None if shown is None else shown.key.read_bytes(),
            None if shown is None else shown.certificate.read_bytes(),
        )
        return grpc.secure_channel(
            address, grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token))
        )
