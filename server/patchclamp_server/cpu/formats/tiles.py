"""The inner loops of products with stored rows: tiles of R rows of weights and T rows of x.

    y[t, r] = Σ_k x[t, k] W[r, k]

Each sum has 16 lanes, which take weights k, k + 16, k + 32, … in that order by fused multiply-adds; then lanes are
joined by halves. Nothing allows LLVM to reorder or to contract, so the bits of an output follow from what is written,
whatever R and T are, and whether weights come from their blocks or from a panel of float32.

Rows past the last one repeat it. A row whose end is no whole unit of 32 is continued by zeros in memory of its own, so
that nothing is read past its end.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu.formats.blocks import Block
from patchclamp_server.cpu.formats.lanes import I64, at, host_has
from patchclamp_server.cpu.formats.rows import (
    BYTE_POINTER,
    FLOAT,
    FLOAT_POINTER,
    float_row,
    least,
    padded,
    padded_floats,
    store_sums,
)
from patchclamp_server.cpu.formats.table import Step, step_of
from patchclamp_server.cpu.invariant.tiles import fma
from patchclamp_server.cpu.stored import Format
from patchclamp_server.cpu.vector import FLOATS, LANES, LINE, UNIT, ZEROS, load, prefetch_line, store

# Rows of weights for each number of rows of x in a tile: about as many sums as there are registers beside what a step
# needs, less where blocks are decoded in between. A sum takes one register with AVX-512 (of 32), two with AVX2 (of 16)
# and four with NEON (of 32).
_WIDE = host_has("avx512f")
DIRECT = {1: 8, 2: 8, 4: 4, 8: 2} if _WIDE else {1: 4, 2: 3}
SHAPES = {1: 8, 2: 8, 4: 6, 8: 3} if _WIDE else {1: 4, 2: 3, 3: 2}
MOST = max(SHAPES)
# For more rows a panel costs less than to decode once more.
MOST_DIRECT = 16 if _WIDE else 2
# The rows of the next tile where so many are left: the last row is repeated once at most.
ACROSS = tuple(
    next((n for n in sorted(SHAPES) if 0 <= n - left <= 1), max((n for n in SHAPES if n <= left), default=1))
    for left in range(MOST + 1)
)
_INT = types.int64
# Memory takes as long to answer as some tiles take.
_TILES_AHEAD = 2
# Scales are kept for so many float32 of each row at a time.
_KEPT = 64
_Body = Callable[[list[Block], Any], None]


@intrinsic(prefer_literal=True)
def multiply_stored(  # type: ignore[no-untyped-def]
    _context, format, halves, starts, memory, first, end, width, x, n, y, stride
):
    """Sets y[t stride + r] = x_t · W_r for all n rows of x, at most MOST_DIRECT, and rows first ≤ r < end of weights.

    Row r begins at byte starts[r] of `memory`; `halves` is the table of halves.py. All but `format` are int64,
    addresses among them.
    """
    kind = Format(format.literal_value)
    step = step_of(kind)
    signature = types.void(format, *[_INT] * 10)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        halves, starts, memory, first, end, width, x, n, y, stride = args[1:]
        halves = b.inttoptr(halves, FLOAT_POINTER)
        table = b.inttoptr(starts, I64.as_pointer())

        def row_of(output: Any) -> Any:
            return b.inttoptr(b.add(memory, b.load(b.gep(table, [output]))), BYTE_POINTER)

        def tile(rows: int, columns: int, output: Any, t: Any) -> None:
            outputs = [least(b, b.add(output, I64(r)), b.sub(end, I64(1))) for r in range(rows)]
            inputs = [least(b, b.add(t, I64(i)), b.sub(n, I64(1))) for i in range(columns)]
            weights = [row_of(o) for o in outputs]
            following = row_of(least(b, b.add(output, I64(_TILES_AHEAD * rows)), b.sub(end, I64(1))))
            values = [float_row(b, x, row, width) for row in inputs]
            sums = [[cgutils.alloca_once_value(b, ZEROS) for _ in values] for _ in weights]
            for row in sums:
                for total in row:
                    b.store(ZEROS, total)
            whole = b.udiv(width, I64(step.weights))
            add = partial(_add_step, b, step, values, sums)
            _for_steps(b, step, halves, weights, whole, add, following)
            if kind.weights == 1:
                done = b.mul(whole, I64(step.weights))
                left = b.sub(width, done)
                with b.if_then(b.icmp_signed(">", left, I64(0)), likely=False):
                    skip, size = b.mul(whole, I64(step.size)), b.mul(left, I64(kind.size))
                    ends = [padded(b, b.gep(row, [skip]), size, step.size) for row in weights]
                    own = [Block(block, None, halves) for block in ends]
                    _add_step(b, step, padded_floats(b, values, done, left), sums, own, I64(0))
            targets = [[float_row(b, y, row, stride, o) for o in outputs] for row in inputs]
            store_sums(b, [[b.load(total) for total in row] for row in sums], targets)

        def loop_over_outputs(columns: int) -> None:
            rows = DIRECT[columns]
            with cgutils.for_range_slice(b, first, end, I64(rows), I64) as (output, _):
                if columns < max(DIRECT):
                    tile(rows, columns, output, I64(0))
                    return
                with cgutils.for_range_slice(b, I64(0), n, I64(columns), I64) as (t, _):
                    tile(rows, columns, output, t)

        _for_rows(b, n, sorted(DIRECT), loop_over_outputs)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def dequantize_stored(_context, format, halves, source, steps, left, target):  # type: ignore[no-untyped-def]
    """Sets the float32 at address `target` to the weights of `steps` steps at address `source`, and `left` weights
    behind them (of formats that have no blocks), filled up to 32 with zeros. `halves` is as for multiply_stored."""
    step = step_of(Format(format.literal_value))
    signature = types.void(format, *[_INT] * 5)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        halves, source, steps, left, target = args[1:]
        halves = b.inttoptr(halves, FLOAT_POINTER)
        row, out = b.inttoptr(source, BYTE_POINTER), b.inttoptr(target, FLOAT_POINTER)

        def write(blocks: list[Block], place: Any) -> None:
            for i, value in enumerate(step.decode(b, blocks[0])):
                store(b, value, b.gep(out, [b.add(place, I64(i * LANES))]))

        _for_steps(b, step, halves, [row], steps, write)
        if Format(format.literal_value).weights == 1:
            with b.if_then(b.icmp_signed(">", left, I64(0)), likely=False):
                end, size = b.gep(row, [b.mul(steps, I64(step.size))]), b.mul(left, I64(step.size // step.weights))
                write([Block(padded(b, end, size, step.size), None, halves)], b.mul(steps, I64(step.weights)))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def multiply_panel(  # type: ignore[no-untyped-def]
    _context, across, panel, depth, end, x, width, t, n, units, left, sums, begins, ends, y, stride
):
    """Adds a part of the inputs to the tiles of `across` rows of x, of SHAPES, from row t of n on, with rows
    0 ≤ r < end of a panel of float32.

    Row r of the panel begins at panel + 4 r `depth`; x is the address of the first of these inputs in row 0. Sums are
    kept at `sums`, but for the part that `begins` and the one that `ends`, which stores y as multiply_stored does.
    """
    signature = types.void(*[_INT] * 15)
    step = step_of(Format.F32)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        across, panel, depth, end, x, width, t, n, units, left, kept, begins, ends, y, stride = args
        begins, ends = (b.icmp_signed("!=", flag, I64(0)) for flag in (begins, ends))

        def tile(rows: int, columns: int, first: Any) -> None:
            outputs = [least(b, b.add(first, I64(r)), b.sub(end, I64(1))) for r in range(rows)]
            inputs = [least(b, b.add(t, I64(i)), b.sub(n, I64(1))) for i in range(columns)]
            weights = [b.bitcast(float_row(b, panel, row, depth), BYTE_POINTER) for row in outputs]
            values = [float_row(b, x, row, width) for row in inputs]
            sums = [[cgutils.alloca_once(b, FLOATS) for _ in values] for _ in weights]
            every = [total for row in sums for total in row]
            memory = b.gep(b.inttoptr(kept, FLOAT_POINTER), [b.mul(first, I64(columns * LANES))])
            places = [at(b, memory, i * LANES) for i in range(len(every))]
            with b.if_else(begins) as (then, otherwise):
                with then:
                    for total in every:
                        b.store(ZEROS, total)
                with otherwise:
                    for total, place in zip(every, places, strict=True):
                        b.store(load(b, place, FLOATS), total)
            _for_steps(b, step, None, weights, units, partial(_add_step, b, step, values, sums))
            with b.if_then(b.icmp_signed(">", left, I64(0)), likely=False):
                done = b.mul(units, I64(UNIT))
                rest = [Block(b.gep(row, [b.mul(units, I64(step.size))]), None, None) for row in weights]
                _add_step(b, step, padded_floats(b, values, done, left), sums, rest, I64(0))
            with b.if_else(ends) as (then, otherwise):
                with then:
                    targets = [[float_row(b, y, row, stride, output) for output in outputs] for row in inputs]
                    store_sums(b, [[b.load(total) for total in row] for row in sums], targets)
                with otherwise:
                    for total, place in zip(every, places, strict=True):
                        store(b, b.load(total), place)

        def loop_over_outputs(columns: int) -> None:
            rows = SHAPES[columns]
            with cgutils.for_range_slice(b, I64(0), end, I64(rows), I64) as (first, _):
                tile(rows, columns, first)

        _for_rows(b, across, sorted(SHAPES), loop_over_outputs)
        return context.get_dummy_value()

    return signature, generate


def _for_rows(b: Any, n: Any, choices: list[int], body: Any) -> None:
    """Does `body` of the least choice that is not below n, or else of the last."""
    if len(choices) == 1:
        body(choices[0])
        return
    with b.if_else(b.icmp_signed("<=", n, I64(choices[0]))) as (then, otherwise):
        with then:
            body(choices[0])
        with otherwise:
            _for_rows(b, n, choices[1:], body)


def _for_steps(
    b: Any, step: Step, halves: Any, rows: list[Any], steps: Any, body: _Body, following: Any = None
) -> None:
    """Does `body` of the blocks of rows, and of the place of their first weight in a row.

    From `following` on, as much is asked for as is read meanwhile: by itself the processor asks for few short rows.
    """

    def blocks(i: Any) -> list[Any]:
        return [b.gep(row, [b.mul(i, I64(step.size))]) for row in rows]

    def ask(i: Any) -> None:
        if following is not None:
            size = len(rows) * step.size
            place = b.gep(following, [b.mul(i, I64(size))])
            for line in range(0, size, LINE):
                prefetch_line(b, at(b, place, line))

    if step.keep is None:
        with cgutils.for_range(b, steps) as loop:
            ask(loop.index)
            own = [Block(block, None, halves) for block in blocks(loop.index)]
            body(own, b.mul(loop.index, I64(step.weights)))
        return
    # Scales are kept for some steps at once: a store is not waited for.
    ahead = max(2, _KEPT // step.scales)
    memory = b.bitcast(cgutils.alloca_once(b, ir.ArrayType(FLOAT, ahead * len(rows) * step.scales)), FLOAT_POINTER)

    def kept(i: Any, row: int) -> Any:
        return b.gep(memory, [b.add(b.mul(i, I64(len(rows) * step.scales)), I64(row * step.scales))])

    with cgutils.for_range_slice(b, I64(0), steps, I64(ahead), I64) as (first, _):
        n = least(b, I64(ahead), b.sub(steps, first))
        with cgutils.for_range(b, n) as loop:
            i = b.add(first, loop.index)
            ask(i)
            for r, block in enumerate(blocks(i)):
                step.keep(b, block, kept(loop.index, r), halves)
        with cgutils.for_range(b, n) as loop:
            i = b.add(first, loop.index)
            own = [Block(block, kept(loop.index, r), halves) for r, block in enumerate(blocks(i))]
            body(own, b.mul(i, I64(step.weights)))


def _add_step(b: Any, step: Step, values: list[Any], sums: list[list[Any]], blocks: list[Block], place: Any) -> None:
    """Adds the products of one step of rows of weights with rows of x from `place` on."""
    decoders = [step.decode(b, block) for block in blocks]
    for i in range(step.weights // LANES):
        weights = [next(decoder) for decoder in decoders]
        here = b.add(place, I64(i * LANES))
        for t, row in enumerate(values):
            value = load(b, b.gep(row, [here]), FLOATS)
            for weight, totals in zip(weights, sums, strict=True):
                b.store(fma(b, weight, value, b.load(totals[t])), totals[t])
