"""Random calls: the same for the same seed, whatever the server answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from random_requests import corrupted, mutated
from seed_requests import calls

from fuzzing.files import random_upload
from fuzzing.texts import renamed, retold
from patchclamp_server.rpc.contract import SERVICES

# Of what is done to a call, and how often.
KINDS = {
    "mutated": 54,
    "right": 6,
    "text": 10,
    "file": 6,
    "bytes": 8,
    "unknown method": 3,
    "cut short": 5,
    "cancelled": 5,
    "arity": 3,
}
UPLOAD = "patchclamp.v1.ArtifactService/Upload"
# Tags of what calls need, and of a random file that takes their place.
ARTIFACTS, FILE = frozenset({"vector", "neurons", "heads"}), "file"
# A call that has not ended by then is ended by its deadline; jobs may be asked for much.
DEADLINE_SECONDS = 3.0
BRIEF_SECONDS = 0.01
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
    random = Random(seed)
    right, known = calls(), methods()
    names = sorted(known)
    for _ in range(n):
        kind = random.choices(list(KINDS), list(KINDS.values()))[0]
        name = random.choice(names)
        if kind == "file" and random.randint(0, 1):
            name = UPLOAD
        method = known[name]
        messages: list[Any] = list(random.choice(right[name]))
        case = Case(kind, method, messages, method.streams, metadata=random.choice(METADATA))
        _change(random, case, name, messages)
        yield case


def _change(random: Random, case: Case, name: str, messages: list[Any]) -> None:
    index = random.randrange(len(messages))
    match case.kind:
        case "mutated":
            messages[index] = mutated(random, messages[index], most=4)
        case "text":
            messages[index] = retold(random, messages[index])
        case "file" if name == UPLOAD:
            case.messages = random_upload(random, FILE)
        case "file":
            messages[index] = renamed(messages[index], ARTIFACTS, FILE)
        case "bytes":
            messages[index] = corrupted(random, messages[index].SerializeToString())
        case "unknown method":
            wrong = random.choice((name.lower(), name + "s", "patchclamp.v1.Nothing/Do", "Generate", "/", "é"))
            case.method = Method("/" + wrong, None, case.method.streams)
        case "cut short":
            case.messages = messages[: random.randrange(len(messages))] if case.streams else messages
            if random.randint(0, 1):
                case.messages = random.sample(messages, len(messages))
            if not case.streams:
                case.deadline = BRIEF_SECONDS
        case "cancelled":
            case.leaves_after = random.randint(0, 3)
        case "arity":
            case.streams = True
            case.messages = random.choice(([], messages * 2))
