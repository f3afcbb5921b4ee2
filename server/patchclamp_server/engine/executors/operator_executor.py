"""Runs steps by torch operators: the decoder calls the operators of the step's programs at its sites."""

import torch
from torch import Tensor

from patchclamp_server.engine.batch import Executed, StepBatch
from patchclamp_server.engine.executors.sparse_decoder import SparseBlocks, gathered_products
from patchclamp_server.engine.kv_cache import KvCache
from patchclamp_server.interventions.head_readings import HeadReader
from patchclamp_server.interventions.plan import StepPlan
from patchclamp_server.interventions.planner import Planner
from patchclamp_server.interventions.setting import Setting
from patchclamp_server.interventions.tables import Tables
from patchclamp_server.model.attention.batch import AttentionBatch
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.compiled.job import CompiledVisits
from patchclamp_server.model.decoder import Decoder, StepInputs
from patchclamp_server.model.overflow import FiniteProbe, finite_rows
from patchclamp_server.model.sites import Site, every_preactivation
from patchclamp_server.monitoring.sites import SiteWatcher, WatchedSites
from patchclamp_server.sparsity.glance_rows import GlanceRows
from patchclamp_server.sparsity.mlp import SparseModel


class OperatorExecutor:
    def __init__(self, model: SparseModel, cache: KvCache) -> None:
        decoder = model.decoder
        self.decoder = decoder
        self.sparse = SparseBlocks(model, gathered_products)
        self.cache = cache
        self.threads = torch.get_num_threads()
        self.tables = Tables(decoder.dtype, decoder.device)
        self.planner = Planner(setting_of(decoder, self.tables))
        self.heads = HeadReader(decoder.spec.n_heads, decoder.device)
        self.watcher = SiteWatcher()

    def execute(self, batch: StepBatch) -> Executed:
        torch.set_num_threads(self.threads)
        plan = self.planner.plan(batch.programs)
        heads = self.heads.read(batch.programs, len(batch.token_ids))
        peaks = None if heads is None else heads.peaks
        hooks: StepPlan | WatchedSites = plan
        if batch.watch is not None:
            peaks = batch.watch.layout.peaks(heads, len(batch.token_ids))
            hooks = self.watcher.follow(plan, batch.watch.layout)
        glanced = self.sparse.glance(batch.sparse, len(batch.token_ids), hooks.visited)
        step = self._inputs(batch, plan, peaks, hooks.visited_preactivations, hooks.compiled_visits, glanced)
        plan.begin(step.positions)
        products = self.sparse.follow(batch.sparse) if glanced is None else None
        x = self.decoder.forward(step, self.cache.pools, hooks, products)
        if glanced is not None:
            glanced.count()
        outcome = plan.finish(x)
        if heads is not None:
            outcome.readouts += heads.values(peaks)
        if batch.watch is not None and peaks is not None:
            batch.watch.layout.look_at_heads(peaks)
        finite = finite_rows(x).cpu().numpy()
        return Executed(finite, self._logits(x, batch), outcome)

    def _logits(self, x: Tensor, batch: StepBatch) -> Tensor:
        """Returns the logits of the rows that need them, of a glance as its policy has them."""
        rows = batch.logit_rows
        own = x[rows] if len(rows) != len(x) else x
        glanced = [part.rows for part in batch.sparse if part.selector.glanced is not None]
        if not glanced:
            return self.decoder.logits(own)
        if sum(part.stop - part.start for part in glanced) == len(x):
            return self.decoder.logits(own, rounded=True)
        rounded = torch.zeros(len(x), dtype=torch.bool)
        for part in glanced:
            rounded[part] = True
        rounded = rounded[rows]
        if rounded.all():
            return self.decoder.logits(own, rounded=True)
        logits = self.decoder.logits(own)
        if rounded.any():
            logits[rounded] = self.decoder.logits(own[rounded], rounded=True)
        return logits

    def trace(self, batch: StepBatch, *, edited: bool) -> FiniteProbe:
        plan = self.planner.plan(batch.programs if edited else [])
        step = self._inputs(batch, plan, None, every_preactivation(self.decoder.spec.n_layers))
        plan.begin(step.positions)
        probe = FiniteProbe(plan)
        self.decoder.forward(step, self.cache.pools, probe)
        return probe

    def _inputs(
        self,
        batch: StepBatch,
        plan: StepPlan,
        peaks: Peaks | None,
        visited_preactivations: dict[tuple[Site, int], bool],
        compiled_visits: CompiledVisits | None = None,
        glanced: GlanceRows | None = None,
    ) -> StepInputs:
        device = self.decoder.device
        return StepInputs(
            torch.from_numpy(batch.token_ids).to(device),
            torch.from_numpy(batch.positions).to(device),
            torch.from_numpy(batch.slots).to(device),
            AttentionBatch(batch.spans, batch.block_size, self.decoder.windows, device),
            plan.edited_queries,
            visited_preactivations,
            peaks,
            compiled_visits,
            None if glanced is None else glanced.rows,
        )


def setting_of(decoder: Decoder, tables: Tables) -> Setting:
    spec = decoder.spec
    return Setting(tables, spec.n_heads, spec.head_dim, spec.sites, decoder.device, decoder)
