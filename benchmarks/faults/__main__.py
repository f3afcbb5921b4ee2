"""The fault matrix: what breaks, what its client sees, and what was lost by it, which must be nothing.

    python benchmarks/faults           the embedded model; saves results/faults.json
    python benchmarks/faults --tiny    a tiny random model, as in the tests

Every row is done to a real server process. Each prints what was sent, what the client saw, and what was lost: tokens of
requests that had no part in it, artifacts that had been acknowledged, KV blocks, table rows and calls that are still
held. The last line is a JSON object; the exit status is 1 when something was lost or a client saw another status.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import grpc

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]
from measure import save
from serving import SERVE, ServerProcess

from faults import rows
from faults.clients import Client
from faults.credentials import Secrets
from faults.rows import Matrix

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_server.py")))
FAILED_STEPS = 3
# A loaded machine may need longer than the default for what runs.
DRAIN = "--drain-seconds=300"
DISK_BYTES = 512 * 1024
# A disk of its own for the server alone, which needs no right but to a user namespace.
OWN_DISK = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"', "sh")
# Where there is none: no file may be larger.
FILE_BLOCKS = 4
FILE_LIMIT = ("sh", "-c", 'ulimit -f "$1" && shift 2 && exec "$@"', "sh")


class Servers:
    """Starts the servers that rows need."""

    def __init__(self, model: str, directory: Path) -> None:
        self.artifacts = directory / "artifacts"
        self.disk = directory / "disk"
        self.disk.mkdir()
        self.secrets = directory / "secrets"
        self._model = model

    def process(self, command: Sequence[str] = SERVE, *options: str, artifacts: Path | None = None) -> ServerProcess:
        return ServerProcess(self._model, artifacts or self.artifacts, *options, command=command)

    def small_disk(self) -> tuple[tuple[str, ...], str]:
        """What comes before a command whose server has little room below `disk`, and what that room is."""
        mount = (*OWN_DISK, str(DISK_BYTES), str(self.disk))
        if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode == 0:
            return mount, f"a tmpfs of {DISK_BYTES} bytes"
        return (*FILE_LIMIT, str(FILE_BLOCKS), str(self.disk)), f"files of at most {FILE_BLOCKS * 512} bytes"


@contextmanager
def client_of(process: ServerProcess) -> Iterator[tuple[ServerProcess, Client]]:
    with process as server, grpc.insecure_channel(server.address) as channel:
        yield server, Client(channel)


def run(matrix: Matrix, servers: Servers, *, tiny: bool) -> None:
    """All rows. Some end their server; the next one then starts on the same artifacts."""
    small, room = servers.small_disk()
    on_small_disk = servers.disk / "artifacts"
    # It has artifacts of its own and can start meanwhile.
    full = servers.process((*small, *FAULTY), f"--max-failed-steps={FAILED_STEPS}", artifacts=on_small_disk)
    full.start()
    secrets = Secrets(servers.secrets)
    secured = servers.process(SERVE, *secrets.options)
    secured.start()
    with client_of(servers.process(FAULTY)) as (server, client):
        matrix.learn(client)
        for row in (rows.cancel, rows.deadline, rows.disconnect, rows.slow_reader):
            row(matrix, server, client)
        rows.step_fault(matrix, server, client, "a step fails", signal.SIGRTMIN, "INTERNAL")
        rows.step_fault(matrix, server, client, "out of memory", signal.SIGRTMIN + 1, rows.RETRY)
        look = rows.kill_during_uploads(matrix, server, client)
    with client_of(servers.process()) as (server, client):
        look(client)
        look = rows.kill_during_calibration(matrix, server, client)
    rows.spoil(servers.artifacts, spoiled := matrix.finished[0])
    with client_of(servers.process(SERVE, DRAIN)) as (server, client):
        rows.corrupted(matrix, server, client, spoiled)
        look(client)
        rows.drain(matrix, server, client)
    with client_of(full) as (server, client):
        root = Path(f"/proc/{server.process.pid}/root") / str(on_small_disk).lstrip("/")
        rows.disk_full(matrix, server, client, root, room)
        rows.fatal(matrix, server, client, "every step fails", signal.SIGRTMIN + 2, FAILED_STEPS)
    with secured as server, secrets.good(server.address) as channel:
        rows.bad_certificate(matrix, server, Client(channel), secrets)
        rows.expired_token(matrix, server, Client(channel), secrets)
    if not tiny:
        with client_of(servers.process(FAULTY)) as (server, client):
            rows.fatal(matrix, server, client, "the device is lost", signal.SIGRTMIN + 3, 1)
        with client_of(servers.process()) as (server, client):
            rows.second_signal(matrix, server, client)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model; saves nothing")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="patchclamp-faults-") as name:
        directory = Path(name)
        if arguments.tiny:
            from tiny_llama import save_tiny_llama

            save_tiny_llama(directory / "model")
            matrix, model = Matrix(tokens=64, width=32, layers=2), str(directory / "model")
        else:
            matrix, model = Matrix(tokens=128, width=576, layers=30), "embedded"
        run(matrix, Servers(model, directory), tiny=arguments.tiny)
    lost = sum(not row.lost_nothing for row in matrix.rows)
    unexpected = sum(row.seen != row.expected for row in matrix.rows)
    result = {
        "faults": len(matrix.rows),
        "lost": lost,
        "unexpected": unexpected,
        "artifacts": len(matrix.finished),
        "seconds": round(time.monotonic() - started, 1),
    }
    if not arguments.tiny:
        save("faults", {**result, "rows": [asdict(row) for row in matrix.rows]})
    print(json.dumps(result))
    return int(bool(lost or unexpected))


if __name__ == "__main__":
    sys.exit(main())
