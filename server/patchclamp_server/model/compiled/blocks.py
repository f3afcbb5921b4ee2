"""Runs the blocks of a decoder as compiled code, and stops where hooks want to see or edit an activation.

Blocks between two stops are one call without Python (stages.py), shared by the threads of a team. Products are those of
cpu/invariant, attention is row_attention.py: the bits are those of the loop over layers in decoder.py.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.invariant import rows
from patchclamp_server.cpu.invariant.products import CodeTiles, FloatTiles, tile_starts
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.quantized import GROUP, LANES
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.compiled.job import (
    LAYER_FIELDS,
    NORMS,
    PRODUCTS,
    CompiledVisits,
    Format,
    Job,
    Layer,
    Matrix,
    Stage,
)
from patchclamp_server.model.compiled.team import team_of
from patchclamp_server.model.sites import PREACTIVATION_SITES, Site

if TYPE_CHECKING:
    from patchclamp_server.model.decoder import Block, Decoder, SiteHooks, StepInputs

Place = tuple[Site, int]
# Flags of stages that add to the residual stream first.
_ADD_ATTN_OUT, _ADD_MLP_OUT = 1, 2


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
        self._layers = np.zeros((spec.n_layers, LAYER_FIELDS), dtype=np.int64)
        self._epsilons = np.zeros((spec.n_layers, 5), dtype=np.float32)
        kinds = list(decoder.rotary)
        self._rotary = np.zeros((max(1, len(kinds)), 3), dtype=np.int64)
        for i, (cos, signed_sin) in enumerate(decoder.rotary.values()):
            self._rotary[i] = cos.data_ptr(), signed_sin.data_ptr(), cos.shape[1]
        for layer, block in enumerate(decoder.blocks):
            kind = spec.rotary_kinds[layer]
            self._describe(layer, block, kinds.index(kind) if kind in kinds else -1)
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

    def _describe(self, layer: int, block: "Block", rotary_kind: int) -> None:
        own = self._layers[layer]
        for i, name in enumerate(NORMS):
            norm = getattr(block, name)
            if norm is not None:
                own[2 * i] = norm.weight.data_ptr()
                own[2 * i + 1] = 0 if norm.bias is None else norm.bias.data_ptr()
                self._epsilons[layer, i] = norm.eps
        if block.head_norms is not None:
            own[Layer.HEAD_NORMS] = block.head_norms.weights.data_ptr()
            self._epsilons[layer, 4] = block.head_norms.eps
        own[Layer.ROTARY_KIND] = rotary_kind
        own[Layer.WINDOW] = self.decoder.spec.windows[layer]
        for i, name in enumerate(PRODUCTS):
            linear: Linear = getattr(block, name)
            product = linear.by_rows
            matrix = own[Layer.MATRICES + i * len(Matrix) :]
            if isinstance(product, CodeTiles):
                codes, scales = product.quantized.codes, product.quantized.scale_and_low
                matrix[Matrix.FORMAT] = Format.CODES_4 if product.quantized.bits == 4 else Format.CODES_8
                matrix[Matrix.WEIGHTS], matrix[Matrix.SCALES] = codes.ctypes.data, scales.ctypes.data
                matrix[Matrix.BLOCKS], matrix[Matrix.DEPTH] = codes.shape[0], codes.shape[1] * GROUP
            else:
                assert isinstance(product, FloatTiles)
                matrix[Matrix.FORMAT], matrix[Matrix.WEIGHTS] = Format.FLOATS, product.weights.ctypes.data
                matrix[Matrix.BLOCKS], matrix[Matrix.DEPTH] = product.weights.shape[:2]
            matrix[Matrix.BIAS] = 0 if linear.bias is None else linear.bias.data_ptr()

    def run(self, x: Tensor, layers: range, step: "StepInputs", pools: Sequence[Tensor], hooks: "SiteHooks") -> Tensor:
        """Returns what Decoder.run_blocks does. `hooks` say what they visit."""
        spec = self.decoder.spec
        assert hooks.visited is not None
        course = self._course(layers, frozenset(hooks.visited), step.compiled_visits)
        n = len(x)
        x = x.clone(memory_format=torch.contiguous_format)
        width = spec.n_heads * spec.head_dim
        starts = tile_starts(n)
        packed = int(starts[-1])
        widest = max(spec.d_model, spec.d_ff, width)
        memory = {
            Job.X: x,
            Job.H: torch.empty(n, spec.d_model),
            Job.PACKED: torch.empty(packed * widest if packed > 1 else 0),
            Job.SUMS: torch.empty(packed * (widest // GROUP)),
            Job.QKV: torch.empty(n, width + 2 * spec.n_kv_heads * spec.head_dim),
            Job.Q: torch.empty(n, width),
            Job.Z: torch.empty(n, width),
            Job.ATTN_OUT: torch.empty(n, spec.d_model),
            Job.HIDDEN: torch.empty(n, spec.d_ff * (1 + spec.family.gated)),
            Job.NEURONS: torch.empty(n, spec.d_ff),
            Job.MLP_OUT: torch.empty(n, spec.d_model),
        }
        job = self._job.copy()
        for field, tensor in memory.items():
            job[field] = tensor.data_ptr()
        counters = np.zeros((len(course.stages), 8), dtype=np.int64)
        # The pools are those of `layers`.
        addresses = np.zeros(spec.n_layers, dtype=np.int64)
        addresses[layers.start : layers.stop] = [pool.data_ptr() for pool in pools]
        batch = step.attention
        # Compiled code checks no index.
        context, addressable = int(self._job[Job.CONTEXT]), pools[0].shape[1] * pools[0].shape[2]
        positions = _within(step.positions.numpy(), context or spec.context_length, "position")
        slots = _within(step.slots.numpy(), addressable, "slot")
        tables = _within(batch.tables, pools[0].shape[1], "block")
        tiles = np.ascontiguousarray(batch.tiles, dtype=np.int64)
        threads = torch.get_num_threads()
        job[Job.STAGES], job[Job.COUNTERS], job[Job.THREADS] = course.stages.ctypes.data, counters.ctypes.data, threads
        job[Job.ROWS], job[Job.TILES], job[Job.STARTS] = n, len(starts) - 1, starts.ctypes.data
        job[Job.POSITIONS], job[Job.SLOTS] = positions.ctypes.data, slots.ctypes.data
        job[Job.POOLS], (job[Job.POOL_BLOCKS], job[Job.BLOCK_SIZE]) = addresses.ctypes.data, pools[0].shape[1:3]
        job[Job.TABLES], (job[Job.SPANS], job[Job.TABLE_WIDTH]) = tables.ctypes.data, tables.shape
        job[Job.ATTENTION_TILES], job[Job.N_ATTENTION_TILES] = tiles.ctypes.data, len(tiles)
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

    def _make_course(self, layers: range, visited: Set[Place], compiled: CompiledVisits | None) -> _Course:
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

        for layer in layers:
            stop(Site.RESID_PRE)
            run(Stage.ATTN_NORM, pending)
            pending = 0
            run(Stage.QKV)
            run(Stage.HEADS)
            stop(Site.ATTN_Q)
            run(Stage.ATTEND)
            stop(Site.ATTN_Z)
            run(Stage.PACK_Z)
            run(Stage.ATTN_OUTPUT)
            if self._has_post_norms:
                run(Stage.POST_ATTN_NORM)
            stop(Site.ATTN_OUT)
            if parallel:
                run(Stage.MLP_NORM)
                pending = _ADD_ATTN_OUT
            else:
                pending = _ADD_ATTN_OUT
                stop(Site.RESID_MID)
                run(Stage.MLP_NORM, pending)
                pending = 0
            run(Stage.MLP_INPUT)
            for site in PREACTIVATION_SITES:
                stop(site)
            if (Site.MLP_POST, layer) in visited:
                run(Stage.ACTIVATION)
                stop(Site.MLP_POST)
                run(Stage.PACK_NEURONS)
            else:
                run(Stage.ACTIVATION, 1)
            run(Stage.MLP_OUTPUT)
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


def _peak_places(peaks: Peaks, n_layers: int) -> NDArray[np.int64]:
    """Returns the index of each layer in the arrays of the peaks, or -1."""
    places = np.full(n_layers, -1, dtype=np.int64)
    for layer, own in peaks.layers.items():
        places[layer] = own.place
    return places


def can_compile(decoder: "Decoder") -> bool:
    """Returns whether the blocks can be compiled: products of rows, whose outputs fill blocks of 16."""
    return decoder.batch_invariant and all(
        getattr(block, name).out % LANES == 0 for block in decoder.blocks for name in PRODUCTS
    )
