"""A job of the compiled blocks is an array of int64, because every thread that works on it finds it by its address.

Each entry is a number or the address of an array. Comments have the shapes of arrays of float32: T rows, L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, auto

from patchclamp_server.model.sites import Site


@dataclass(frozen=True, eq=False)
class CompiledVisits:
    """Visits without Python: of each place the calls that take hooks' part there. A call is the address of a C function
    and the two numbers that it takes after the address of the activation [T, width] float32.
    Hooks that are called instead do the same."""

    calls: Mapping[tuple[Site, int], tuple[tuple[int, int, int], ...]]


class _Numbered(IntEnum):
    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count


class Job(_Numbered):
    FIRST = auto()  # stages first ≤ s < last are to run
    LAST = auto()
    STAGES = auto()  # int64 [stages, 3]: Stage, layer, flags
    # int64 [stages, 8]: chunks that were taken, in entry 4 those that are done, in 6 and 7 the clock when the first was
    # begun and when the last was done.
    COUNTERS = auto()
    THREADS = auto()
    ROWS = auto()
    LAYERS = auto()  # int64 [L + 2, len(Layer)]; the last two have the final norm and the unembedding
    EPSILONS = auto()  # float32 [L + 2, 5]: of the four norms of Layer, and of the heads
    X = auto()  # [T, d_model]
    H = auto()  # [T, d_model]
    QKV = auto()  # [T, (n_heads + 2 n_kv_heads) head_dim]
    Q = auto()  # [T, n_heads head_dim]
    Z = auto()  # [T, n_heads head_dim]
    ATTN_OUT = auto()  # [T, d_model]
    HIDDEN = auto()  # [T, d_ff], or [T, 2 d_ff] with the gates first
    NEURONS = auto()  # [T, d_ff]
    MLP_OUT = auto()  # [T, d_model]
    ROUNDED = auto()  # records (cpu/integers/rounding.py) of the last input of a product that takes them
    D_MODEL = auto()
    D_FF = auto()
    GATED = auto()
    ACTIVATION = auto()
    N_HEADS = auto()
    N_KV_HEADS = auto()
    HEAD_DIM = auto()
    CONSTANTS = auto()  # float32 [2]: scale and soft cap of attention
    ROTARY = auto()  # int64 [kinds, 3]: cos [context, width], signed sin, width
    CONTEXT = auto()
    POSITIONS = auto()  # int64 [T]
    SLOTS = auto()  # int64 [T]
    POOLS = auto()  # int64 [L, 4]: keys, values, and their scales, as a TiledPool has them
    POOL_FORMAT = auto()  # bytes of a key's number: float32, bfloat16 or codes
    POOL_TOKENS = auto()  # token addresses
    BLOCK_SIZE = auto()
    TABLES = auto()  # int64 [spans, table width]
    SPANS = auto()
    TABLE_WIDTH = auto()
    ATTENTION_TILES = auto()  # int64 [n, 4]
    N_ATTENTION_TILES = auto()
    PARTS = auto()  # int64 [n, 8], and the memory of them all (parts.py)
    N_PARTS = auto()
    PART_COUNTERS = auto()
    N_PART_COUNTERS = auto()
    RECORDS = auto()
    N_RECORDS = auto()
    PEAK_AT = auto()  # int32, float32, float32 [places, T, n_heads], or 0
    PEAK = auto()
    OFF_SINK = auto()
    PEAK_PLACES = auto()
    PEAK_OF_LAYER = auto()  # int64 [L]: place, or -1
    CALLS = auto()  # int64 [calls, 3]: as in CompiledVisits
    SPARSE = auto()  # int64 [L, len(SparseLayer)], or 0 where no row is sparse
    RUN_SPARSE = auto()  # address of the function of their stages (sparse_stages.py)
    KEEP = auto()  # int64 [L, T]: neurons that a row keeps at a layer, or -1: it is dense there
    FORCED = auto()  # int64 [L, T]: addresses of uint8 [d_ff], 1 at neurons that are kept besides, or 0; or 0
    KEPT_COUNTS = auto()  # int64 [L, T]: how many neurons were kept
    SCORES = auto()  # int32 [T, d_ff filled up to lanes]
    PARTIALS = auto()  # [T, SUMS, outputs filled up to units]
    FAILED = auto()  # 1 once a chunk has raised an exception


class Layer(_Numbered):
    """What a layer's row of addresses holds. Of each product, in the order of PRODUCTS: `Matrix`."""

    ATTN_NORM = auto()  # weights, and biases or 0
    ATTN_NORM_BIAS = auto()
    POST_ATTN_NORM = auto()
    POST_ATTN_NORM_BIAS = auto()
    MLP_NORM = auto()
    MLP_NORM_BIAS = auto()
    POST_MLP_NORM = auto()
    POST_MLP_NORM_BIAS = auto()
    HEAD_NORMS = auto()  # [n_heads + n_kv_heads, head_dim], or 0
    ROTARY_KIND = auto()  # -1: none
    WINDOW = auto()
    MATRICES = auto()


class Matrix(_Numbered):
    """A product with stored weights (cpu/products.py)."""

    PARTS = auto()  # int64 [parts, products.FIELDS]
    N_PARTS = auto()
    OUT = auto()
    DEPTH = auto()
    BIAS = auto()
    ROUNDS = auto()  # 1: takes its input from ROUNDED


class SparseLayer(_Numbered):
    """What a layer has for sparse rows."""

    INPUT_PARTS = auto()  # as in Matrix, of products that take their input from ROUNDED
    N_INPUT_PARTS = auto()
    OUTPUT_PARTS = auto()
    N_OUTPUT_PARTS = auto()
    TILES = auto()  # the copy of the input projection (cpu/sparse/glanced.py), or 0
    TILE_BYTES = auto()
    TILE_HALVES = auto()
    TILE_GROUPS = auto()
    NORMS = auto()  # float32 [d_ff]: of the weights by which a neuron adds
    CODES = auto()  # the neuron-major copy of the output projection (cpu/sparse/kept.py), or 0
    RECORD = auto()
    SCALES = auto()
    HALVES = auto()
    GROUP = auto()
    GROUPS = auto()
    UNITS = auto()


# The products of a block, and its norms, in the order of their addresses.
PRODUCTS = ("qkv", "attn_output", "mlp_input", "mlp_output")
NORMS = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm")
LAYER_FIELDS = len(Layer) - 1 + len(PRODUCTS) * len(Matrix)


class Stage(_Numbered):
    """What the blocks compute between two points at which all threads wait for each other."""

    ATTN_NORM = auto()  # flags: 1 adds attn_out to x before, 2 mlp_out; then h ← norm(x); 4 rounds h
    QKV = auto()
    HEADS = auto()  # norms of heads, rotary embedding; keys and values go to the pool
    ATTEND = auto()
    ATTN_OUTPUT = auto()
    POST_ATTN_NORM = auto()
    MLP_NORM = auto()  # as ATTN_NORM
    MLP_INPUT = auto()
    ACTIVATION = auto()  # flags: 4 rounds the neurons
    MLP_OUTPUT = auto()
    POST_MLP_NORM = auto()
    ADD = auto()  # flags as of ATTN_NORM
    CALL = auto()  # at the memory that stands in the layer's place; flags: the row of CALLS
    ROUND = auto()  # the input of the product that `flags` names
    # Of a layer with sparse rows; the work is in sparse_stages.py.
    SPARSE_INPUT = auto()  # as MLP_INPUT; sparse rows from ROUNDED
    CHOOSE = auto()  # zeros the neurons that sparse rows do not keep
    SPARSE_OUTPUT = auto()  # as MLP_OUTPUT; flags: 1 leaves sparse rows out, else they come from ROUNDED
    KEPT = auto()  # sums over the neurons of sparse rows that are not 0, in so many parts as SUMS says
    KEPT_SUM = auto()  # joins the parts
