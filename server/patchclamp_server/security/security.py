"""Security holds everything that an operator has configured of it, and keeps it up to date with its files."""

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from patchclamp_server.addresses import Address
from patchclamp_server.security.audit import AuditLog
from patchclamp_server.security.configuration import ConfigurationError, SecurityConfig
from patchclamp_server.security.metrics import SecurityMetrics
from patchclamp_server.security.policy import Policy
from patchclamp_server.security.policy_file import parse_policy
from patchclamp_server.security.tenants import Tenants
from patchclamp_server.security.tls_files import TlsFiles, TlsMaterial
from patchclamp_server.security.tokens import TokenTable, parse_tokens
from patchclamp_server.security.watched_file import WatchedFile, read_text

log = logging.getLogger(__name__)


class Security:
    """A part that is not configured is None. `methods` are all "Service/Method" that are served."""

    def __init__(self, config: SecurityConfig, metrics: SecurityMetrics, methods: Collection[str]) -> None:
        """Raises ConfigurationError for files that cannot be used."""
        reloads = metrics.config_reloads
        self.metrics = metrics
        self.audit_prompts = config.audit_prompts
        self._reload_seconds = config.reload_seconds
        self.tls: WatchedFile[TlsMaterial] | None = None
        self.tokens: WatchedFile[TokenTable] | None = None
        self._policy: WatchedFile[Policy] | None = None
        self.tls_files = _tls_files(config)
        if self.tls_files is not None:
            self.tls = WatchedFile("tls", self.tls_files.paths, self.tls_files.read, reloads)
        if config.tokens:
            tokens = Path(config.tokens)
            self.tokens = WatchedFile(
                "tokens", (tokens,), lambda: parse_tokens(read_text(tokens), str(tokens)), reloads
            )
        if config.policy:
            policy = Path(config.policy)
            self._policy = WatchedFile(
                "policy", (policy,), lambda: parse_policy(read_text(policy), str(policy), methods), reloads
            )
        self.tenants = Tenants(Policy() if self._policy is None else self._policy.value)
        self.audit = AuditLog(Path(config.audit_log), metrics.audit_lost.inc) if config.audit_log else None
        # Called for whoever serves the certificate outside of gRPC; gRPC reads `tls` itself.
        self.on_new_certificate: Callable[[], None] = lambda: None
        if config.metrics_tls and self.tls is None:
            raise ConfigurationError("--metrics-tls needs --tls-certificate and --tls-key")

    @property
    def is_configured(self) -> bool:
        """Whether calls have to be checked at all."""
        parts = (self.tls, self.tokens, self._policy, self.audit)
        return any(part is not None for part in parts)

    @property
    def names_by_certificate(self) -> bool:
        """Whether the client's certificate says who calls."""
        return self.tokens is None and self.tls is not None and self.tls.value.client_ca is not None

    async def watch(self) -> None:
        """Reads files again when they change, until it is cancelled."""
        files = [file for file in (self.tls, self.tokens, self._policy) if file is not None]
        # It has a thread of its own, because the kill switch must not wait for the work of calls.
        reader = ThreadPoolExecutor(1, "patchclamp-files")
        loop = asyncio.get_running_loop()
        while files:
            await asyncio.sleep(self._reload_seconds)
            for file in files:
                if not await loop.run_in_executor(reader, file.poll):
                    continue
                if file is self._policy:
                    self.tenants.apply(self._policy.value)
                elif file is self.tls:
                    self.on_new_certificate()

    def close(self) -> None:
        """Returns when the audit log is written."""
        if self.audit is not None:
            self.audit.close()

    def warn_if_open(self, address: Address) -> None:
        """Logs a warning where anybody on the network of `address` could call the server or read what passes."""
        if address.is_loopback:
            return
        if self.tls is None and self.tokens is None:
            log.warning("%s is open to the network: no TLS, and anybody may call (see --tokens)", address)
        elif self.tls is None:
            log.warning("%s is open to the network without TLS: tokens and prompts can be read on their way", address)
        elif self.tokens is None and not self.names_by_certificate:
            log.warning("%s is open to the network and anybody may call (see --tokens and --tls-client-ca)", address)


def _tls_files(config: SecurityConfig) -> TlsFiles | None:
    if not config.tls_certificate and not config.tls_key:
        if config.tls_client_ca:
            raise ConfigurationError("--tls-client-ca needs --tls-certificate and --tls-key")
        return None
    if not config.tls_certificate or not config.tls_key:
        raise ConfigurationError("--tls-certificate and --tls-key belong together")
    client_ca = Path(config.tls_client_ca) if config.tls_client_ca else None
    return TlsFiles(Path(config.tls_certificate), Path(config.tls_key), client_ca)
