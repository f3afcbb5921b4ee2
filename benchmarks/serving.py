"""A `patchclamp serve` process for as long as a `with` block lasts."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

DRAIN_SECONDS = METRICS_SECONDS = 60.0


@dataclass(frozen=True)
class Serving:
    address: str
    metrics_port: int
    process_id: int

    def metrics(self) -> dict[str, float]:
        return metrics_of(self.metrics_port)

    def rss_bytes(self) -> int:
        return rss_bytes_of(self.process_id)


def metrics_of(port: int) -> dict[str, float]:
    """By name, with labels as in the text format."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=METRICS_SECONDS) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def rss_bytes_of(process_id: int) -> int:
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running_server(*arguments: str) -> Iterator[str]:
    """The address of a server of the embedded model; as `serving` in all else."""
    with serving(*arguments) as server:
        yield server.address


@contextmanager
def serving(*arguments: str) -> Iterator[Serving]:
    """A server of the embedded model unless told otherwise, on free ports, with an empty artifact store of its own.

    Its log and its progress go to our standard error. Ends it by SIGTERM. Raises SystemExit when it does not start, or
    does not end with status 0.
    """
    with tempfile.TemporaryDirectory(prefix="patchclamp-") as artifacts:
        options = ["--json", "--model=embedded", "--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "patchclamp", "serve", *options, f"--artifacts-url={artifacts}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            # Address and port of the metrics, or the end of the stream when it could not start.
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start (exit status {process.wait(DRAIN_SECONDS)})")
            ready = json.loads(line)
            yield Serving(ready["address"], ready["metrics_port"], process.pid)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise SystemExit(f"the server did not drain within {DRAIN_SECONDS:.0f} s") from None
        if status != 0:
            raise SystemExit(f"the server ended with status {status}")
