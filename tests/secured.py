"""A live server whose tokens and policy are files that tests rewrite, and the calls of its tenants."""

import json
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from live import LiveServer
from statuses import Failure, failure

from patchclamp.v1 import generation_pb2 as pb
from patchclamp.v1.generation_pb2_grpc import GenerationServiceStub
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.security.tokens import new_token

RELOAD_SECONDS = 0.02


class Secured:
    """`tenant`: names with a token. `write_policy` and `write_tokens` return when the server has read the file."""

    def __init__(self, server: LiveServer, directory: Path, tokens: dict[str, str]) -> None:
        self.server = server
        self.directory = directory
        self.tokens = tokens

    def write_policy(self, text: str, outcome: str = "ok") -> None:
        self._rewrite("policy", text, outcome)

    def write_tokens(self, text: str, outcome: str = "ok") -> None:
        self._rewrite("tokens", text, outcome)

    def audit(self) -> list[dict[str, Any]]:
        """What is in the audit log when the server has ended."""
        return [json.loads(line) for line in (self.directory / "audit").read_text().splitlines()]

    def metadata(self, tenant: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tokens[tenant]}"),)

    def generate(self, channel: grpc.Channel, tenant: str, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        return list(GenerationServiceStub(channel).Generate(request, metadata=self.metadata(tenant)))

    def refused(self, channel: grpc.Channel, tenant: str, request: pb.GenerateRequest) -> Failure:
        return refusal(lambda: self.generate(channel, tenant, request))

    def _rewrite(self, file: str, text: str, outcome: str) -> None:
        sample = f'patchclamp_config_reloads_total{{file="{file}",outcome="{outcome}"}}'
        before = self.server.metric(sample)
        replaced = self.directory / f"{file}.new"
        replaced.write_text(text)
        replaced.replace(self.directory / file)
        until(lambda: self.server.metric(sample) == before + 1)


@contextmanager
def secured(model: LoadedModel, directory: Path, *tenants: str, policy: str = "", **config: Any) -> Iterator[Secured]:
    """A server with a token for each tenant, with a policy where one is given, and with an audit log."""
    made = {tenant: new_token(tenant) for tenant in tenants}
    (directory / "tokens").write_text("\n".join(token.line for _, token in made.values()))
    files = {"tokens": str(directory / "tokens"), "audit_log": str(directory / "audit")}
    if policy:
        (directory / "policy").write_text(policy)
        files["policy"] = str(directory / "policy")
    with LiveServer(model, directory / "artifacts", reload_seconds=RELOAD_SECONDS, **{**files, **config}) as server:
        yield Secured(server, directory, {tenant: presented for tenant, (presented, _) in made.items()})


class Stream:
    """A lockstep session: it runs until it is told to end, however fast the machine is."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...], **fields: Any) -> None:
        self._sent: queue.Queue[pb.SessionRequest | None] = queue.Queue()
        self._sent.put(pb.SessionRequest(start=pb.SessionStart(request=generation(**fields), lockstep=True)))
        self._responses = GenerationServiceStub(channel).Session(iter(self._sent.get, None), metadata=metadata)

    def tokens(self, n: int) -> list[int]:
        """The next n tokens. Raises what the server ends the stream with."""
        self._sent.put(pb.SessionRequest(advance=pb.Advance(tokens=n)))
        got: list[int] = []
        while len(got) < n:
            got += [token.id for token in next(self._responses).tokens]
        return got

    def set_strength(self, edit: str, strength: float) -> None:
        self._sent.put(pb.SessionRequest(set_strength=pb.SetStrength(edit=edit, strength=strength)))

    def end(self) -> pb.Finished:
        self._sent.put(pb.SessionRequest(stop=pb.Stop()))
        self._sent.put(None)
        return list(self._responses)[-1].finished

    def refusal(self) -> Failure:
        """What the server ends the stream with."""
        refused = refusal(lambda: list(self._responses))
        self._sent.put(None)
        return refused


def generation(**fields: Any) -> pb.GenerateRequest:
    right = {"prompt": pb.Prompt(text="hello"), "stop": pb.StopConditions(max_tokens=100, ignore_eos=True)}
    return pb.GenerateRequest(**{**right, **fields})


def refusal(call: Callable[[], object]) -> Failure:
    """The status of a call that is refused."""
    try:
        call()
    except grpc.RpcError as error:
        return failure(error)
    raise AssertionError("the call was not refused")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Returns when the condition holds; asks again and again."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come to hold"
        time.sleep(0.005)
