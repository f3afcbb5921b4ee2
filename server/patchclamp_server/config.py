"""What an operator can choose. Everything has a default; the command line wins over PATCHCLAMP_* variables."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from patchclamp_server.engine.config import EngineConfig

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_METRICS_ADDRESS = "127.0.0.1:9464"
DEFAULT_MAX_MESSAGE_BYTES = 4 * 1024 * 1024
DEFAULT_DRAIN_SECONDS = 30.0


def default_artifacts_url() -> str:
    """patchclamp/artifacts below the XDG data home."""
    data_home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(data_home) / "patchclamp" / "artifacts")


@dataclass(frozen=True)
class ServerConfig:
    """`model`: "embedded", a hub id, a local directory or a .gguf file. Addresses are host:port; port 0 takes a free
    one. `artifacts_url`: a directory or any fsspec URL. `max_message_bytes` bounds what a client may send at once.
    """

    model: str = "embedded"
    address: str = DEFAULT_ADDRESS
    metrics_address: str = DEFAULT_METRICS_ADDRESS
    artifacts_url: str = field(default_factory=default_artifacts_url)
    dtype: str = "float32"
    device: str = "cpu"
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    # How long running work may go on after SIGTERM.
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    engine: EngineConfig = field(default_factory=EngineConfig)
