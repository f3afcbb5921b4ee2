"""Bounds of the engine, what it tells about itself, and who is told."""

from dataclasses import dataclass
from typing import Protocol

from patchclamp_server.engine.request import SparsityReport


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of the engine. `kv_cache_tokens` is shared by all sequences; memory grows as it is used (CPU).

    With fewer tokens a step than sequences, the sequences that came last wait for their next token. `kernels`: steps
    run on patchclamp_kernels instead of torch operators; None does so on CUDA. `decode_graphs`: their decode steps are
    padded to a few sizes and replayed as CUDA graphs; None does so on CUDA, and on a CPU the padded step is run.
    """

    max_sequences: int = 64
    max_tokens_per_step: int = 512
    kv_block_size: int = 16
    kv_cache_tokens: int = 65536
    max_waiting: int = 1024
    enable_prefix_cache: bool = True
    kernels: bool | None = None
    decode_graphs: bool | None = None


@dataclass(frozen=True)
class EngineStats:
    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    prefix_hit_tokens: int
    preemptions: int


class EngineObserver(Protocol):
    """Told what happens, on the engine's thread; must not block."""

    def on_step(self, *, seconds: float, prefill_tokens: int, decode_rows: int) -> None: ...
    def on_first_token(self, seconds: float) -> None: ...
    def on_inter_token(self, seconds: float) -> None: ...
    def on_finished(self, outcome: str) -> None: ...
    def on_preemption(self) -> None: ...
    def on_sparse_finished(self, report: SparsityReport) -> None: ...
    def on_guard_sample(self, policy: str, divergence: float) -> None: ...
    def on_sparse_fallback(self, policy: str) -> None: ...


class Unobserved:
    """An observer that looks away."""

    def on_step(self, *, seconds: float, prefill_tokens: int, decode_rows: int) -> None: ...
    def on_first_token(self, seconds: float) -> None: ...
    def on_inter_token(self, seconds: float) -> None: ...
    def on_finished(self, outcome: str) -> None: ...
    def on_preemption(self) -> None: ...
    def on_sparse_finished(self, report: SparsityReport) -> None: ...
    def on_guard_sample(self, policy: str, divergence: float) -> None: ...
    def on_sparse_fallback(self, policy: str) -> None: ...
