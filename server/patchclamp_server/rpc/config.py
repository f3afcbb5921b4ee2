"""An operator can choose these. Everything has a default; the command line wins over PATCHCLAMP_* variables."""

import os
from dataclasses import dataclass, field
from errno import ENOENT
from pathlib import Path
from typing import NamedTuple

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.security.configuration import SecurityConfig

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_METRICS_ADDRESS = "127.0.0.1:9464"
DEFAULT_MAX_MESSAGE_BYTES = 4 * 1024 * 1024
DEFAULT_DRAIN_SECONDS = 30.0
DEFAULT_MAX_CALLS = 4096
DEFAULT_MAX_UPLOAD_BYTES = 256 * 1024 * 1024
DEFAULT_MAX_CONCURRENT_UPLOAD_BYTES = 1024 * 1024 * 1024
DEFAULT_MAX_AUTOENCODER_BYTES = 64 * 1024 * 1024 * 1024
DEFAULT_UPLOAD_IDLE_SECONDS = 30.0
DEFAULT_STEP_TIMEOUT_SECONDS = 300.0
DEFAULT_WATCH_POLL_SECONDS = 5.0


def default_artifacts_url() -> str:
    """Returns patchclamp/artifacts below the XDG data home. Raises OSError where that is not known."""
    try:
        data_home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    except RuntimeError as error:
        raise FileNotFoundError(ENOENT, "this user has no home directory, and --artifacts-url names none") from error
    return str(Path(data_home) / "patchclamp" / "artifacts")


class WatchAtStart(NamedTuple):
    """A watch that runs from the start: its name, the id or tag of the artifact, and that of a reference or ""."""

    name: str
    watch: str
    reference: str = ""


@dataclass(frozen=True)
class ServerConfig(SecurityConfig):
    """`model` is "embedded", a hub id, a local directory or a .gguf file. Addresses are host:port; port 0 takes a free
    one. `artifacts_url` is a directory or any fsspec URL. `max_message_bytes` bounds what a client may send at once."""

    model: str = "embedded"
    address: str = DEFAULT_ADDRESS
    metrics_address: str = DEFAULT_METRICS_ADDRESS
    # Health alone is served here, without TLS and tokens; nowhere when this is empty.
    health_address: str = ""
    # OpenAI's API and JSON for every RPC are served here over HTTP; nowhere when this is empty.
    http: str = ""
    # Origins of pages that may call it, besides its own.
    http_allow_origins: tuple[str, ...] = ()
    artifacts_url: str = field(default_factory=default_artifacts_url)
    dtype: str = "float32"
    device: str = "cpu"
    # The scheme by which dense weights are quantised when they load, or "".
    quantize: str = ""
    # What products take: "float32" is as dtype has it, "int8" is rounded.
    activations: str = "float32"
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    # So many calls are answered at once, streams and sessions included.
    max_calls: int = DEFAULT_MAX_CALLS
    # These bound one artifact, and all that are arriving.
    max_upload_bytes: int = DEFAULT_MAX_UPLOAD_BYTES
    max_concurrent_upload_bytes: int = DEFAULT_MAX_CONCURRENT_UPLOAD_BYTES
    # Autoencoders are never whole in memory: these bytes of disk bound one, and all that are arriving.
    max_autoencoder_bytes: int = DEFAULT_MAX_AUTOENCODER_BYTES
    # This is the longest wait for the next chunk of an upload.
    upload_idle_seconds: float = DEFAULT_UPLOAD_IDLE_SECONDS
    # Running work may go on for so long after SIGTERM.
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    # Health says NOT_SERVING while a step has run for longer; 0 watches none.
    step_timeout_seconds: float = DEFAULT_STEP_TIMEOUT_SECONDS
    # Tracing is "off" or "otlp". An empty endpoint means OTEL_EXPORTER_OTLP_ENDPOINT, else http://localhost:4317.
    tracing: str = "off"
    otlp_endpoint: str = ""
    watches: tuple[WatchAtStart, ...] = ()
    # The artifact store is checked so often for watches that were started or stopped on another server.
    watch_poll_seconds: float = DEFAULT_WATCH_POLL_SECONDS
    # Names and paths of checkpoints that neurons may be matched with; each is loaded for the job alone.
    match_models: tuple[tuple[str, str], ...] = ()
    engine: EngineConfig = field(default_factory=EngineConfig)
    # Bytes that all of the server may take on its device; None bounds it by what is available.
    memory: int | None = None
    # Whether engine.kv_cache_tokens was asked for. Otherwise the cache is as large as memory allows.
    kv_cache_tokens_given: bool = False
