"""Decode steps padded to a few sizes and replayed as CUDA graphs.

A graph holds a whole step: forward pass, receipts, logits. It reads static buffers, so that a replay is one copy of the
step's arrays and one launch. What programs are in the batch is data; a graph depends on the number of rows, on the
bound of the contexts, and on what is launched at all: edits of queries, of heads, of neurons or of their
pre-activations, and the peaks of heads.

On a CPU a "replay" runs the same padded step anew: the bookkeeping is tested there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from patchclamp_kernels.paged_attention import RaggedBatch
from patchclamp_server.engine.batch import PADDING_SLOT, Executed, StepBatch
from patchclamp_server.engine.executors.kernel_step import (
    all_peaks,
    banks_of,
    kernel_inputs,
    program_rows,
    programs_of,
    run_step,
    step_arrays,
)
from patchclamp_server.engine.executors.packed import Packed
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.interventions.head_readings import HeadReadings
from patchclamp_server.interventions.kernel_plan import NO_PROGRAM, KernelPlan, empty_plan
from patchclamp_server.interventions.slots import SlotTables
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.kernel_forward import KernelForward
from patchclamp_server.model.overflow import finite_rows
from patchclamp_server.monitoring.sites import WatchedSites

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Contexts are bounded by 1,024 tokens, 4,096, ...: the bound sets how many programs of the attention kernel share a
# context.
FIRST_CONTEXT, CONTEXT_STEP = 1024, 4
# A graph has room for so much in a row. Steps with more run launch by launch.
COLUMNS, ITEMS, READINGS, NEURON_ENTRIES = 16, 64, 256, 4

_INT32: np.dtype = np.dtype(np.int32)
_INT64: np.dtype = np.dtype(np.int64)


@dataclass(frozen=True)
class GraphKey:
    rows: int
    max_context: int
    attn_q: bool
    attn_z: bool
    neurons: bool
    preactivations: bool
    peaks: bool


class DecodeGraphs:
    def __init__(self, forward: KernelForward, cache: KvCache, tables: SlotTables, max_sequences: int) -> None:
        self.forward = forward
        self.cache = cache
        self.tables = tables
        decoder = forward.decoder
        context = min(decoder.spec.context_length, cache.n_blocks * cache.block_size)
        self.contexts = []
        bound = FIRST_CONTEXT
        while bound < context:
            self.contexts.append(bound)
            bound *= CONTEXT_STEP
        self.contexts.append(context)
        self.sizes = [n for n in SIZES if n < max_sequences]
        self.sizes += [n for n in SIZES if n >= max_sequences][:1]
        self.logits = torch.empty((self.sizes[-1], decoder.spec.vocab_size), dtype=torch.float32, device=decoder.device)
        self._graphs: dict[GraphKey, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None

    def takes(self, batch: StepBatch, plan: KernelPlan) -> bool:
        """Whether every row is a token of its own, and the programs need nothing that a graph has no room for."""
        return (
            len(batch.spans) == len(batch.token_ids) <= self.sizes[-1]
            and not plan.breaks
            and not plan.neuron_rows
            and plan.words == 1
            and plan.n_items <= ITEMS
            and plan.n_columns <= COLUMNS
            and plan.n_readings <= READINGS
            and plan.most_neuron_entries <= NEURON_ENTRIES
        )

    def execute(
        self, batch: StepBatch, plan: KernelPlan, heads: HeadReadings | None, watched: WatchedSites | None = None
    ) -> Executed:
        """Runs a step. A `watched` step is padded in the same way, so that it has the same bits, and runs launch by
        launch."""
        n = len(batch.token_ids)
        longest = int(batch.spans.offsets.max()) + 1
        key = GraphKey(
            next(size for size in self.sizes if size >= n),
            next(context for context in self.contexts if context >= longest),
            plan.attn_q,
            plan.attn_z,
            plan.neurons,
            plan.preactivations,
            heads is not None or (watched is not None and watched.layout.looks_at_heads),
        )
        graph = self._graph(key)
        graph.fill(batch, plan)
        if watched is None:
            graph.replay()
        else:
            graph.run(watched)
        logits = self.logits[:n]
        if len(batch.logit_rows) != n:
            logits = logits[batch.logit_rows]
        outcome = plan.outcome(graph.rows.opened, graph.rows.readings)
        if heads is not None:
            assert graph.peaks is not None
            outcome.readouts += heads.values(graph.peaks)
        return Executed(graph.finite[:n].cpu().numpy(), logits, outcome)

    def capture_all(self) -> None:
        """Captures the graphs of steps up to the first bound of contexts. Longer ones, and those with edited queries,
        pre-activations or peaks are captured when they come, from kernels that are compiled by then."""
        for rows in reversed(self.sizes):
            for attn_z in (False, True):
                for neurons in (False, True):
                    self._graph(GraphKey(rows, self.contexts[0], False, attn_z, neurons, False, False))

    def _graph(self, key: GraphKey) -> "_Graph":
        graph, addresses = self._graphs.get(key), self._addresses(key)
        if graph is None or graph.addresses != addresses:
            graph = _Graph(key, self, addresses)
            self._graphs[key] = graph
        return graph

    def _addresses(self, key: GraphKey) -> tuple[int, ...]:
        """Returns where a graph reads and writes besides its own buffers. A table that has grown is elsewhere."""
        tables = self.tables
        banks = banks_of(tables, self.forward.decoder.spec, neurons=key.preactivations)
        entries = (tables.ranges, tables.ints, tables.floats, tables.unit_ints, tables.unit_numbers)
        return tuple(t.data_ptr() for t in (*entries, tables.latch, tables.counts, *banks.values()))


class _Graph:
    """One captured step of `key.rows` rows; those beyond the batch are padding."""

    def __init__(self, key: GraphKey, owner: DecodeGraphs, addresses: tuple[int, ...]) -> None:
        self.addresses = addresses
        self._owner = owner
        self._n = n = key.rows
        cache, decoder = owner.cache, owner.forward.decoder
        device = decoder.device
        cuda = device.type == "cuda"
        blocks = -(-key.max_context // cache.block_size)
        layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            **dict.fromkeys(("token_ids", "positions", "slots"), ((n,), _INT64)),
            **dict.fromkeys(("slot", "counted", "context_lengths"), ((n,), _INT32)),
            "mask": ((n, 1), _INT64),
            "spans": ((n, 2), _INT32),
            "counters": ((n, ITEMS), _INT32),
            "block_tables": ((n, blocks), _INT32),
        }
        self._packed = Packed(layout, device, pinned=cuda)
        arrays = self._packed.device
        attention = RaggedBatch(
            block_tables=arrays["block_tables"],
            query_starts=torch.arange(n + 1, dtype=torch.int32, device=device),
            context_lengths=arrays["context_lengths"],
            n_single=n,
            tiles=torch.empty((0, 2), dtype=torch.int32, device=device),
            max_context=key.max_context,
            block_size=cache.block_size,
        )
        self.rows = program_rows(arrays, columns=COLUMNS, items=ITEMS, readings=READINGS)
        launches = empty_plan(n)
        launches.attn_q, launches.attn_z = key.attn_q, key.attn_z
        launches.neurons, launches.most_neuron_entries = key.neurons, NEURON_ENTRIES
        launches.preactivations = key.preactivations
        self.peaks = all_peaks(decoder.spec, n, device) if key.peaks else None
        self._off_sink: Peaks | None = None
        programs = programs_of(owner.tables, decoder.spec, self.rows, launches)
        self._inputs = kernel_inputs(arrays, attention, programs, self.peaks)
        self.finite = torch.empty(n, dtype=torch.bool, device=device)
        self._pad(0)
        self._packed.upload()
        self.replay: Callable[[], None] = self.run
        if cuda:
            # It runs once outside, where libraries make their workspaces.
            self.run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=owner.pool, capture_error_mode="thread_local"):
                self.run()
            self.replay = graph.replay

    def fill(self, batch: StepBatch, plan: KernelPlan) -> None:
        host, n = self._packed.host, len(batch.token_ids)
        self._pad(n)
        for name, values in step_arrays(batch, plan).items():
            if name == "counters":
                host[name][: len(values), : values.shape[1]] = values
            else:
                host[name][: len(values)] = values
        # Entries past a context are not read.
        host["block_tables"][:n, : batch.spans.tables.shape[1]] = batch.spans.tables
        host["context_lengths"][:n] = batch.spans.offsets + 1
        self._packed.upload()

    def _pad(self, n: int) -> None:
        """Makes rows from n on padding, which belong to no span of a program."""
        host = self._packed.host
        for name in ("token_ids", "positions", "context_lengths"):
            host[name][n:] = 0
        host["slots"][n:] = PADDING_SLOT
        host["slot"][n:] = NO_PROGRAM
        host["spans"][:] = 0
        host["counters"][:] = -1

    def run(self, watched: WatchedSites | None = None) -> None:
        owner, rows, inputs = self._owner, self.rows, self._inputs
        rows.opened.zero_()
        rows.receipts.zero_()
        peaks = self.peaks
        if watched is not None:
            if peaks is not None and watched.layout.heads_off_sink:
                # The memory is none that a captured graph has: a watched step runs launch by launch.
                peaks = self._off_sink = self._off_sink or peaks.with_off_sink()
            inputs = replace(inputs, programs=watched.between(inputs.programs), peaks=peaks)
        x, normed = run_step(owner.forward, owner.tables, owner.cache.pools, inputs, self._packed.device)
        if watched is not None and peaks is not None:
            watched.layout.look_at_heads(peaks)
        owner.logits[: self._n].copy_(owner.forward.decoder.unembed(normed))
        self.finite.copy_(finite_rows(x))
