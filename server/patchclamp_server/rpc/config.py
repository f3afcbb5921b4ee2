"""What an operator can choose. Everything has a default; the command line wins over PATCHCLAMP_* variables."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from patchclamp_server.engine.config import EngineConfig

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_METRICS_ADDRESS = "127.0.0.1:9464"
DEFAULT_MAX_MESSAGE_BYTES = 4 * 1024 * 1024
DEFAULT_DRAIN_SECONDS = 30.0
DEFAULT_MAX_CALLS = 4096
DEFAULT_MAX_UPLOAD_BYTES = 256 * 1024 * 1024
DEFAULT_MAX_CONCURRENT_UPLOAD_BYTES = 1024 * 1024 * 1024
DEFAULT_UPLOAD_IDLE_SECONDS = 30.0
DEFAULT_STEP_TIMEOUT_SECONDS = 300.0
DEFAULT_WATCH_POLL_SECONDS = 5.0


def default_artifacts_url() -> str:
    """patchclamp/artifacts below the XDG data home."""
    data_home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(data_home) / "patchclamp" / "artifacts")


class WatchAtStart(NamedTuple):
    """A watch that runs from the start: its name, the id or tag of the artifact, and of a reference or ""."""

    name: str
    watch: str
    reference: str = ""


@dataclass(frozen=True)
class ServerConfig:
    """`model`: "embedded", a hub id, a local directory or a .gguf file. Addresses are host:port; port 0 takes a free
    one. `artifacts_url`: a directory or any fsspec URL. `max_message_bytes` bounds what a client may send at once.
    """

    model: str = "embedded"
    address: str = DEFAULT_ADDRESS
    metrics_address: str = DEFAULT_METRICS_ADDRESS
    # Where health alone is served, without TLS and tokens; nowhere when empty.
    health_address: str = ""
    artifacts_url: str = field(default_factory=default_artifacts_url)
    dtype: str = "float32"
    device: str = "cpu"
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    # Calls that are answered at once, streams and sessions included.
    max_calls: int = DEFAULT_MAX_CALLS
    # Of one artifact, and of all that are arriving.
    max_upload_bytes: int = DEFAULT_MAX_UPLOAD_BYTES
    max_concurrent_upload_bytes: int = DEFAULT_MAX_CONCURRENT_UPLOAD_BYTES
    # The longest wait for the next chunk of an upload.
    upload_idle_seconds: float = DEFAULT_UPLOAD_IDLE_SECONDS
    # Paths; see the section Security of the README.
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    tokens: str | None = None
    policy: str | None = None
    audit_log: str | None = None
    # Record the text of prompts too.
    audit_prompts: bool = False
    # Serve /metrics with the certificate of the gRPC port.
    metrics_tls: bool = False
    # How often the files above are looked at.
    reload_seconds: float = 1.0
    # How long running work may go on after SIGTERM.
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    # Health says NOT_SERVING while a step has run for longer; 0 watches none.
    step_timeout_seconds: float = DEFAULT_STEP_TIMEOUT_SECONDS
    # "off" or "otlp". Empty endpoint: that of OTEL_EXPORTER_OTLP_ENDPOINT, else http://localhost:4317.
    tracing: str = "off"
    otlp_endpoint: str = ""
    watches: tuple[WatchAtStart, ...] = ()
    # How often the artifact store is looked at for watches that were started or stopped on another server.
    watch_poll_seconds: float = DEFAULT_WATCH_POLL_SECONDS
    engine: EngineConfig = field(default_factory=EngineConfig)
