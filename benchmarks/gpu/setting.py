"""What a run measures: device, shapes, how thoroughly, and the two ceilings of the device."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder of random weights."""

    name: str
    architecture: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    tied: bool

    @property
    def qk_norm(self) -> bool:
        return self.architecture == "qwen3"


LLAMA = Shape("llama-3-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 16384, 500000.0, False)
QWEN = Shape("qwen3-1.7b", "qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 16384, 1000000.0, True)
TINY_LLAMA = Shape("tiny-llama", "llama", 2, 64, 128, 4, 2, 16, 512, 1024, 10000.0, False)
TINY_QWEN = Shape("tiny-qwen3", "qwen3", 2, 64, 128, 4, 2, 16, 512, 1024, 10000.0, True)


@dataclass(frozen=True)
class Setting:
    """`deadline` is on the clock of time.time(), which processes share. The ceilings are 0 until they are measured."""

    device: str
    tiny: bool
    quick: bool
    models: tuple[str, ...]
    deadline: float
    commit: str = ""
    # Of the inputs of the checks.
    seed: int = 0
    copy_bytes_per_second: float = 0.0
    flops_per_second: float = 0.0

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def shapes(self) -> list[Shape]:
        shapes = (TINY_LLAMA, TINY_QWEN) if self.tiny else (LLAMA, QWEN)
        if self.quick and not self.models:
            return [shapes[0]]
        return [s for s in shapes if not self.models or any(s.name.startswith(m) for m in self.models)]

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def pick(self, full, quick, tiny):
        """One of three values, by how thorough the run is."""
        return tiny if self.tiny else quick if self.quick else full
