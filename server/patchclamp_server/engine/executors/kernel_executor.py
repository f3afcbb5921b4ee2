"""Runs steps on patchclamp_kernels: programs are rows of tables, and decode steps can be replayed as CUDA graphs."""

import logging
import time
from dataclasses import replace

import numpy as np
import torch

from patchclamp_kernels.paged_attention import RaggedBatch
from patchclamp_server.engine.batch import Executed, StepBatch
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.executors.decode_graphs import SIZES, DecodeGraphs
from patchclamp_server.engine.executors.kernel_products import kernel_products
from patchclamp_server.engine.executors.kernel_step import (
    all_peaks,
    kernel_inputs,
    program_rows,
    programs_of,
    run_step,
    step_arrays,
)
from patchclamp_server.engine.executors.operator_executor import setting_of
from patchclamp_server.engine.executors.packed import packed
from patchclamp_server.engine.executors.sparse_decoder import SparseBlocks
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.interventions.head_readings import HeadReader
from patchclamp_server.interventions.kernel_plan import KernelPlan, KernelPlanner, empty_plan
from patchclamp_server.interventions.slots import SlotTables
from patchclamp_server.interventions.tables import CUDA_BANK_ELEMENTS, CUDA_ENTRIES, CUDA_UNITS
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.attention.spans import Spans
from patchclamp_server.model.kernel_forward import KernelForward
from patchclamp_server.model.overflow import FiniteProbe, finite_rows
from patchclamp_server.monitoring.sites import SiteWatcher, WatchedSites
from patchclamp_server.sparsity.mlp import SparseModel

log = logging.getLogger(__name__)


class KernelExecutor:
    def __init__(self, model: SparseModel, cache: KvCache, config: EngineConfig) -> None:
        decoder = model.decoder
        self.decoder = decoder
        self.sparse = SparseBlocks(model, kernel_products)
        self.cache = cache
        self.tables = SlotTables(decoder.spec.n_layers, decoder.dtype, decoder.device)
        cuda = decoder.device.type == "cuda"
        if cuda:
            self.tables = SlotTables(
                decoder.spec.n_layers,
                decoder.dtype,
                decoder.device,
                bank_elements=CUDA_BANK_ELEMENTS,
                entries=CUDA_ENTRIES,
                units=CUDA_UNITS,
            )
        self.planner = KernelPlanner(setting_of(decoder, self.tables))
        self.heads = HeadReader(decoder.spec.n_heads, decoder.device)
        self.watcher = SiteWatcher()
        self.forward = KernelForward(decoder)
        self.graphs: DecodeGraphs | None = None
        if cuda if config.decode_graphs is None else config.decode_graphs:
            self.graphs = DecodeGraphs(self.forward, cache, self.tables, config.max_sequences)
        if cuda:
            self._warm_up(config)

    def execute(self, batch: StepBatch) -> Executed:
        plan = self.planner.plan(batch.programs, len(batch.token_ids))
        heads = self.heads.read(batch.programs, len(batch.token_ids))
        watched = None if batch.watch is None else self.watcher.follow(plan.observers, batch.watch.layout)
        if self.graphs is not None and not batch.sparse and self.graphs.takes(batch, plan):
            return self.graphs.execute(batch, plan, heads, watched)
        peaks = None if heads is None else heads.peaks
        if watched is not None:
            peaks = watched.layout.peaks(heads, len(batch.token_ids))
        executed = self._execute(batch, plan, peaks, watched)
        if heads is not None:
            executed.outcome.readouts += heads.values(peaks)
        return executed

    def trace(self, batch: StepBatch, *, edited: bool) -> FiniteProbe:
        probe = FiniteProbe()
        plan = self.planner.plan(batch.programs, len(batch.token_ids)) if edited else empty_plan(len(batch.token_ids))
        arrays = packed(step_arrays(batch, plan), self.decoder.device)
        rows = program_rows(arrays, columns=plan.n_columns, items=plan.n_items, readings=plan.n_readings)
        programs = programs_of(self.tables, self.decoder.spec, rows, plan)
        programs = replace(programs, observers=probe, breaks=frozenset(range(self.tables.n_places)))
        attention = RaggedBatch.build(batch.spans.as_lists(), batch.block_size, self.decoder.device)
        self.forward(kernel_inputs(arrays, attention, programs, None), self.cache.pools)
        return probe

    def _execute(
        self, batch: StepBatch, plan: KernelPlan, peaks: Peaks | None, watched: WatchedSites | None = None
    ) -> Executed:
        """Runs a step launch by launch, as prefill needs it, and activations that are read between the kernels."""
        device = self.decoder.device
        arrays = packed(step_arrays(batch, plan), device)
        rows = program_rows(arrays, columns=plan.n_columns, items=plan.n_items, readings=plan.n_readings)
        programs = programs_of(self.tables, self.decoder.spec, rows, plan)
        if watched is not None:
            programs = watched.between(programs)
        if plan.observers is not None:
            plan.observers.begin(arrays["positions"])
        attention = RaggedBatch.build(batch.spans.as_lists(), batch.block_size, device)
        inputs = kernel_inputs(arrays, attention, programs, peaks)
        products = self.sparse.follow(batch.sparse)
        x, normed = run_step(self.forward, self.tables, self.cache.pools, inputs, arrays, products)
        if watched is not None and peaks is not None:
            watched.layout.look_at_heads(peaks)
        wanted = batch.logit_rows
        logits = self.decoder.unembed(normed[wanted] if len(wanted) != len(normed) else normed)
        outcome = plan.outcome(rows.opened, rows.readings, x)
        return Executed(finite_rows(x).cpu().numpy(), logits, outcome)

    def _warm_up(self, config: EngineConfig) -> None:
        """Compiles every kernel and captures the graphs of decode steps, before anybody waits for them.

        Variants differ by integers that are 1 or a multiple of 16, by the number of sequences that decode, which sets
        how a context is shared out, and by what a program makes a step launch.
        """
        started = time.monotonic()
        context = min(self.decoder.spec.context_length, self.cache.n_blocks * self.cache.block_size)
        for rows in sorted({1, 2, 3, 16, 17, min(config.max_tokens_per_step, context)}):
            batch = self._padding([rows])
            for plan in _variants(rows, self.tables.n_places):
                self._execute(batch, plan, None)
            for read in (self._all_peaks(rows), self._all_peaks(rows).with_off_sink()):
                self._execute(batch, empty_plan(rows), read)
        for sequences in (n for n in SIZES if n <= config.max_sequences):
            for offset in (0, context - 1):
                batch = self._padding([1] * sequences, offset)
                for peaks in (None, self._all_peaks(sequences), self._all_peaks(sequences).with_off_sink()):
                    self._execute(batch, empty_plan(sequences), peaks)
        if self.graphs is not None:
            self.graphs.capture_all()
        torch.cuda.synchronize()
        log.info("kernels compiled and graphs captured in %.1f s", time.monotonic() - started)

    def _all_peaks(self, rows: int) -> Peaks:
        return all_peaks(self.decoder.spec, rows, self.decoder.device)

    def _padding(self, rows: list[int], offset: int = 0) -> StepBatch:
        """Returns a batch of rows that are written nowhere. They read block 0, which belongs to nobody."""
        size, n = self.cache.block_size, np.array(rows, dtype=np.int64)
        offsets = np.full(len(n), offset, dtype=np.int64)
        spans = Spans(n, offsets, np.zeros((len(n), -(-(offset + max(rows)) // size)), dtype=np.int64))
        return StepBatch(np.zeros(n.sum(), dtype=np.int64), spans, [], [0], size, padding=True)


def _variants(rows: int, n_places: int) -> list[KernelPlan]:
    """Returns plans without programs that launch each kernel there is, fused and apart."""
    plans = [empty_plan(rows) for _ in range(4)]
    plans[1].attn_z, plans[1].neurons, plans[1].most_neuron_entries = True, True, 1
    plans[2].attn_z, plans[2].neurons, plans[2].neuron_rows = True, True, True
    plans[3].breaks = set(range(n_places))
    return plans
