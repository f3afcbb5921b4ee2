"""How long calls take, how long a small call waits beside them, and how long the server goes on after them."""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import grpc
from serving import PATIENCE_SECONDS, ServerProcess

from patchclamp.v1 import generation_pb2, model_pb2, model_pb2_grpc

# A call of the fuzzer has a deadline of 3 s. On a machine that others use too it may be told late that it is over; one
# that takes ten times as long has kept a thread, or the event loop, to itself.
WORST_SECONDS = 30.0
PROBE_EVERY_SECONDS = 0.2
# Share of a core below which a server has nothing to do.
IDLE = 0.2


class Probe:
    """Asks for the tokens of a word again and again, as a context. `worst`: the longest that it waited, in seconds."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.worst = 0.0

    def __enter__(self) -> "Probe":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        request = model_pb2.TokenizeRequest(prompt=generation_pb2.Prompt(tokens={"ids": [5]}))
        with grpc.insecure_channel(self._server.address) as channel:
            stub = model_pb2_grpc.ModelServiceStub(channel)
            while not self._over.wait(PROBE_EVERY_SECONDS):
                begun = time.monotonic()
                # One that is full, or has ended, is found by others; how long it took to say so counts here.
                with suppress(grpc.RpcError):
                    stub.Tokenize(request, timeout=2 * WORST_SECONDS)
                self.worst = max(self.worst, time.monotonic() - begun)


def percentile(seconds: Sequence[float], share: float) -> float:
    """The smallest of them that this share is not above; 0 of none."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def seconds_to_idle(server: ServerProcess) -> float:
    """Until the server computes nothing any more, all its calls having ended; at most PATIENCE_SECONDS."""
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE_SECONDS:
        before = _cpu_seconds(server)
        time.sleep(0.5)
        if _cpu_seconds(server) - before < IDLE * 0.5:
            break
    return time.monotonic() - begun


def _cpu_seconds(server: ServerProcess) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
