"""Clients of benchmarks/load: requests made beforehand, streams that keep only what is counted, and how they ended.

They share the machine with the server, so they do little: requests are bytes before they are needed, of a stream only
the last message is decoded, and nothing is tried again.
"""

import asyncio
import math
import random
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1 import program_pb2, tensor_pb2

GENERATE = "/patchclamp.v1.GenerationService/Generate"
DETAILS_KEY = "grpc-status-details-bin"
TEXT = (
    "the keeper of the old lighthouse walked down to the harbour every evening and counted the boats that had come home"
    " before the storm while his daughter wrote their names in a blue book and lit the lamp"
)
WORDS = TEXT.split()
SHORTEST_PROMPT = 8
GENERATED_TOKENS = (8, 48)
STEERED_SHARE = 0.25
WITH_DEADLINE_SHARE = 0.3


@dataclass(frozen=True)
class Prepared:
    """A request as it travels. `has_deadline`: it gets one when it is sent."""

    data: bytes
    has_deadline: bool
    steered: bool


@dataclass
class Call:
    """One stream, and what became of it. Times are of time.monotonic()."""

    started: float
    tenant: int
    outcome: str = ""  # "" while it runs, "ok", or the name of the status
    first: float | None = None
    ended: float | None = None
    tokens: int = 0
    has_retry_info: bool = False
    message: str = ""


def requests(n: int, d_model: int, n_layers: int, *, seed: int, longest_prompt: int) -> list[Prepared]:
    """Prompts of mixed length, no two alike; a quarter is steered by vectors of its own, a third has a deadline."""
    random_ = random.Random(seed)
    made = []
    for i in range(n):
        words = random_.choices(WORDS, k=log_uniform(random_, SHORTEST_PROMPT, longest_prompt))
        steered = random_.random() < STEERED_SHARE
        request = pb.GenerateRequest(
            prompt=pb.Prompt(text=f"{seed}.{i} {' '.join(words)}"),
            stop=pb.StopConditions(max_tokens=log_uniform(random_, *GENERATED_TOKENS), ignore_eos=True),
        )
        if steered:
            request.program.CopyFrom(_program(random_, d_model, n_layers))
        made.append(Prepared(request.SerializeToString(), random_.random() < WITH_DEADLINE_SHARE, steered))
    return made


def log_uniform(random_: random.Random, low: int, high: int) -> int:
    return round(math.exp(random_.uniform(math.log(low), math.log(high))))


def _program(random_: random.Random, d_model: int, n_layers: int) -> program_pb2.Program:
    values = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[d_model])
    values.data = struct.pack(f"<{d_model}f", *(random_.gauss(0, 0.2) for _ in range(d_model)))
    edit = program_pb2.Edit(
        name="push",
        site=program_pb2.SITE_RESID_POST,
        layers=[random_.randrange(n_layers)],
        strength=0.1,
        add=program_pb2.AddVector(vector=program_pb2.Vector(values=values)),
    )
    return program_pb2.Program(edits=[edit])


@dataclass
class Clients:
    """Streams to one server. `metadata`: of each tenant; requests take turns. `deadline_seconds`: of those with one."""

    channels: Sequence[grpc.aio.Channel]
    metadata: Sequence[tuple[tuple[str, str], ...]] = ((),)
    deadline_seconds: float | None = None
    calls: list[Call] = field(default_factory=list)
    _tasks: set["asyncio.Task[Call]"] = field(default_factory=set)
    _loop: list["asyncio.Task[None]"] = field(default_factory=list)

    def send(self, request: Prepared) -> "asyncio.Task[Call]":
        task = asyncio.create_task(self._run(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def start_closed_loop(self, requests: Iterator[Prepared], n: int) -> None:
        """`n` at once: whoever has an answer sends the next."""

        async def one() -> None:
            while True:
                # The stream outlives the loop that sent it.
                call = await asyncio.shield(self.send(next(requests)))
                if call.outcome != "ok":
                    await asyncio.sleep(0.1)

        self._loop = [asyncio.create_task(one()) for _ in range(n)]

    def stop_closed_loop(self) -> None:
        """No more are sent; those that run go on."""
        for one in self._loop:
            one.cancel()

    async def open_loop(self, requests: Iterator[Prepared], rate: float, seconds: float, seed: int) -> None:
        """Poisson arrivals, whatever the answers."""
        random_ = random.Random(seed)
        due = time.monotonic()
        end = due + seconds
        while (due := due + random_.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.send(next(requests))

    async def drained(self, seconds: float) -> int:
        """Waits for all streams to end; how many had not after so long. Those are cancelled."""
        tasks = set(self._tasks)
        if not tasks:
            return 0
        _, left = await asyncio.wait(tasks, timeout=seconds)
        for task in left:
            task.cancel()
        return len(left)

    async def _run(self, request: Prepared) -> Call:
        number = len(self.calls)
        call = Call(time.monotonic(), number % len(self.metadata))
        self.calls.append(call)
        method = self.channels[number % len(self.channels)].unary_stream(GENERATE)
        timeout = self.deadline_seconds if request.has_deadline else None
        metadata = self.metadata[call.tenant]
        last = b""
        try:
            async for message in method(request.data, timeout=timeout, metadata=metadata):
                last = message
                call.first = call.first or time.monotonic()
        except grpc.aio.AioRpcError as error:
            call.outcome = error.code().name
            call.message = error.details() or ""
            call.has_retry_info = has_retry_info(error)
        else:
            response = pb.GenerateResponse.FromString(last)
            call.outcome = "ok" if response.HasField("finished") else "UNFINISHED"
            call.tokens = response.finished.usage.generated_tokens
        call.ended = time.monotonic()
        return call


def has_retry_info(error: grpc.aio.AioRpcError) -> bool:
    metadata: Any = error.trailing_metadata()
    encoded = dict(metadata or ()).get(DETAILS_KEY)
    if not isinstance(encoded, bytes):
        return False
    try:
        status = status_pb2.Status.FromString(encoded)
    except DecodeError:
        return False
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
