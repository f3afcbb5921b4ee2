"""Steps on patchclamp_kernels: programs are rows of tables, and decode steps can be replayed as CUDA graphs."""

import logging
import time

import torch

from patchclamp_kernels.paged_attention import RaggedBatch
from patchclamp_server.engine.attention import Span
from patchclamp_server.engine.batch import Executed, StepBatch
from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.decode_graphs import DecodeGraphs
from patchclamp_server.engine.kernel_step import (
    finite_rows,
    kernel_inputs,
    program_rows,
    programs_of,
    run_step,
    step_arrays,
)
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.engine.operator_executor import setting_of
from patchclamp_server.engine.packed import packed
from patchclamp_server.interventions.kernel_plan import KernelPlan, KernelPlanner, empty_plan
from patchclamp_server.interventions.slots import SlotTables
from patchclamp_server.model.decoder import Decoder
from patchclamp_server.model.kernel_forward import KernelForward

log = logging.getLogger(__name__)

# What the tables have room for from the start on CUDA: graphs read them where they were when captured, and a table
# that grows moves. 64 Mi elements are 16,384 vectors of width 4,096.
_CUDA_BANK_ELEMENTS = 2**26
_CUDA_ROWS = 2**16


class KernelExecutor:
    def __init__(self, decoder: Decoder, cache: KvCache, config: EngineConfig) -> None:
        self.decoder = decoder
        self.cache = cache
        self.tables = SlotTables(decoder.spec.n_layers, decoder.dtype, decoder.device)
        cuda = decoder.device.type == "cuda"
        if cuda:
            self.tables = SlotTables(
                decoder.spec.n_layers,
                decoder.dtype,
                decoder.device,
                bank_elements=_CUDA_BANK_ELEMENTS,
                rows=_CUDA_ROWS,
            )
        self.planner = KernelPlanner(setting_of(decoder, self.tables), self.tables)
        self.forward = KernelForward(decoder)
        self.graphs: DecodeGraphs | None = None
        if cuda if config.decode_graphs is None else config.decode_graphs:
            self.graphs = DecodeGraphs(self.forward, cache, self.tables, config.max_sequences)
        if cuda:
            self._warm_up(config.max_tokens_per_step)

    def execute(self, batch: StepBatch) -> Executed:
        plan = self.planner.plan(batch.programs, len(batch.token_ids))
        if self.graphs is not None and self.graphs.takes(batch, plan):
            return self.graphs.execute(batch, plan)
        return self._execute(batch, plan)

    def _execute(self, batch: StepBatch, plan: KernelPlan) -> Executed:
        """Launch by launch: prefill, and programs whose activations are looked at between the kernels."""
        device = self.decoder.device
        arrays = packed(step_arrays(batch, plan), device)
        rows = program_rows(arrays, columns=plan.n_columns, items=plan.n_items, readings=plan.n_readings)
        programs = programs_of(self.tables, self.decoder.spec, rows, plan)
        if plan.observers is not None:
            plan.observers.begin(arrays["positions"], self.decoder.dtype)
        spans = [(span.n, span.offset, span.blocks) for span in batch.spans]
        attention = RaggedBatch.build(spans, batch.block_size, device)
        inputs = kernel_inputs(arrays, attention, programs)
        x, normed = run_step(self.forward, self.tables, self.cache.pools, inputs, arrays)
        wanted = batch.logit_rows
        logits = self.decoder.unembed(normed[wanted] if len(wanted) != len(normed) else normed)
        outcome = plan.outcome(rows.opened, rows.readings)
        return Executed(finite_rows(x).cpu().numpy(), logits, outcome)

    def _warm_up(self, most_rows: int) -> None:
        """Compiles every kernel and captures the graphs of decode steps, before anybody waits for them.

        Triton compiles integers that are 1, or multiples of 16, apart from others.
        """
        started = time.monotonic()
        size = self.cache.block_size
        for rows in sorted({1, 2, 3, 16, 17, most_rows}):
            for offset in (0, size):
                # Padding rows: their KV slot is -1, and block 0 is nobody's.
                span = Span(0, rows, offset, [0] * (-(-(offset + rows) // size)))
                batch = StepBatch([0] * rows, [span], [], [0], size, padding=True)
                for plan in _variants(rows):
                    self._execute(batch, plan)
        if self.graphs is not None:
            self.graphs.capture_all()
        torch.cuda.synchronize()
        log.info("kernels compiled and graphs captured in %.1f s", time.monotonic() - started)


def _variants(rows: int) -> list[KernelPlan]:
    """Plans without programs that launch each kernel there is."""
    plans = [empty_plan(rows) for _ in range(3)]
    plans[1].attn_z, plans[1].neurons, plans[1].most_neuron_entries = True, True, 1
    plans[2].attn_z, plans[2].neurons, plans[2].neuron_rows = True, True, True
    return plans
