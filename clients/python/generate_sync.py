"""Generates the synchronous client from the asynchronous one, which is its only source.

    python clients/python/generate_sync.py [--check]

unasync removes `async` and `await` and replaces NAMES; PHRASES are what else differs. What threads and tasks do
differently is written by hand, in patchclamp/threads.py and patchclamp/tasks.py.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from unasync import Rule, unasync_files

PACKAGE = Path(__file__).parent / "patchclamp"

# asynchronous module → synchronous module
MODULES = {
    "aio.py": "client.py",
    "async_streams.py": "streams.py",
    "async_stubs.py": "stubs.py",
    "async_transport.py": "transport.py",
}

# Tokens of the code.
NAMES = {
    "AsyncCall": "Call",
    "AsyncCancellation": "Cancellation",
    "AsyncClient": "Client",
    "AsyncEndingCall": "EndingCall",
    "AsyncGenerateStream": "GenerateStream",
    "AsyncLink": "Link",
    "AsyncOutbox": "Outbox",
    "AsyncReader": "Reader",
    "AsyncRepeatedCall": "RepeatedCall",
    "AsyncSession": "Session",
    "AsyncStream": "Stream",
    "AsyncStubs": "Stubs",
    "AsyncTransport": "Transport",
    "AsyncUnaryMethod": "UnaryMethod",
    "AioRpcError": "RpcError",
    "aiter": "iter",
    "anext": "next",
    "async_streams": "streams",
    "async_stubs": "stubs",
    "async_transport": "transport",
    # The only function that is used of it is `sleep`.
    "asyncio": "time",
    "tasks": "threads",
}

# Text of a module, which must be found in it.
PHRASES: Mapping[str, Mapping[str, str]] = {
    "aio.py": {
        "The asynchronous client. client.py, the synchronous one, is generated from it.": (
            "The synchronous client: the methods of the asynchronous one, without `await`."
        ),
        """\
    A client may be made before an event loop runs; whatever calls the server needs one. Calls that stream are iterated,
    not awaited; `close` and `aclose` are awaited.
""": """\
    A client is thread-safe.
""",
    },
    "async_streams.py": {
        "Streams of the asynchronous client. A stream that is closed early, or whose task is cancelled,": (
            "Streams of the synchronous client. A stream that is closed early"
        ),
    },
    "async_stubs.py": {
        "of the asynchronous client": "of the synchronous client",
        "grpc.aio.": "grpc.",
        # A channel of an event loop can wait for its calls to end.
        ".close(None)": ".close()",
    },
    "async_transport.py": {
        "the asynchronous client": "the synchronous client",
        "AsyncClient": "Client",
        "grpc.aio.": "grpc.",
        """\
            async for message in messages:
                yield message
""": """\
            yield from messages
""",
        # contextlib.aclosing knows what is closed by this name.
        "    aclose = close\n\n": "",
    },
}


def synchronous(module: str) -> str:
    """Returns the synchronous twin of an asynchronous module of the client, formatted."""
    source = (PACKAGE / module).read_text()
    for phrase, replacement in PHRASES[module].items():
        if phrase not in source:
            raise SystemExit(f"{module} has no longer the words that {Path(__file__).name} replaces: {phrase!r}")
        source = source.replace(phrase, replacement)
    with TemporaryDirectory() as directory:
        before, after = Path(directory, "before.py"), Path(directory, "after.py")
        before.write_text(source)
        unasync_files([str(before)], [Rule(str(before), str(after), NAMES)])
        source = after.read_text()
    target = MODULES[module]
    header = f"# Generated from {module} by clients/python/{Path(__file__).name}; change {module}.\n"
    # Names that only the asynchronous module needs are imported no more, and the others stand in their order.
    source = _ruff(["check", "--quiet", "--fix", "--select", "F401,I"], target, header + source)
    return _ruff(["format", "--quiet"], target, source)


def _ruff(command: list[str], target: str, source: str) -> str:
    """Returns the source as ruff leaves it by the rules of this repository."""
    ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(PACKAGE / target), "-"]
    return subprocess.run(ruff, input=source, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="Generates the synchronous client from the asynchronous one.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a generated module differs")
    arguments = parser.parse_args()
    stale = []
    for module, target in MODULES.items():
        generated = synchronous(module)
        if arguments.check:
            if (PACKAGE / target).read_text() != generated:
                stale.append(f"clients/python/patchclamp/{target} is not what {module} generates: run make generated")
        else:
            (PACKAGE / target).write_text(generated)
    if stale:
        print("\n".join(stale), file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
