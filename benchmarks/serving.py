"""A server in a process of its own, seen from outside: its address, metrics, health, memory and end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.request import urlopen

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVE = (sys.executable, "-m", "patchclamp", "serve")
PATIENCE_SECONDS = 60.0
# What a server holds while it answers: all of it must be given back.
HELD = ("patchclamp_sequences_running", "patchclamp_queue_waiting", "patchclamp_program_rows")


class ServerProcess:
    """Use as a context manager: serves from its beginning, and is killed at its end if it still runs.

    `shows_log`: on our standard error, and not kept for `log`.
    """

    def __init__(
        self,
        model: str,
        artifacts: Path,
        *options: str,
        command: Sequence[str] = SERVE,
        environment: Mapping[str, str] | None = None,
        shows_log: bool = False,
    ) -> None:
        self.artifacts = artifacts
        addresses = ("--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--json")
        self._arguments = [*command, f"--model={model}", f"--artifacts-url={artifacts}", *addresses, *options]
        self._environment = {**os.environ, **(environment or {})}
        self._shows_log = shows_log

    def start(self) -> None:
        """Starts the process, and does not wait for it."""
        self._log: IO[str] | None = None
        if not self._shows_log:
            self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            self._arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environment,
        )

    def __enter__(self) -> "ServerProcess":
        if not hasattr(self, "process"):
            self.start()
        assert self.process.stdout is not None
        # One line, or the end of the stream when it could not start.
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the server ended with status {self.process.wait()}:\n{self.log()}")
        # What it says once it serves.
        self.started: dict[str, Any] = json.loads(line)
        self.address: str = self.started["address"]
        self._metrics_port: int = self.started["metrics_port"]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self._log is not None:
            self._log.close()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status; raises TimeoutExpired."""
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """As `kill -9`."""
        self.signal(signal.SIGKILL)
        self.wait()

    def metrics(self) -> dict[str, float]:
        """By name, with labels as in the text format."""
        with urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=PATIENCE_SECONDS) as response:
            lines = response.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def held(self) -> dict[str, float]:
        """What has not been given back: sequences, table rows, KV blocks, calls in flight. Zero at rest."""
        metrics = self.metrics()
        held = {name: metrics[name] for name in HELD}
        held["kv_blocks"] = metrics["patchclamp_kv_blocks"] - metrics["patchclamp_kv_blocks_free"]
        in_flight = [v for name, v in metrics.items() if name.startswith("patchclamp_requests_in_flight{")]
        held["calls"] = sum(in_flight)
        return held

    def is_serving(self) -> bool:
        with grpc.insecure_channel(self.address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS, wait_for_ready=True
            )
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(*options: str) -> Iterator[ServerProcess]:
    """A server of the embedded model unless told otherwise, with an empty artifact store of its own.

    Ends it by SIGTERM. Raises SystemExit when it does not start, or does not end with status 0.
    """
    with (
        tempfile.TemporaryDirectory(prefix="patchclamp-") as artifacts,
        ServerProcess("embedded", Path(artifacts), *options, shows_log=True) as server,
    ):
        yield server
        server.signal(signal.SIGTERM)
        try:
            status = server.wait()
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the server did not drain within {PATIENCE_SECONDS:.0f} s") from None
        if status != 0:
            raise SystemExit(f"the server ended with status {status}")


def at_rest(server: ServerProcess) -> dict[str, float]:
    """What the server still holds once nothing more is given back, or after a while."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any((held := server.held()).values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return {name: value for name, value in held.items() if value}
