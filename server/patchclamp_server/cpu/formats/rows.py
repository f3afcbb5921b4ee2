"""Rows of weights and of x as LLVM has them: where they lie, what continues their ends, and the sums of lanes."""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from patchclamp_server.cpu.formats.lanes import I8, I64
from patchclamp_server.cpu.vector import LANES, UNIT

FLOAT = ir.FloatType()
FLOAT_POINTER = FLOAT.as_pointer()
BYTE_POINTER = I8.as_pointer()


def store_sums(b: Any, sums: list[list[Any]], targets: list[list[Any]]) -> None:
    """Stores the sum of the lanes of sums[r][i] at targets[i][r]."""
    vectors = [sums[r][i] for i in range(len(targets)) for r in range(len(sums))]
    pointers = [pointer for row in targets for pointer in row]
    for first in range(0, len(vectors), 4):
        four = vectors[first : first + 4]
        for n in (LANES // 2, LANES // 4):
            four = [
                b.fadd(*(b.shuffle_vector(v, v, _index(range(start, start + n))) for start in (0, n))) for v in four
            ]
        four += [ir.Constant(ir.VectorType(FLOAT, 4), [0.0] * 4)] * (4 - len(four))
        pairs = [
            b.fadd(b.shuffle_vector(v, w, _index((0, 1, 4, 5))), b.shuffle_vector(v, w, _index((2, 3, 6, 7))))
            for v, w in (four[:2], four[2:])
        ]
        joined = b.fadd(b.shuffle_vector(*pairs, _index((0, 2, 4, 6))), b.shuffle_vector(*pairs, _index((1, 3, 5, 7))))
        for lane, pointer in enumerate(pointers[first : first + 4]):
            b.store(b.extract_element(joined, ir.IntType(32)(lane)), pointer)


def _index(places: Any) -> Any:
    places = list(places)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)


def least(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed("<", x, y), x, y)


def float_row(b: Any, address: Any, row: Any, width: Any, column: Any = None) -> Any:
    place = b.mul(row, width)
    return b.gep(b.inttoptr(address, FLOAT_POINTER), [place if column is None else b.add(place, column)])


def padded(b: Any, source: Any, size: Any, whole: int) -> Any:
    """Returns memory of `whole` bytes that has `size` bytes of `source` and zeros."""
    memory = b.bitcast(cgutils.alloca_once(b, ir.ArrayType(I8, whole)), BYTE_POINTER)
    cgutils.memset(b, memory, I64(whole), 0)
    cgutils.raw_memcpy(b, memory, source, size, 1)
    return memory


def padded_floats(b: Any, rows: list[Any], done: Any, left: Any) -> list[Any]:
    """Returns the `left` numbers from `done` on of each row, and zeros up to a unit."""
    return [
        b.bitcast(padded(b, b.bitcast(b.gep(row, [done]), BYTE_POINTER), b.mul(left, I64(4)), 4 * UNIT), FLOAT_POINTER)
        for row in rows
    ]
