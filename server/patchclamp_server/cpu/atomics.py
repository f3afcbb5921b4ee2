"""What threads of compiled loops share work by: addresses, and atomic operations on int64."""

# llvmlite's builders have no types, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="no-untyped-call, call-arg"

import platform
from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchclamp_server.cpu.vector import data_of

# The instruction that tells a processor that a thread waits in a loop.
_PAUSES = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}
# Between so many pauses a waiting thread offers its processor to others.
_PAUSES_A_YIELD = 2000

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def pointer(_context, address):  # type: ignore[no-untyped-def]
        def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
            return b.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return pointer


# These return the address as a pointer, for numba.carray.
floats_at, bytes_at, codes_at, ints_at, places_at, halves_at = (
    _pointer_to(kind) for kind in (types.float32, types.uint8, types.int8, types.int64, types.int32, types.uint16)
)


@intrinsic
def add_to(_context, array, at, value):  # type: ignore[no-untyped-def]
    """Adds to array[at], int64, and returns what was there before."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("add", b.gep(data_of(context, b, signature, args, 0), [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def exchange(_context, array, at, value):  # type: ignore[no-untyped-def]
    """Sets array[at], int64, and returns what was there before."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("xchg", b.gep(data_of(context, b, signature, args, 0), [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def value_at(_context, array, at):  # type: ignore[no-untyped-def]
    """Returns array[at], int64, as the last thread that set it left it."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.load_atomic(b.gep(data_of(context, b, signature, args, 0), [args[1]]), "seq_cst", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def call(_context, function, argument):  # type: ignore[no-untyped-def]
    """Calls the C function at the address `function`, which takes an int64 and returns nothing."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def cycles(_context):  # type: ignore[no-untyped-def]
    """Returns the processor's clock, which counts at one rate where time is measured by it (x86, arm64)."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(64), [])
        return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate


@intrinsic
def call_with(_context, function, *arguments):  # type: ignore[no-untyped-def]
    """Calls the C function at the address `function`, which takes these int64 and returns nothing."""
    n = len(arguments[0]) if len(arguments) == 1 and isinstance(arguments[0], types.BaseTuple) else len(arguments)

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * n)
        b.call(b.inttoptr(args[0], kind.as_pointer()), cgutils.unpack_tuple(b, args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple([types.int64] * n)), generate


@intrinsic
def keep(_context, array):  # type: ignore[no-untyped-def]
    """Does nothing with an array, which lives until here: numba lets go of one after its last use, which an address is
    not."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return context.get_dummy_value()

    return types.void(array), generate


@intrinsic
def pause(_context):  # type: ignore[no-untyped-def]
    """Waits for some nanoseconds, where there is an instruction for it."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        name = _PAUSES.get(platform.machine())
        if name is not None:
            b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), name), [])
        return context.get_dummy_value()

    return types.void(), generate


@numba.njit(nogil=True)
def relax(waited):  # type: ignore[no-untyped-def]
    """Is called again and again by a thread that waits, with the number of times that it has waited."""
    if waited % _PAUSES_A_YIELD == _PAUSES_A_YIELD - 1:
        _sched_yield()
    else:
        pause()
