"""What the fixtures of this folder hand out."""

from dataclasses import dataclass

import grpc

from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.engine.config import Unobserved
from patchclamp_server.engine.engine import Engine
from patchclamp_server.rpc.server import Server


class Outcomes(Unobserved):
    """Keeps how every sequence ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def on_finished(self, outcome: str) -> None:
        self.ended.append(outcome)


@dataclass(frozen=True)
class Recorded:
    engine: Engine
    outcomes: Outcomes


@dataclass(frozen=True)
class Live:
    """A real server with a real channel to it."""

    server: Server
    channel: grpc.aio.Channel
    steering: SteeringServiceStub
    outcomes: Outcomes
