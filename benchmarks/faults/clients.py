"""The clients of benchmarks/faults: what they send, and what they see of a fault."""

import hashlib
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.torch import save
from serving import PATIENCE_SECONDS
from torch import full

from patchclamp.v1 import artifact_pb2, generation_pb2
from patchclamp.v1.artifact_pb2_grpc import ArtifactServiceStub
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub

OK = "OK"
# A client in a process of its own, to be killed: it holds a stream open and never reads on.
HELD_OPEN = """
import sys, time, grpc
from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub

def messages():
    yield pb.SessionRequest.FromString(bytes.fromhex(sys.argv[2]))
    yield pb.SessionRequest(advance=pb.Advance(tokens=1))
    time.sleep(3600)

with grpc.insecure_channel(sys.argv[1]) as channel:
    next(GenerationServiceStub(channel).Session(messages()))
    print("one token", flush=True)
    time.sleep(3600)
"""


@dataclass(frozen=True)
class Seen:
    """What a client saw of one call: its tokens, and its status with the details that say what to do."""

    status: str
    tokens: tuple[int, ...] = ()


def request(prompt: str, max_tokens: int, **fields: object) -> generation_pb2.GenerateRequest:
    stop = generation_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=True)
    return generation_pb2.GenerateRequest(prompt=generation_pb2.Prompt(text=prompt), stop=stop, **fields)  # type: ignore[arg-type]


def status_of(error: grpc.RpcError) -> str:
    """Code, and the details of google.rpc that came with it."""
    found = [error.code().name]
    status = rpc_status.from_call(error)
    for packed in status.details if status is not None else ():
        for kind in (error_details_pb2.RetryInfo, error_details_pb2.PreconditionFailure):
            if packed.Is(kind.DESCRIPTOR):
                found.append(kind.DESCRIPTOR.name)
    return " with ".join(found)


def seen(responses: Iterator[generation_pb2.GenerateResponse]) -> Seen:
    """Reads a stream to its end."""
    tokens: list[int] = []
    try:
        for response in responses:
            tokens += [token.id for token in response.tokens]
    except grpc.RpcError as error:
        return Seen(status_of(error), tuple(tokens))
    return Seen(OK, tuple(tokens))


class Lockstep:
    """A session that generates what it is granted: it is running for as long as a fault needs it to."""

    def __init__(self, channel: grpc.Channel, asked: generation_pb2.GenerateRequest, timeout: float | None = None):
        self._sent: queue.Queue[generation_pb2.SessionRequest | None] = queue.Queue()
        self._sent.put(_start(asked))
        self.stream = GenerationServiceStub(channel).Session(iter(self._sent.get, None), timeout=timeout)

    def advance(self, tokens: int) -> None:
        self._sent.put(generation_pb2.SessionRequest(advance=generation_pb2.Advance(tokens=tokens)))

    def begin(self) -> int:
        """Waits for the first token."""
        self.advance(1)
        token: int = next(self.stream).tokens[0].id
        return token

    def end(self, tokens: int) -> Seen:
        """Grants the rest, and reads it."""
        self.advance(tokens)
        result = seen(self.stream)
        self._sent.put(None)
        return result

    def wait(self) -> Seen:
        """Sends nothing more, and does not leave."""
        result = seen(self.stream)
        self._sent.put(None)
        return result


class Client:
    """Calls of one client over one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self._artifacts = ArtifactServiceStub(channel)
        self._generation = GenerationServiceStub(channel)

    def generate(self, asked: generation_pb2.GenerateRequest, **options: float) -> Seen:
        return seen(self._generation.Generate(asked, **options))

    def stream(self, asked: generation_pb2.GenerateRequest) -> "grpc.CallIterator[generation_pb2.GenerateResponse]":
        return self._generation.Generate(asked)

    def upload(self, number: int, width: int, tag: str = "") -> str:
        """A vector that no other number has; it takes the tag from the one before. Its id; raises RpcError."""
        file = save({"layer.0": full((width,), float(number + 1))})
        header = artifact_pb2.UploadHeader(
            kind="ARTIFACT_KIND_VECTOR",
            format="ARTIFACT_FORMAT_SAFETENSORS",
            size_bytes=len(file),
            # Padding that makes it large.
            description=f"{number} " * 400,
            tags=[tag] if tag else [],
            replace_tags=True,
        )
        parts = [artifact_pb2.UploadRequest(header=header), artifact_pb2.UploadRequest(chunk=file)]
        return self._artifacts.Upload(iter(parts), timeout=PATIENCE_SECONDS).artifact.id

    def upload_that_waits(self, width: int) -> "tuple[Future[str], threading.Event]":
        """Sends half a file, and then nothing. Resolves to the status."""
        file, half_sent = save({"layer.0": full((width,), 0.25)}), threading.Event()

        def parts() -> Iterator[artifact_pb2.UploadRequest]:
            header = artifact_pb2.UploadHeader(
                kind="ARTIFACT_KIND_VECTOR", format="ARTIFACT_FORMAT_SAFETENSORS", size_bytes=len(file)
            )
            yield artifact_pb2.UploadRequest(header=header)
            yield artifact_pb2.UploadRequest(chunk=file[: len(file) // 2])
            half_sent.set()
            threading.Event().wait(PATIENCE_SECONDS)

        call = self._artifacts.Upload.future(parts())
        result: Future[str] = Future()

        def done(ended: grpc.Future) -> None:  # type: ignore[type-arg]
            error = ended.exception()
            result.set_result(OK if error is None else status_of(error))

        call.add_done_callback(done)
        return result, half_sent

    def download(self, ref: str) -> bytes:
        """Raises RpcError."""
        asked = artifact_pb2.DownloadRequest(ref=ref, format="ARTIFACT_FORMAT_SAFETENSORS")
        return b"".join(part.chunk for part in self._artifacts.Download(asked, timeout=PATIENCE_SECONDS))

    def delete(self, ref: str) -> None:
        self._artifacts.DeleteArtifact(artifact_pb2.DeleteArtifactRequest(ref=ref))

    def listed(self) -> set[str]:
        """Ids of all artifacts."""
        ids: set[str] = set()
        token = ""
        while True:
            page = self._artifacts.ListArtifacts(artifact_pb2.ListArtifactsRequest(page_token=token))
            ids |= {artifact.id for artifact in page.artifacts}
            if not (token := page.next_page_token):
                return ids

    def broken(self, ids: Sequence[str]) -> list[str]:
        """Those that are not listed, or whose bytes do not have the digest of their id."""
        listed = self.listed()
        return [each for each in ids if each not in listed or self._digest(each) != each]

    def _digest(self, ref: str) -> str:
        try:
            return f"sha256:{hashlib.sha256(self.download(ref)).hexdigest()}"
        except grpc.RpcError as error:
            return status_of(error)


def killed_client(address: str, asked: generation_pb2.GenerateRequest) -> str:
    """Opens a stream from a process, and kills that process once it has a token. How it ended."""
    start = _start(asked).SerializeToString().hex()
    with subprocess.Popen(
        [sys.executable, "-c", HELD_OPEN, address, start], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        process.kill()
        return f"{line}, then killed ({process.wait()})"


def _start(asked: generation_pb2.GenerateRequest) -> generation_pb2.SessionRequest:
    return generation_pb2.SessionRequest(start=generation_pb2.SessionStart(request=asked, lockstep=True))
