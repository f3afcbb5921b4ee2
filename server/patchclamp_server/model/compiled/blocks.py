"""Runs the blocks of a decoder as compiled code, and stops where hooks want to see or edit an activation.

Blocks between two stops are one call without Python (stages.py), shared by the threads of a team. Products are those of
cpu/invariant, attention is row_attention.py: the bits are those of the loop over layers in decoder.py.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.integers.products import record_bytes
from patchclamp_server.cpu.invariant import rows
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.products import StoredProduct
from patchclamp_server.cpu.sparse.preview import Preview
from patchclamp_server.cpu.vector import UNIT
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.attention.pools import Pool, TiledPool, padded
from patchclamp_server.model.compiled.job import (
    LAYER_FIELDS,
    NORMS,
    PRODUCTS,
    CompiledVisits,
    Job,
    Layer,
    Matrix,
    SparseLayer,
    Stage,
)
from patchclamp_server.model.compiled.sparse_rows import BY_ROW, DENSE, MIXED, RUN_SPARSE, preview_table
from patchclamp_server.model.compiled.team import team_of
from patchclamp_server.model.row_operators import Norm
from patchclamp_server.model.sites import PREACTIVATION_SITES, Site

if TYPE_CHECKING:
    from patchclamp_server.model.decoder import Block, Decoder, SiteHooks, StepInputs

Place = tuple[Site, int]
# Flags of stages that add to the residual stream first, and of those that round what a product takes.
_ADD_ATTN_OUT, _ADD_MLP_OUT, _ROUND = 1, 2, 4


@dataclass(frozen=True, eq=False)
class _Course:
    """`stages` [n, 3] in their order, the compiled visits of some [calls, 3], and what to do: run stages up to an
    index, then visit a site of a layer."""

    stages: NDArray[np.int64]
    calls: NDArray[np.int64]
    stops: tuple[tuple[int, Place | None], ...]


class CompiledBlocks:
    def __init__(self, decoder: "Decoder") -> None:
        """`decoder` has products that can be compiled: see `can_compile`."""
        self.decoder = decoder
        spec = decoder.spec
        self._layers = np.zeros((spec.n_layers + 2, LAYER_FIELDS), dtype=np.int64)
        self._epsilons = np.zeros((spec.n_layers + 2, 5), dtype=np.float32)
        kinds = list(decoder.rotary)
        self._rotary = np.zeros((max(1, len(kinds)), 3), dtype=np.int64)
        for i, (cos, signed_sin) in enumerate(decoder.rotary.values()):
            self._rotary[i] = cos.data_ptr(), signed_sin.data_ptr(), cos.shape[1]
        for layer, block in enumerate(decoder.blocks):
            kind = spec.rotary_kinds[layer]
            self._describe(layer, block, kinds.index(kind) if kind in kinds else -1)
        # The end of the model is as the beginning of a layer: a norm and a product.
        for end in range(spec.n_layers, spec.n_layers + 2):
            self._describe_norm(end, 0, decoder.final_norm)
            self._describe_product(end, 0, decoder.unembedding)
        self._rounded_unembedding: StoredProduct | None = None
        self._preview: Preview | None = None
        self._preview_table = np.zeros((0, len(SparseLayer)), dtype=np.int64)
        self._constants = np.array([spec.attention_scale, spec.attention_soft_cap], dtype=np.float32)
        self._has_post_norms = decoder.blocks[0].post_attn_norm is not None
        self._job = np.zeros(len(Job), dtype=np.int64)
        context = max((len(cos) for cos, _ in decoder.rotary.values()), default=0)
        for field, value in {
            Job.LAYERS: self._layers.ctypes.data,
            Job.EPSILONS: self._epsilons.ctypes.data,
            Job.ROTARY: self._rotary.ctypes.data,
            Job.CONSTANTS: self._constants.ctypes.data,
            Job.CONTEXT: context,
            Job.D_MODEL: spec.d_model,
            Job.D_FF: spec.d_ff,
            Job.GATED: spec.family.gated,
            Job.ACTIVATION: rows.CODES[spec.activation],
            Job.N_HEADS: spec.n_heads,
            Job.N_KV_HEADS: spec.n_kv_heads,
            Job.HEAD_DIM: spec.head_dim,
        }.items():
            self._job[field] = value
        self._course = lru_cache(256)(self._make_course)
        # Is told of each step how many rows it has, its stages, and their counters, as in Job.
        self.on_step: Callable[[int, NDArray[np.int64], NDArray[np.int64]], None] | None = None

    def _describe(self, layer: int, block: "Block", rotary_kind: int) -> None:
        own = self._layers[layer]
        for i, name in enumerate(NORMS):
            self._describe_norm(layer, i, getattr(block, name))
        for i, name in enumerate(PRODUCTS):
            self._describe_product(layer, i, getattr(block, name))
        if block.head_norms is not None:
            own[Layer.HEAD_NORMS] = block.head_norms.weights.data_ptr()
            self._epsilons[layer, 4] = block.head_norms.eps
        own[Layer.ROTARY_KIND] = rotary_kind
        own[Layer.WINDOW] = self.decoder.spec.windows[layer]

    def _describe_norm(self, layer: int, place: int, norm: Norm | None) -> None:
        if norm is not None:
            bias = 0 if norm.bias is None else norm.bias.data_ptr()
            self._layers[layer, 2 * place : 2 * place + 2] = norm.weight.data_ptr(), bias
            self._epsilons[layer, place] = norm.eps

    def _describe_product(self, layer: int, place: int, linear: Linear, product: StoredProduct | None = None) -> None:
        product = product or linear.product
        assert product is not None
        parts = product.parts
        matrix = self._layers[layer, Layer.MATRICES + place * len(Matrix) :]
        matrix[Matrix.PARTS], matrix[Matrix.N_PARTS] = parts.ctypes.data, len(parts)
        matrix[Matrix.OUT], matrix[Matrix.DEPTH] = linear.shape
        matrix[Matrix.BIAS] = 0 if linear.bias is None else linear.bias.data_ptr()
        matrix[Matrix.ROUNDS] = product.rounds

    def _rounds(self, layer: int, place: int) -> bool:
        return bool(self._layers[layer, Layer.MATRICES + place * len(Matrix) + Matrix.ROUNDS])

    def _records(self, rows: int) -> Tensor:
        """Memory for the records of any input."""
        matrices = self._layers[:, Layer.MATRICES :].reshape(len(self._layers), -1, len(Matrix))
        widths = matrices[..., Matrix.DEPTH] * matrices[..., Matrix.ROUNDS]
        return torch.empty(rows, record_bytes(int(widths.max())), dtype=torch.uint8)

    def round_unembedding(self) -> None:
        """Lets `logits` take states in 8 bits where it is asked to, and the unembedding has codes."""
        linear, end = self.decoder.unembedding, self.decoder.spec.n_layers + 1
        if self._rounded_unembedding is not None or linear.matrix is None or linear.matrix.shape[1] % UNIT:
            return
        self._rounded_unembedding = product = StoredProduct(linear.matrix, rounds=True)
        self._describe_product(end, 0, linear, product)
        # The preview is a product with the input of an MLP.
        self._describe_product(end, PRODUCTS.index("mlp_input"), linear, product)
        if (preview := Preview.of(linear)) is not None:
            self._preview_table = preview_table(preview.tiles, end)
            self._preview = preview

    def logits(self, x: Tensor, *, rounded: bool = False) -> Tensor:
        """Returns what Decoder.logits does before a soft cap, [N, vocab], of residual states [N, d_model]."""
        end = self.decoder.spec.n_layers + rounded
        memory = {Job.X: x.contiguous(), Job.H: torch.empty(len(x), self.decoder.spec.d_model)}
        if rounded and self._preview is not None:
            logits = self._finish(memory, (Stage.ATTN_NORM, _ROUND), end, Stage.SPARSE_INPUT)
            self._preview.refine(memory[Job.H], logits)
            return logits
        return self._finish(memory, (Stage.ATTN_NORM, _ROUND if self._rounds(end, 0) else 0), end)

    def unembed(self, h: Tensor) -> Tensor:
        """Does so for states after the final norm."""
        return self._finish({Job.H: h.contiguous()}, (Stage.ROUND, Stage.QKV), self.decoder.spec.n_layers)

    def _finish(
        self, memory: dict[Job, Tensor], first: tuple[Stage, int], end: int, product: Stage = Stage.QKV
    ) -> Tensor:
        """Runs the product of an end of the model, after a stage with its flags."""
        job, threads = self._job.copy(), torch.get_num_threads()
        rows = len(memory[Job.H])
        logits = torch.empty(rows, self.decoder.unembedding.out)
        before = [first] if first[0] is not Stage.ROUND or self._rounds(end, 0) else []
        course = [(stage, end, flags) for stage, flags in [*before, (product, 0)]]
        stages = np.array(course, dtype=np.int64)
        counters = np.zeros((len(stages), 8), dtype=np.int64)
        memory = memory | {Job.QKV: logits, Job.HIDDEN: logits, Job.ROUNDED: self._records(rows)}
        keep = np.zeros((end + 1, rows), dtype=np.int64)
        job[Job.SPARSE], job[Job.RUN_SPARSE] = self._preview_table.ctypes.data, RUN_SPARSE
        job[Job.KEEP] = keep.ctypes.data
        for field, tensor in memory.items():
            job[field] = tensor.data_ptr()
        job[Job.STAGES], job[Job.COUNTERS], job[Job.THREADS] = stages.ctypes.data, counters.ctypes.data, threads
        job[Job.ROWS], job[Job.FIRST], job[Job.LAST] = rows, 0, len(stages)
        team_of(threads).run(job)
        return logits

    def run(self, x: Tensor, layers: range, step: "StepInputs", pools: Sequence[Pool], hooks: "SiteHooks") -> Tensor:
        """Returns what Decoder.run_blocks does. `hooks` say what they visit."""
        spec = self.decoder.spec
        assert hooks.visited is not None
        sparse = step.sparse
        kinds = b"" if sparse is None else sparse.kinds
        course = self._course(layers, frozenset(hooks.visited), step.compiled_visits, kinds)
        n = len(x)
        x = x.clone(memory_format=torch.contiguous_format)
        width = spec.n_heads * spec.head_dim
        memory = {
            Job.X: x,
            Job.H: torch.empty(n, spec.d_model),
            Job.QKV: torch.empty(n, width + 2 * spec.n_kv_heads * spec.head_dim),
            Job.Q: torch.empty(n, width),
            Job.Z: torch.empty(n, width),
            Job.ATTN_OUT: torch.empty(n, spec.d_model),
            Job.HIDDEN: torch.empty(n, spec.d_ff * (1 + spec.family.gated)),
            Job.NEURONS: torch.empty(n, spec.d_ff),
            Job.MLP_OUT: torch.empty(n, spec.d_model),
            Job.ROUNDED: self._records(n),
        }
        job = self._job.copy()
        for field, tensor in memory.items():
            job[field] = tensor.data_ptr()
        held = () if sparse is None else sparse.fill(job, max(spec.d_model, spec.d_ff, width))
        counters = np.zeros((len(course.stages), 8), dtype=np.int64)
        # The pools are those of `layers`.
        addresses = np.zeros((spec.n_layers, 4), dtype=np.int64)
        tiled = [_tiled(pool) for pool in pools]
        addresses[layers.start : layers.stop] = [pool.addresses for pool in tiled]
        pool_blocks, block_size = pools[0].n_blocks, pools[0].block_size
        batch = step.attention
        # Compiled code checks no index.
        context, addressable = int(self._job[Job.CONTEXT]), pool_blocks * block_size
        positions = _within(step.positions.numpy(), context or spec.context_length, "position")
        slots = _within(step.slots.numpy(), addressable, "slot")
        tables = _within(batch.tables, pool_blocks, "block")
        tiles = np.ascontiguousarray(batch.tiles, dtype=np.int64)
        threads = torch.get_num_threads()
        parts = batch.parts(spec.n_kv_heads, threads)
        part_counters, records = parts.memory(spec.n_heads // spec.n_kv_heads, padded(spec.head_dim))
        job[Job.STAGES], job[Job.COUNTERS], job[Job.THREADS] = course.stages.ctypes.data, counters.ctypes.data, threads
        job[Job.ROWS] = n
        job[Job.POSITIONS], job[Job.SLOTS] = positions.ctypes.data, slots.ctypes.data
        job[Job.POOLS], job[Job.POOL_FORMAT] = addresses.ctypes.data, tiled[0].keys.itemsize
        job[Job.POOL_TOKENS], job[Job.BLOCK_SIZE] = addressable, block_size
        job[Job.TABLES], (job[Job.SPANS], job[Job.TABLE_WIDTH]) = tables.ctypes.data, tables.shape
        job[Job.ATTENTION_TILES], job[Job.N_ATTENTION_TILES] = tiles.ctypes.data, len(tiles)
        job[Job.PARTS], job[Job.N_PARTS] = parts.items.ctypes.data, len(parts.items)
        job[Job.PART_COUNTERS], job[Job.N_PART_COUNTERS] = part_counters.ctypes.data, len(part_counters)
        job[Job.RECORDS], job[Job.N_RECORDS] = records.ctypes.data, len(records)
        peaks = step.peaks
        if peaks is not None and peaks.layers:
            peak_of_layer = _peak_places(peaks, spec.n_layers)
            job[Job.PEAK_AT], job[Job.PEAK] = peaks.positions.data_ptr(), peaks.probabilities.data_ptr()
            job[Job.OFF_SINK] = 0 if peaks.off_sink is None else peaks.off_sink.data_ptr()
            job[Job.PEAK_PLACES], job[Job.PEAK_OF_LAYER] = len(peaks.positions), peak_of_layer.ctypes.data
        job[Job.CALLS] = course.calls.ctypes.data
        team = team_of(threads)
        first = 0
        for last, place in course.stops:
            if last > first:
                job[Job.FIRST], job[Job.LAST] = first, last
                team.run(job)
                first = last
            if place is not None:
                self._visit(place, memory, step, hooks)
        if self.on_step is not None:
            self.on_step(n, course.stages, counters)
        del held
        return x

    def _visit(self, place: Place, memory: dict[Job, Tensor], step: "StepInputs", hooks: "SiteHooks") -> None:
        site, layer = place
        if site in PREACTIVATION_SITES:
            # Gates and ups are parts of one array; their places say whether hooks get a copy.
            if place in step.visited_preactivations:
                visited = {site: step.visited_preactivations[place]}
                self.decoder.visit_preactivations(layer, memory[Job.HIDDEN], hooks, visited)
        elif site is not Site.ATTN_Q or layer in step.visited_queries:
            hooks.visit(site, layer, memory[_MEMORY[site]])

    def _make_course(
        self, layers: range, visited: Set[Place], compiled: CompiledVisits | None, kinds: bytes
    ) -> _Course:
        parallel = self.decoder.spec.parallel_residual
        stages: list[tuple[int, int, int]] = []
        stops: list[tuple[int, Place | None]] = []
        pending = 0
        calls: list[tuple[int, int, int]] = []

        def stop(site: Site) -> bool:
            nonlocal pending
            if (site, layer) not in visited:
                return False
            if site in _RESIDUAL and pending:
                stages.append((Stage.ADD, layer, pending))
                pending = 0
            if compiled is not None and (own := compiled.calls.get((site, layer))) is not None:
                for call in own:
                    stages.append((Stage.CALL, _MEMORY[site], len(calls)))
                    calls.append(call)
            else:
                stops.append((len(stages), (site, layer)))
            return True

        def run(stage: Stage, flags: int = 0) -> None:
            stages.append((stage, layer, flags))

        def rounding(product: Stage) -> int:
            return _ROUND if self._rounds(layer, _PRODUCT_STAGES.index(product)) else 0

        # Its value is read by stop and run.
        for layer in layers:
            kind = kinds[layer] if kinds else DENSE
            rounds = _ROUND if kind else 0
            stop(Site.RESID_PRE)
            run(Stage.ATTN_NORM, pending | rounding(Stage.QKV))
            pending = 0
            run(Stage.QKV)
            run(Stage.HEADS)
            stop(Site.ATTN_Q)
            run(Stage.ATTEND)
            stop(Site.ATTN_Z)
            if rounding(Stage.ATTN_OUTPUT):
                run(Stage.ROUND, Stage.ATTN_OUTPUT)
            run(Stage.ATTN_OUTPUT)
            if self._has_post_norms:
                run(Stage.POST_ATTN_NORM)
            stop(Site.ATTN_OUT)
            if parallel:
                run(Stage.MLP_NORM, rounding(Stage.MLP_INPUT) or rounds)
                pending = _ADD_ATTN_OUT
            else:
                pending = _ADD_ATTN_OUT
                stop(Site.RESID_MID)
                run(Stage.MLP_NORM, pending | (rounding(Stage.MLP_INPUT) or rounds))
                pending = 0
            run(Stage.SPARSE_INPUT if kind else Stage.MLP_INPUT)
            for site in PREACTIVATION_SITES:
                stop(site)
            # What is visited is rounded afterwards, and so is what sparse rows keep.
            visits_neurons = (Site.MLP_POST, layer) in visited
            run(Stage.ACTIVATION, 0 if visits_neurons or kind else rounding(Stage.MLP_OUTPUT))
            if kind:
                run(Stage.CHOOSE)
            stop(Site.MLP_POST)
            if kind & BY_ROW:
                run(Stage.KEPT)
                if kind & MIXED:
                    if rounding(Stage.MLP_OUTPUT):
                        run(Stage.ROUND, Stage.MLP_OUTPUT)
                    run(Stage.SPARSE_OUTPUT, 1)
                run(Stage.KEPT_SUM)
            else:
                if rounds or (visits_neurons and rounding(Stage.MLP_OUTPUT)):
                    run(Stage.ROUND, Stage.MLP_OUTPUT)
                run(Stage.SPARSE_OUTPUT if kind else Stage.MLP_OUTPUT)
            if self._has_post_norms:
                run(Stage.POST_MLP_NORM)
            stop(Site.MLP_OUT)
            pending |= _ADD_MLP_OUT
            stop(Site.RESID_POST)
        if pending:
            run(Stage.ADD, pending)
        stops.append((len(stages), None))
        by_threes = [np.array(numbers, dtype=np.int64).reshape(-1, 3) for numbers in (stages, calls)]
        return _Course(by_threes[0], by_threes[1], tuple(stops))


# In the order of PRODUCTS.
_PRODUCT_STAGES = (Stage.QKV, Stage.ATTN_OUTPUT, Stage.MLP_INPUT, Stage.MLP_OUTPUT)
_RESIDUAL = frozenset({Site.RESID_PRE, Site.RESID_MID, Site.RESID_POST})
_MEMORY = {
    Site.RESID_PRE: Job.X,
    Site.RESID_MID: Job.X,
    Site.RESID_POST: Job.X,
    Site.ATTN_Q: Job.Q,
    Site.ATTN_Z: Job.Z,
    Site.ATTN_OUT: Job.ATTN_OUT,
    Site.MLP_POST: Job.NEURONS,
    Site.MLP_OUT: Job.MLP_OUT,
}


def _within(indices: NDArray[Any], end: int, name: str) -> NDArray[np.int64]:
    """Returns the indices as int64 that lie together. Raises IndexError unless all are in 0 ≤ i < end."""
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < end:
        raise IndexError(f"a {name} is outside of 0 to {end - 1}")
    return np.ascontiguousarray(indices, dtype=np.int64)


def _tiled(pool: Pool) -> TiledPool:
    assert isinstance(pool, TiledPool)
    return pool


def _peak_places(peaks: Peaks, n_layers: int) -> NDArray[np.int64]:
    """Returns the index of each layer in the arrays of the peaks, or -1."""
    places = np.full(n_layers, -1, dtype=np.int64)
    for layer, own in peaks.layers.items():
        places[layer] = own.place
    return places


def can_compile(decoder: "Decoder") -> bool:
    """Returns whether the blocks can be compiled: their bits and those of Python's are then the same."""
    return decoder.batch_invariant
