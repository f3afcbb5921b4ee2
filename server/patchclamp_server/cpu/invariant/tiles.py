"""These are the inner loops of what a decoder does to a row besides products with weights, on LLVM vectors of 16 lanes.

Each sum is chains of fused multiply-adds in the order of the inputs and a fixed order of the chains, and nothing here
allows LLVM to reorder or to contract: the bits of a row follow from the order that is written down, and are the same on
any number of threads and on any processor.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu.vector import FLOATS, LANES, ZEROS, data_of, load

_I64 = ir.IntType(64)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Returns x y + z, rounded once: LLVM's own operation, which it must not split."""
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), [x, y, z])


@intrinsic
def dot(_context, x, x_at, y, y_at, n):  # type: ignore[no-untyped-def]
    """Returns Σ_k x[x_at + k] y[y_at + k] over k < n, float32: 16 chains, their sum by halves, then the rest."""
    signature = types.float32(x, types.int64, y, types.int64, types.int64)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        left = b.gep(data_of(context, b, signature, args, 0), [args[1]])
        right = b.gep(data_of(context, b, signature, args, 2), [args[3]])
        total = cgutils.alloca_once_value(b, ZEROS)
        whole = b.mul(b.udiv(args[4], _I64(LANES)), _I64(LANES))
        with cgutils.for_range_slice(b, _I64(0), whole, _I64(LANES), _I64) as (k, _):
            a, c = (load(b, b.gep(array, [k]), FLOATS) for array in (left, right))
            b.store(fma(b, a, c, b.load(total)), total)
        result = cgutils.alloca_once_value(b, join_lanes(b, b.load(total), lambda b, x, y: b.fadd(x, y)))
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        scalar_fma = cgutils.get_or_insert_function(b.module, kind, "llvm.fma.f32")
        with cgutils.for_range_slice(b, whole, args[4], _I64(1), _I64) as (k, _):
            pair = [b.load(b.gep(array, [k])) for array in (left, right)]
            b.store(b.call(scalar_fma, [*pair, b.load(result)]), result)
        return b.load(result)

    return signature, generate


@intrinsic
def sum_of(_context, x, x_at, n):  # type: ignore[no-untyped-def]
    """Returns Σ_k x[x_at + k] over k < n, a multiple of 16, float32: the sum of each lane, and these by halves."""
    return _of_all(x, 0.0, lambda b, value, total: b.fadd(value, total))


@intrinsic
def largest_of(_context, x, x_at, n):  # type: ignore[no-untyped-def]
    """Returns max_k x[x_at + k] over k < n, a multiple of 16, float32, without NaN; -inf where all are NaN."""
    return _of_all(x, float("-inf"), lambda b, value, most: b.select(b.fcmp_ordered(">", value, most), value, most))


def _of_all(x: Any, start: float, join: Any) -> Any:
    """Returns the signature and code of a reduction that joins lane by lane, and then by halves."""
    signature = types.float32(x, types.int64, types.int64)

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        array = b.gep(data_of(context, b, signature, args, 0), [args[1]])
        joined = cgutils.alloca_once_value(b, ir.Constant(FLOATS, [start] * LANES))
        with cgutils.for_range_slice(b, _I64(0), args[2], _I64(LANES), _I64) as (k, _):
            b.store(join(b, load(b, b.gep(array, [k]), FLOATS), b.load(joined)), joined)
        return join_lanes(b, b.load(joined), join)

    return signature, generate


def join_lanes(b: Any, vector: Any, join: Any) -> Any:
    n = LANES
    while n > 1:
        n //= 2
        low, high = (b.shuffle_vector(vector, vector, _index(range(start, start + n))) for start in (0, n))
        vector = join(b, low, high)
    return b.extract_element(vector, ir.IntType(32)(0))


def _index(places: Any) -> Any:
    places = list(places)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
