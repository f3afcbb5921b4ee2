"""Plans the memory that serving takes, from what the headers of the files say; no weight is read.

    weights       Σ bytes of the tensors, in the format in which they are held
    KV cache      blocks · block tokens · bytes of a token's keys and values (model/attention/pools.py)
    tables        rotary (cos and sin of each position, for each kind), programs (interventions/tables.py)
    activations   of the largest step: its rows at each width of a block, and its logits twice
    runtime       the interpreter, torch, and what numba compiled

What requests bring, such as autoencoders, captured activations and the copies that sparse inference makes of weights,
comes on top.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from patchclamp_server.interventions.columns import FLOAT_COLUMNS, INT_COLUMNS
from patchclamp_server.interventions.tables import CUDA_BANK_ELEMENTS, CUDA_ENTRIES, CUDA_UNITS, DEFAULT_ROWS
from patchclamp_server.model.attention.pools import token_bytes
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.model.stored_tensors import StoredTensor
from patchclamp_server.sizes import shown_size

# Python's objects for a block of the KV cache: places in lists, the key of its prefix and two entries of dictionaries.
_BLOCK_OBJECTS = 512
# Columns of a unit: two whole numbers and four floats (tables.py).
_UNIT_BYTES = 24


@dataclass(frozen=True)
class PlanOptions:
    """`runtime` is in bytes. With `bytes_per_weight` matrices are held in so many bytes a weight, instead of as they
    are stored."""

    kv_block_size: int
    kv_dtype: torch.dtype
    max_tokens_per_step: int
    max_sequences: int
    dtype: torch.dtype
    device: str
    runtime: int
    bytes_per_weight: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part. The KV cache has `kv_blocks` that can be given out, and one more."""

    weights: int
    kv_cache: int
    tables: int
    activations: int
    runtime: int
    kv_blocks: int
    kv_block_size: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part, which is a label of a metric."""
        names = ("weights", "kv_cache", "tables", "activations", "runtime")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * self.kv_block_size

    def __str__(self) -> str:
        """Returns one line with all parts."""
        return (
            f"{shown_size(self.total)}: weights {shown_size(self.weights)}, "
            f"KV cache {shown_size(self.kv_cache)} ({self.kv_tokens:,} tokens), tables {shown_size(self.tables)}, "
            f"activations {shown_size(self.activations)}, runtime {shown_size(self.runtime)}"
        )


def plan(spec: DecoderSpec, tensors: Iterable[StoredTensor], kv_tokens: int, options: PlanOptions) -> MemoryPlan:
    """Returns the plan with room for `kv_tokens`, rounded down to whole blocks."""
    blocks = kv_tokens // options.kv_block_size
    return MemoryPlan(
        weights=sum(_held(tensor, options.bytes_per_weight) for tensor in tensors),
        kv_cache=(blocks + 1) * block_bytes(spec, options),
        tables=_rotary_tables(spec, options) + _program_tables(spec, options),
        activations=_activations(spec, options),
        runtime=options.runtime,
        kv_blocks=blocks,
        kv_block_size=options.kv_block_size,
    )


def block_bytes(spec: DecoderSpec, options: PlanOptions) -> int:
    """Returns the bytes of one block of the KV cache, for all layers, and of what is known of it."""
    tiled = not options.device.startswith("cuda") and options.dtype == torch.float32
    token = token_bytes(spec.n_layers, spec.n_kv_heads, spec.head_dim, options.kv_dtype, tiled=tiled)
    return options.kv_block_size * token + _BLOCK_OBJECTS


def _held(tensor: StoredTensor, bytes_per_weight: int | None) -> int:
    if bytes_per_weight is None or len(tensor.shape) < 2:
        return tensor.nbytes
    return math.prod(tensor.shape) * bytes_per_weight


def _rotary_tables(spec: DecoderSpec, options: PlanOptions) -> int:
    """cos and signed sin [context, head_dim] of each kind; families that rotate a part of a head need less."""
    if spec.family.position_embedding is not None:
        return 0
    kinds = len(set(spec.rotary_kinds))
    return 2 * kinds * spec.context_length * spec.head_dim * options.dtype.itemsize


def _program_tables(spec: DecoderSpec, options: PlanOptions) -> int:
    """The tables of programs as they start; they grow with the programs that run at once."""
    cuda = options.device.startswith("cuda")
    entries, units = (CUDA_ENTRIES, CUDA_UNITS) if cuda else (DEFAULT_ROWS, DEFAULT_ROWS)
    elements = CUDA_BANK_ELEMENTS if cuda else 0
    banks = sum(max(256, elements // width) * width for width in set(spec.sites.values()))
    return banks * options.dtype.itemsize + entries * 4 * (INT_COLUMNS + FLOAT_COLUMNS) + units * _UNIT_BYTES


def _activations(spec: DecoderSpec, options: PlanOptions) -> int:
    """The rows of a full step, all of which may be asked for their logits, and the logits that are sampled from."""
    rows = options.max_tokens_per_step
    width = spec.n_heads * spec.head_dim
    keys_and_values = 2 * spec.n_kv_heads * spec.head_dim
    widest = max(spec.d_model, spec.d_ff, width)
    # The residual stream and a copy, the norm, what attention and MLP add; q, k, v, and q and z apart; gates and ups,
    # and neurons; the input of the widest product, packed.
    block = 5 * spec.d_model + 3 * width + keys_and_values + (2 + spec.family.gated) * spec.d_ff + widest
    logits = spec.vocab_size * 4 * (rows + 2 * min(rows, options.max_sequences))
    return rows * block * options.dtype.itemsize + logits
