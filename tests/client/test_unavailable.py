"""Servers that are not there, or no longer: what is sent again, and that every call ends."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from patience import PATIENCE_SECONDS

from patchclamp import AsyncClient, Client, PatchclampError, Retry, requests
from patchclamp.retry import UNAVAILABLE_SECONDS, Attempts
from patchclamp.v1 import generation_pb2, job_pb2, model_pb2
from patchclamp.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from patchclamp.v1.job_pb2_grpc import JobServiceServicer
from patchclamp.v1.model_pb2_grpc import ModelServiceServicer

Serve = Callable[..., str]
ASAP = Retry(seconds=0.0, jitter=0.0)


class Leaves(GenerationServiceServicer):
    """Answers one call with UNAVAILABLE and closes its port, as a server that drains."""

    def __init__(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2))
        add_GenerationServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[generation_pb2.GenerateResponse]:
        threading.Thread(target=self.stop).start()
        context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        yield generation_pb2.GenerateResponse()

    def Session(self, request_iterator: Any, context: Any) -> Any:
        raise NotImplementedError

    Score = Compare = Session

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def leaves() -> Iterator[Leaves]:
    server = Leaves()
    yield server
    server.stop()


def test_a_stream_whose_server_leaves_while_it_is_repeated_ends_before_its_deadline(leaves: Leaves):
    """In a process of its own: what hangs in gRPC can be ended by nothing less."""
    program = (
        "import sys; from patchclamp import Client, PatchclampError\n"
        "try: Client(sys.argv[1]).generate('x', timeout=15).result()\n"
        "except PatchclampError as error: print(error.code)\n"
    )
    command = [sys.executable, "-c", program, leaves.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.stdout.strip() == "UNAVAILABLE", done.stderr


def test_the_command_line_ends_too(leaves: Leaves):
    command = [sys.executable, "-m", "patchclamp", "generate", "x", "--address", leaves.address, "--timeout", "15"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr


async def test_the_async_client_ends_too(leaves: Leaves):
    async with AsyncClient(leaves.address) as client:
        with pytest.raises(PatchclampError, match=r"UNAVAILABLE|DEADLINE_EXCEEDED"):
            await client.generate("x", timeout=1).result()


class Absent(ModelServiceServicer, GenerationServiceServicer):
    """`refusals` calls are UNAVAILABLE."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.calls = 0

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ListModelsResponse:
        self._answer(context)
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tiny")])

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Iterator[generation_pb2.GenerateResponse]:
        self._answer(context)
        yield generation_pb2.GenerateResponse(text="hello")
        yield generation_pb2.GenerateResponse(finished=generation_pb2.Finished())

    def Session(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:
        self._answer(context)

    Score = Compare = Tokenize = ListModels

    def _answer(self, context: grpc.ServicerContext) -> None:
        self.calls += 1
        if self.calls <= self.refusals:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")


def test_what_is_unavailable_is_sent_again_without_being_asked_to(serve: Serve):
    server = Absent(refusals=2)
    with Client(serve(models=server, generation=server), retry=ASAP) as client:
        assert client.models()
        assert server.calls == 3
        server.calls = 0
        assert client.generate("hi").result().text == "hello"
    assert server.calls == 3


async def test_the_async_client_sends_again_what_is_unavailable(serve: Serve):
    server = Absent(refusals=2)
    async with AsyncClient(serve(models=server, generation=server), retry=ASAP) as client:
        assert await client.models()
        server.calls = 0
        assert (await client.generate("hi").result()).text == "hello"
    assert server.calls == 3


def unavailable(serve: Serve) -> grpc.RpcError:
    with grpc.insecure_channel(serve(models=Absent(refusals=1))) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/patchclamp.v1.ModelService/ListModels")(b"")
    return caught.value


def test_a_server_is_waited_for_as_long_as_the_policy_says_and_some_seconds_without_one(serve: Serve):
    error = unavailable(serve)
    for seconds, attempts in ((0.0, Attempts(ASAP, None)), (60.0, Attempts(Retry(seconds=60.0, jitter=0.0), None))):
        expected = max(seconds, UNAVAILABLE_SECONDS)
        attempts._began -= expected - 1.5
        assert attempts.delay(error) is not None
        attempts._began -= 1.5
        assert attempts.delay(error) is None


def test_waits_for_a_server_grow_to_a_second(serve: Serve):
    error = unavailable(serve)
    attempts = Attempts(Retry(seconds=600.0, jitter=0.0), None)
    assert [attempts.delay(error) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


class Starts(JobServiceServicer):
    """Begins every job that it is asked for, and loses its first answer."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def StartJob(self, request: Any, context: grpc.ServicerContext) -> job_pb2.StartJobResponse:
        self.keys.append(request.key)
        if len(self.keys) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return job_pb2.StartJobResponse(job=job_pb2.Job(id="job-1", state=job_pb2.JOB_STATE_RUNNING))


def test_a_job_that_is_begun_again_is_begun_with_the_same_key(serve: Serve):
    server = Starts()
    with Client(serve(jobs=server), retry=ASAP) as client:
        client.start_job(requests.detect_retrieval_heads())
        client.start_job(requests.detect_retrieval_heads())
    first, again, other = server.keys
    assert first == again != other
    assert first


async def test_a_stream_that_is_closed_between_two_attempts_ends(serve: Serve):
    server = Absent(refusals=1 << 30)
    async with AsyncClient(serve(generation=server), retry=Retry(60.0)) as client:
        stream = client.generate("hi")
        reading = asyncio.create_task(anext(stream, None))
        call: Any = stream._call
        while not call._call.done():
            await asyncio.sleep(0)
        await stream.close()
        assert await reading is None
