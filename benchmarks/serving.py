"""A `patchclamp serve` process for as long as a `with` block lasts."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

DRAIN_SECONDS = 60.0


@contextmanager
def running_server(*arguments: str) -> Iterator[str]:
    """The address of a server of the embedded model, on free ports, with an empty artifact store of its own.

    Its log and its progress go to our standard error. Ends it by SIGTERM. Raises SystemExit when it does not start, or
    does not end with status 0.
    """
    with tempfile.TemporaryDirectory(prefix="patchclamp-") as artifacts:
        options = ["--model=embedded", "--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "patchclamp", "serve", *options, f"--artifacts-url={artifacts}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            # "serving on HOST:PORT, metrics on port N", or the end of the stream when it could not start.
            line = process.stdout.readline()
            if not line.startswith("serving on "):
                raise SystemExit(f"the server did not start (exit status {process.wait(DRAIN_SECONDS)})")
            yield line.removeprefix("serving on ").partition(",")[0]
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
