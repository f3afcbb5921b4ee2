"""The loops over groups: tiles of 16 rows of weights, one a lane, and of T rows of x.

Sums of groups follow each other in the order of the codes' runs, one chain for each output. Rows past the last one
repeat it and are not stored.
"""

# llvmlite's builders have no types.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu.formats.lanes import I8, I32, I64, INTS, at, integers, scalar_at
from patchclamp_server.cpu.integers.columns import Run
from patchclamp_server.cpu.integers.dots import add_products
from patchclamp_server.cpu.integers.rounding import ALL, RECORD, SCALE, SCALED_SUMS, SUMS
from patchclamp_server.cpu.integers.table import CODES, Codes
from patchclamp_server.cpu.invariant.tiles import fma
from patchclamp_server.cpu.stored import Format
from patchclamp_server.cpu.vector import FLOATS, LANES, LINE, UNIT, ZEROS, load, prefetch_line, splat, store

# Rows of weights in a tile, and rows of x: where blocks are read for each tile, and where they are read once.
ROWS = LANES
DIRECT = (1, 2, 4, 8)
SHAPES = (4, 8)
_FLOAT = ir.FloatType()
_BYTE_POINTER, _FLOAT_POINTER = I8.as_pointer(), _FLOAT.as_pointer()
_INT = types.int64


@intrinsic(prefer_literal=True)
def multiply_codes(_context, format, starts, memory, first, end, blocks, x, n, y, stride):  # type: ignore[no-untyped-def]
    """Sets y[t stride + r] for all n rows of x, at most max(DIRECT), and rows first ≤ r < end of weights.

    Row r begins at byte starts[r] of `memory` and has so many blocks; x is the address of records (rounding.py).
    """
    kind = Format(format.literal_value)
    signature = types.void(format, *[_INT] * 9)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        starts, memory, first, end, blocks, x, n, y, stride = args[1:]
        codes = CODES[kind]

        def tile(columns: int, output: Any) -> None:
            rows, following = _rows_and_next(b, starts, memory, output, end)
            inputs = _x_pointers(b, x, n, columns, b.mul(blocks, I64(kind.weights // UNIT * RECORD)))
            sums = [cgutils.alloca_once_value(b, ZEROS) for _ in inputs]
            for total in sums:
                b.store(ZEROS, total)
            with cgutils.for_range(b, blocks) as loop:
                skip = b.mul(loop.index, I64(kind.size))
                _ask(b, kind, following, skip)
                here = [b.gep(row, [skip]) for row in rows]
                _add_block(b, codes, codes.read(b, here), _records(b, kind, inputs, loop.index), sums)
            _store_all(b, sums, y, I64(0), n, stride, output, end)

        def over_outputs(columns: int) -> None:
            with cgutils.for_range_slice(b, first, end, I64(ROWS), I64) as (output, _):
                tile(columns, output)

        _by_choice(b, n, DIRECT, over_outputs)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def read_codes(_context, format, starts, memory, first, end, skip, blocks, target):  # type: ignore[no-untyped-def]
    """Writes the runs of so many blocks, from byte `skip` of rows first ≤ r < first + 16 on, to address `target`."""
    kind = Format(format.literal_value)
    signature = types.void(format, *[_INT] * 7)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        starts, memory, first, end, skip, blocks, target = args[1:]
        codes, out = CODES[kind], b.inttoptr(target, _BYTE_POINTER)
        rows, following = _rows_and_next(b, starts, b.add(memory, skip), first, end)
        with cgutils.for_range(b, blocks) as loop:
            own = b.mul(loop.index, I64(kind.size))
            _ask(b, kind, following, own)
            here = [b.gep(row, [own]) for row in rows]
            place = b.gep(out, [b.mul(loop.index, I64(codes.block_bytes))])
            for i, run in enumerate(codes.read(b, here)):
                own = [*run.codes, run.scale, *([run.low] if codes.has_lows else [])]
                for k, vector in enumerate(own):
                    pointer = at(b, place, i * codes.run_bytes + k * LINE)
                    b.store(vector, b.bitcast(pointer, vector.type.as_pointer())).align = 4
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def multiply_read_codes(_context, format, panel, blocks, x, row, n, begins, y, stride, outputs):  # type: ignore[no-untyped-def]
    """Adds to y[t stride + r] what so many blocks that `read_codes` wrote to `panel` give, for n rows of x, whose
    records are `row` bytes apart, and r < outputs ≤ 16; sets it where `begins`."""
    kind = Format(format.literal_value)
    signature = types.void(format, *[_INT] * 9)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        panel, blocks, x, row, n, begins, y, stride, outputs = args[1:]
        codes = CODES[kind]
        panel = b.inttoptr(panel, _BYTE_POINTER)
        begins = b.icmp_signed("!=", begins, I64(0))

        def tile(columns: int, t: Any) -> None:
            left = b.sub(n, t)
            inputs = _x_pointers(b, b.add(x, b.mul(t, row)), left, columns, row)
            sums = [cgutils.alloca_once(b, FLOATS) for _ in inputs]
            with b.if_else(begins) as (then, otherwise):
                with then:
                    for total in sums:
                        b.store(ZEROS, total)
                with otherwise:
                    _load_all(b, sums, y, t, left, stride, outputs)
            with cgutils.for_range(b, blocks) as loop:
                place = b.gep(panel, [b.mul(loop.index, I64(codes.block_bytes))])
                _add_block(b, codes, _runs_at(b, codes, place), _records(b, kind, inputs, loop.index), sums)
            _store_all(b, sums, y, t, left, stride, I64(0), outputs)

        largest = SHAPES[-1]
        whole = b.mul(b.sdiv(n, I64(largest)), I64(largest))
        with cgutils.for_range_slice(b, I64(0), whole, I64(largest), I64) as (t, _):
            tile(largest, t)
        with b.if_then(b.icmp_signed("<", whole, n)):
            _by_choice(b, b.sub(n, whole), SHAPES, lambda columns: tile(columns, whole))
        return context.get_dummy_value()

    return signature, generate


def _runs_at(b: Any, codes: Codes, block: Any) -> Iterator[Run]:
    words = codes.weights // 4
    for i, place in enumerate(codes.places):
        run = at(b, block, i * codes.run_bytes)
        kinds = [INTS] * words + [FLOATS] * (1 + codes.has_lows)
        own = [load(b, at(b, run, LINE * k), kind) for k, kind in enumerate(kinds)]
        yield Run(place, own[:words], *own[words:])


def _add_block(b: Any, codes: Codes, runs: Iterator[Run], records: list[Any], sums: list[Any]) -> None:
    """Adds the products of a block with rows of x, whose records of its first weights these are."""
    for place, run in zip(codes.places, runs, strict=True):
        assert run.place == place
        which = place % UNIT // 16 if codes.weights == 16 else ALL
        own = [at(b, record, place // UNIT * RECORD) for record in records]
        dots = [ir.Constant(INTS, [0] * LANES)] * len(own)
        if codes.shift:
            negative = (splat(b, scalar_at(b, at(b, record, SUMS + 4 * which), I32)) for record in own)
            dots = [b.shl(total, integers(codes.shift)) for total in negative]
        for i, word in enumerate(run.codes):
            for t, record in enumerate(own):
                pointer = at(b, record, place % UNIT + 4 * i)
                dots[t] = add_products(b, dots[t], word, pointer, small=codes.small)
        for record, dot, total in zip(own, dots, sums, strict=True):
            scale = splat(b, scalar_at(b, at(b, record, SCALE), _FLOAT))
            value = fma(b, run.scale, b.fmul(b.sitofp(dot, FLOATS), scale), b.load(total))
            if run.low is not None:
                scaled = splat(b, scalar_at(b, at(b, record, SCALED_SUMS + 4 * which), _FLOAT))
                value = fma(b, run.low, scaled, value)
            b.store(value, total)


def _rows_and_next(b: Any, starts: Any, memory: Any, output: Any, end: Any) -> tuple[list[Any], Any]:
    """Returns pointers to the rows of a tile, and to the first of the tile that follows."""
    table = b.inttoptr(starts, I64.as_pointer())
    outputs = [_least(b, b.add(output, I64(r)), b.sub(end, I64(1))) for r in range(ROWS + 1)]
    *rows, following = (b.inttoptr(b.add(memory, b.load(b.gep(table, [o]))), _BYTE_POINTER) for o in outputs)
    return rows, following


def _ask(b: Any, kind: Format, following: Any, skip: Any) -> None:
    """Asks for what follows, as much as a tile reads of a block: by itself the processor asks for few short rows."""
    ahead = b.gep(following, [b.mul(skip, I64(ROWS))])
    for line in range(0, kind.size * ROWS, LINE):
        prefetch_line(b, at(b, ahead, line))


def _x_pointers(b: Any, x: Any, n: Any, columns: int, size: Any) -> list[Any]:
    rows = [_least(b, I64(t), b.sub(n, I64(1))) for t in range(columns)]
    return [b.inttoptr(b.add(x, b.mul(row, size)), _BYTE_POINTER) for row in rows]


def _records(b: Any, kind: Format, inputs: list[Any], block: Any) -> list[Any]:
    return [b.gep(row, [b.mul(block, I64(kind.weights // UNIT * RECORD))]) for row in inputs]


def _by_choice(b: Any, n: Any, choices: tuple[int, ...], body: Any) -> None:
    """Does `body` of the least choice that is not below n, or else of the last."""
    if len(choices) == 1:
        body(choices[0])
        return
    with b.if_else(b.icmp_signed("<=", n, I64(choices[0]))) as (then, otherwise):
        with then:
            body(choices[0])
        with otherwise:
            _by_choice(b, n, choices[1:], body)


def _store_all(b: Any, sums: list[Any], y: Any, t: Any, n: Any, stride: Any, output: Any, end: Any) -> None:
    """Stores the sums of rows t, t + 1, … of y, of which there are n, from an output on."""
    count = _least(b, I64(LANES), b.sub(end, output))
    # A sum whose address is taken would not stay in a register.
    part = cgutils.alloca_once(b, FLOATS)
    for i, total in enumerate(sums):
        with b.if_then(b.icmp_signed("<", I64(i), n)):
            target = _place(b, y, b.add(t, I64(i)), stride, output)
            with b.if_else(b.icmp_signed("==", count, I64(LANES))) as (then, otherwise):
                with then:
                    store(b, b.load(total), target)
                with otherwise:
                    b.store(b.load(total), part)
                    cgutils.raw_memcpy(b, target, b.bitcast(part, _FLOAT_POINTER), count, 4)


def _load_all(b: Any, sums: list[Any], y: Any, t: Any, n: Any, stride: Any, count: Any) -> None:
    part = cgutils.alloca_once(b, FLOATS)
    for i, total in enumerate(sums):
        with b.if_then(b.icmp_signed("<", I64(i), n)):
            source = _place(b, y, b.add(t, I64(i)), stride, I64(0))
            with b.if_else(b.icmp_signed("==", count, I64(LANES))) as (then, otherwise):
                with then:
                    b.store(load(b, source, FLOATS), total)
                with otherwise:
                    b.store(ZEROS, part)
                    cgutils.raw_memcpy(b, b.bitcast(part, _FLOAT_POINTER), source, count, 4)
                    b.store(b.load(part), total)


def _place(b: Any, y: Any, row: Any, stride: Any, output: Any) -> Any:
    return b.gep(b.inttoptr(y, _FLOAT_POINTER), [b.add(b.mul(row, stride), output)])


def _least(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed("<", x, y), x, y)
