"""What the fixtures of this folder hand out."""

from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
from transformers import AutoModelForCausalLM

from patchclamp.v1.steering_pb2_grpc import SteeringServiceStub
from patchclamp_server.engine.config import Unobserved
from patchclamp_server.engine.engine import Engine
from patchclamp_server.model.sites import Site
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


@torch.no_grad()
def plain_states(directory: Path, tokens: tuple[int, ...], site: Site) -> torch.Tensor:
    """[layers, tokens, d] of plain transformers, from hooks on the blocks."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    seen: list[torch.Tensor] = []
    for block in model.model.layers:
        if site is Site.RESID_PRE:
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].clone()))
        else:
            block.register_forward_hook(lambda _, __, output: seen.append(output[0].clone()))
    model(torch.tensor([tokens]))
    return torch.stack(seen)
