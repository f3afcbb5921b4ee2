"""A worker as a process: asked by a line, answered by a line, its memory read from outside."""

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

WORKERS = Path(__file__).parent / "workers"
# A prompt of 8,000 tokens takes the slowest of them some minutes.
PATIENCE_SECONDS = 900.0
KIB = 1024


class PeerError(Exception):
    """What a peer's library raised, or how its process ended."""


class CannotError(Exception):
    """The peer has no way to do that."""


class Worker:
    """Use as a context manager: the process starts at its beginning, and is killed at its end."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._command, self._environment = list(command), dict(environment)
        self._patience = patience_seconds

    def __enter__(self) -> "Worker":
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        # The end of its output.
        self._answers.put("")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout, self._log):
            assert stream is not None
            # What was written to a process that had died is lost.
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Raises CannotError where the worker says so, PeerError for what it raised, for its end and when it does not
        answer in time, which ends it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise PeerError(self._how_it_ended()) from None
        try:
            line = self._answers.get(timeout=self._patience)
        except queue.Empty:
            self.process.kill()
            raise PeerError(f"no answer to {do!r} within {self._patience:.0f} s") from None
        if not line:
            raise PeerError(self._how_it_ended())
        answer: dict[str, Any] = json.loads(line)
        if "cannot" in answer:
            raise CannotError(answer["cannot"])
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["ok"]

    def _how_it_ended(self) -> str:
        status = self.process.wait(self._patience)
        self._log.seek(0)
        said = self._log.read().strip().splitlines()[-3:]
        return f"the worker ended with status {status}: {' / '.join(said)}"

    def cpu_seconds(self) -> float:
        """Of all its threads since it started."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            raise PeerError(self._how_it_ended()) from None
        # utime and stime of proc(5).
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        return self._status("VmRSS")

    def forget_peak(self) -> None:
        """Lets the peak of resident memory begin anew (proc(5), clear_refs)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            return next(KIB * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
        except (FileNotFoundError, StopIteration):
            raise PeerError(self._how_it_ended()) from None


def environment(threads: int, waits: str | None = "passive") -> dict[str, str]:
    """So many threads, and nothing is fetched. `waits`: OMP_WAIT_POLICY; None leaves it to the peer's libraries."""
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return inherited | settings | ({"OMP_WAIT_POLICY": waits} if waits else {})
