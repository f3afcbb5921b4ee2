"""Holds the bounds of the engine, its statistics, and the protocol of its observers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from patchclamp_server.engine.admission import Reason
from patchclamp_server.engine.request import SparsityReport
from patchclamp_server.interventions.program import Edit, Receipt
from patchclamp_server.interventions.request_warnings import WarningCode


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of the engine. `kv_cache_tokens` is shared by all sequences; memory grows as it is used (CPU).

    With fewer tokens a step than sequences, the sequences that came last wait for their next token. `kernels`: steps
    run on patchclamp_kernels instead of torch operators; None does so on CUDA. `decode_graphs`: their decode steps are
    padded to a few sizes and replayed as CUDA graphs; None does so on CUDA, and on a CPU the padded step is run.
    `kv_dtype`: "model", or "bfloat16" or "int8" for a decoder whose pools are tiled (model/attention/pools.py).
    `batch_invariant`: what the model was loaded for (load_model), or None: whatever that is.
    """

    max_sequences: int = 64
    max_tokens_per_step: int = 512
    kv_block_size: int = 16
    kv_cache_tokens: int = 65536
    kv_dtype: str = "model"
    max_waiting: int = 1024
    # Waiting requests may need so many tokens of KV cache together; None is eight times what there is.
    max_waiting_kv_tokens: int | None = None
    enable_prefix_cache: bool = True
    kernels: bool | None = None
    decode_graphs: bool | None = None
    batch_invariant: bool | None = None
    # These bound the running watches, and the items of all of them.
    max_watches: int = 16
    max_watched_items: int = 8192
    # This is the mean time between tokens of a stream beside analysis over that without. Analysis has the rest of the
    # time, (slowdown - 1) / slowdown of it (analysis_share.py).
    analysis_slowdown: float = 1.5
    # The engine ends when so many steps in a row have failed.
    max_failed_steps: int = 8


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
    scored_tokens: int
    recomputed_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    failed_steps: int
    # Requests that have not started yet need so many tokens.
    queue_kv_tokens: int
    # Programs hold so many rows of the device tables.
    program_rows: int


class EngineObserver(Protocol):
    """Is told what happens, on the engine's thread, and must not block. Refusals are told on the thread that submits.

    A step has `rows` tokens, and `generated` sequences got a token from it.
    """

    def on_step(self, *, seconds: float, rows: int, generated: int) -> None: ...
    def on_first_token(self, seconds: float) -> None: ...
    def on_inter_tokens(self, seconds: Sequence[float]) -> None:
        """Sequences got a token, so many seconds after their last ones."""

    def on_finished(self, outcome: str) -> None: ...
    def on_preemption(self) -> None: ...
    def on_queue_wait(self, seconds: float) -> None: ...
    def on_refused(self, reason: Reason) -> None: ...
    def on_sparse_finished(self, report: SparsityReport) -> None: ...
    def on_guard_sample(self, policy: str, divergence: float) -> None: ...
    def on_sparse_fallback(self, policy: str) -> None: ...
    def on_edited(self, edits: Sequence[Edit], receipt: Receipt | None) -> None:
        """A request with edits ended; without a receipt where it failed for another reason than its client's."""

    def on_aborted(self) -> None:
        """An abort condition ended a request."""

    def on_warning(self, code: WarningCode) -> None: ...


class Unobserved:
    """An observer that ignores everything."""

    def on_step(self, *, seconds: float, rows: int, generated: int) -> None: ...
    def on_first_token(self, seconds: float) -> None: ...
    def on_inter_tokens(self, seconds: Sequence[float]) -> None: ...
    def on_finished(self, outcome: str) -> None: ...
    def on_preemption(self) -> None: ...
    def on_queue_wait(self, seconds: float) -> None: ...
    def on_refused(self, reason: Reason) -> None: ...
    def on_sparse_finished(self, report: SparsityReport) -> None: ...
    def on_guard_sample(self, policy: str, divergence: float) -> None: ...
    def on_sparse_fallback(self, policy: str) -> None: ...
    def on_edited(self, edits: Sequence[Edit], receipt: Receipt | None) -> None: ...
    def on_aborted(self) -> None: ...
    def on_warning(self, code: WarningCode) -> None: ...
