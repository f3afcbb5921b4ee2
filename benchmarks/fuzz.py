"""Random and mutated calls of every RPC against a server of a tiny random model, through a real channel.

    python benchmarks/fuzz.py --requests 10000 --seed 0

A call is right with one to four of its fields changed, or right as it is, or bytes that are no message, or of a method
that does not exist, cut short, cancelled, or of a stream where one message is expected. Every call must end with a
status of a closed set; afterwards the server must be alive and SERVING, hold nothing, and have grown by little. Calls
that end otherwise are printed as text. The last line is a JSON object; the exit status is 1 when anything was found.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / p) for p in ("tests", "tests/rpc"))]
from random_requests import corrupted, mutated
from seed_requests import calls, preparation
from serving import ServerProcess, at_rest
from tiny_llama import save_tiny_llama

from patchclamp_server.rpc.server import SERVICES

CODES = grpc.StatusCode
DECLARED = frozenset(
    {
        CODES.OK,
        CODES.INVALID_ARGUMENT,
        CODES.NOT_FOUND,
        CODES.FAILED_PRECONDITION,
        CODES.RESOURCE_EXHAUSTED,
        CODES.ABORTED,
        CODES.CANCELLED,
        CODES.DEADLINE_EXCEEDED,
    }
)
# Of what the fuzzer does to a call, and how often.
KINDS = {"mutated": 70, "right": 6, "bytes": 8, "unknown method": 3, "cut short": 5, "cancelled": 5, "arity": 3}
CLIENTS = 8
# A call that has not ended by then is ended by its deadline; jobs may be asked for much.
DEADLINE_SECONDS = 3.0
BRIEF_SECONDS = 0.01
# Calls that the growth of memory is not measured over: caches fill, pools of threads and allocators reach their size.
WARM_UP = 0.3
MOST_GROWTH = 1.5
METADATA = (
    (),
    (("traceparent", "00-" + "f" * 32 + "-" + "0" * 16 + "-zz"),),
    (("authorization", "Bearer nobody"),),
    (("x-bytes-bin", b"\xff\0"),),
)


@dataclass(frozen=True)
class Method:
    """A method of a service as its descriptor says."""

    path: str
    request: type[Message] | None
    streams: bool


@dataclass
class Case:
    """One call. `messages` as they are sent."""

    kind: str
    method: Method
    messages: Sequence[Message | bytes]
    streams: bool
    # Responses after which the client leaves; None stays to the end.
    leaves_after: int | None = None
    deadline: float = DEADLINE_SECONDS
    metadata: Any = ()


@dataclass
class Found:
    codes: Counter[str] = field(default_factory=Counter)
    by_method: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def methods() -> dict[str, Method]:
    """Every method of every service that the server has, by its full name."""
    pool = descriptor_pool.Default()
    found = {}
    for service in SERVICES:
        for method in pool.FindServiceByName(service).methods:
            name = f"{service}/{method.name}"
            found[name] = Method(f"/{name}", GetMessageClass(method.input_type), method.client_streaming)
    return found


def cases(seed: int, n: int) -> Iterator[Case]:
    """The same for the same seed, whatever the server answers."""
    random = Random(seed)
    right, known = calls(), methods()
    names = sorted(known)
    for _ in range(n):
        kind = random.choices(list(KINDS), list(KINDS.values()))[0]
        name = random.choice(names)
        method = known[name]
        messages: list[Any] = list(random.choice(right[name]))
        case = Case(kind, method, messages, method.streams, metadata=random.choice(METADATA))
        if kind == "mutated":
            index = random.randrange(len(messages))
            messages[index] = mutated(random, messages[index], most=4)
        elif kind == "bytes":
            index = random.randrange(len(messages))
            messages[index] = corrupted(random, messages[index].SerializeToString())
        elif kind == "unknown method":
            wrong = random.choice((name.lower(), name + "s", "patchclamp.v1.Nothing/Do", "Generate", "/", "é"))
            case.method = Method("/" + wrong, None, method.streams)
        elif kind == "cut short":
            case.messages = messages[: random.randrange(len(messages))] if method.streams else messages
            if random.randint(0, 1):
                case.messages = random.sample(messages, len(messages))
            if not method.streams:
                case.deadline = BRIEF_SECONDS
        elif kind == "cancelled":
            case.leaves_after = random.randint(0, 3)
        elif kind == "arity":
            case.streams = True
            case.messages = random.choice(([], messages * 2))
        yield case


def status_of(channel: grpc.Channel, case: Case) -> tuple[CODES, str]:
    """Makes the call; its code and message. The answer is read as bytes: what is in it is others' to test."""
    requests = [m if isinstance(m, bytes) else m.SerializeToString() for m in case.messages]
    path = case.method.path
    options = {"timeout": case.deadline, "metadata": case.metadata}
    call = (
        channel.stream_stream(path)(iter(requests), **options)
        if case.streams
        else channel.unary_stream(path)(requests[0], **options)
    )
    try:
        for received, _ in enumerate(call, start=1):
            if case.leaves_after is not None and received > case.leaves_after:
                break
    except grpc.RpcError:
        pass
    if case.leaves_after is not None:
        call.cancel()
    return call.code(), call.details()


def allowed(case: Case) -> frozenset[CODES]:
    if case.kind == "unknown method":
        return frozenset({CODES.UNIMPLEMENTED})
    return DECLARED


def as_text(case: Case, code: CODES, detail: str) -> str:
    lines = [f"# {case.kind}: {case.method.path} ended with {code.name} ({detail})"]
    for message in case.messages:
        lines.append(repr(message) if isinstance(message, bytes) else text_format.MessageToString(message))
    return "\n".join(lines)


class Fuzzer:
    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._found = Found()
        self._lock = threading.Lock()

    def run(self, everything: Sequence[Case]) -> Found:
        # One channel a client: what breaks a connection must not stop the others.
        shares = [everything[i::CLIENTS] for i in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(self._run, share) for share in shares]:
                done.result()
        return self._found

    def _run(self, share: Sequence[Case]) -> None:
        with grpc.insecure_channel(self._server.address) as channel:
            for case in share:
                code, detail = status_of(channel, case)
                with self._lock:
                    self._found.codes[code.name] += 1
                    self._found.by_method[case.method.path] += 1
                    if code not in allowed(case):
                        self._found.failures.append(as_text(case, code, detail))


def fuzz(requests: int, seed: int) -> dict[str, Any]:
    """Runs the calls, prints what was found, and returns it."""
    with tempfile.TemporaryDirectory(prefix="patchclamp-fuzz-") as directory:
        model = Path(directory) / "model"
        save_tiny_llama(model)
        with ServerProcess(str(model), Path(directory) / "artifacts") as server:
            with grpc.insecure_channel(server.address) as channel:
                for name, messages in preparation():
                    method = methods()[name]
                    code, detail = status_of(channel, Case("right", method, messages, method.streams))
                    if code is not CODES.OK:
                        raise SystemExit(f"{name}, which the calls need, ended with {code.name}: {detail}")
            fuzzer = Fuzzer(server)
            everything = list(cases(seed, requests))
            warm_up = int(len(everything) * WARM_UP)
            started = time.monotonic()
            fuzzer.run(everything[:warm_up])
            before = server.rss_bytes() if server.is_alive else 0
            found = fuzzer.run(everything[warm_up:])
            seconds = time.monotonic() - started
            alive = server.is_alive
            held = at_rest(server) if alive else {"everything": 1.0}
            serving = alive and server.is_serving()
            growth = server.rss_bytes() / before if alive and before else 0.0
            if found.failures or held or not serving:
                print(server.log()[-20000:], file=sys.stderr)
    for text in found.failures:
        print(text)
    for code, count in found.codes.most_common():
        print(f"{count:7d} {code}")
    return {
        "requests": requests,
        "seed": seed,
        "methods": len(methods()),
        "uncalled": sorted(m.path for m in methods().values() if not found.by_method[m.path]),
        "codes": dict(found.codes),
        "undeclared": len(found.failures),
        "alive": alive,
        "serving": serving,
        "held": held,
        "rss_growth_ratio": round(growth, 3),
        "seconds": round(seconds, 1),
    }


def failed(result: dict[str, Any]) -> bool:
    grown = result["rss_growth_ratio"] > MOST_GROWTH
    return bool(result["undeclared"] or result["held"] or not result["serving"] or result["uncalled"] or grown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = fuzz(arguments.requests, arguments.seed)
    print(json.dumps(result))
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())
