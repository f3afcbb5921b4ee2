"""Sums of products of bytes, 4 in each of 16 lanes: unsigned codes of weights times signed ones of activations.

A processor has an instruction for four (AVX-512 VNNI, AVX-VNNI), or for two that are joined (AVX2), or multiplies 16
bits. Nothing overflows: 2 · 63 · 127 and 255 · 127 have 16 bits. All give the same integers.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from patchclamp_server.cpu.formats.lanes import I8, I16, I32, INTS, host_has, scalar_at
from patchclamp_server.cpu.vector import LANES, splat

_HALF = LANES // 2
_INTS_OF_HALF = ir.VectorType(I32, _HALF)
_SHORTS = ir.VectorType(I16, 2 * LANES)


def add_products(b: Any, total: Any, codes: Any, pointer: Any, *, small: bool) -> Any:
    """Returns total + Σ_j c_j q_j for the 4 codes in each lane and the 4 bytes at a pointer. `small` codes have at most
    6 bits, others 8."""
    values = splat(b, scalar_at(b, pointer, I32))
    if host_has("avx512vnni"):
        return _call(b, "llvm.x86.avx512.vpdpbusd.512", INTS, [INTS, INTS, INTS], [total, codes, values])
    if host_has("avxvnni"):
        kind, name = _INTS_OF_HALF, "llvm.x86.avx512.vpdpbusd.256"
        return _by_halves(b, [total, codes, values], lambda *own: _call(b, name, kind, [kind] * 3, list(own)))
    if host_has("avx2") and small:
        return b.add(total, _by_halves(b, [codes, values], lambda c, q: _pairs_of_pairs(b, c, q)))
    eight = ir.Constant(_SHORTS, [8] * (2 * LANES))
    c, q = b.bitcast(codes, _SHORTS), b.bitcast(values, _SHORTS)
    even = b.mul(b.and_(c, ir.Constant(_SHORTS, [255] * (2 * LANES))), b.ashr(b.shl(q, eight), eight))
    odd = b.mul(b.lshr(c, eight), b.ashr(q, eight))
    sixteen = ir.Constant(INTS, [16] * LANES)
    for product in (b.bitcast(even, INTS), b.bitcast(odd, INTS)):
        total = b.add(total, b.ashr(b.shl(product, sixteen), sixteen))
        total = b.add(total, b.ashr(product, sixteen))
    return total


def _pairs_of_pairs(b: Any, codes: Any, values: Any) -> Any:
    bytes_, shorts = ir.VectorType(I8, 4 * _HALF), ir.VectorType(I16, 2 * _HALF)
    own = [b.bitcast(vector, bytes_) for vector in (codes, values)]
    pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, [bytes_] * 2, own)
    ones = ir.Constant(shorts, [1] * (2 * _HALF))
    return _call(b, "llvm.x86.avx2.pmadd.wd", _INTS_OF_HALF, [shorts] * 2, [pairs, ones])


def _by_halves(b: Any, vectors: list[Any], work: Any) -> Any:
    results = []
    for start in (0, _HALF):
        lanes = ir.Constant(_INTS_OF_HALF, list(range(start, start + _HALF)))
        results.append(work(*(b.shuffle_vector(vector, vector, lanes) for vector in vectors)))
    return b.shuffle_vector(*results, ir.Constant(INTS, list(range(LANES))))


def _call(b: Any, name: str, result: Any, kinds: list[Any], values: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(result, kinds), name)
    return b.call(function, values)
