"""Compiled edits of an activation x [T, width], within the compiled blocks of a step: the bits of compiled_edits.py.

Each is a C function of the address of x, that of the |h| which it notes, and the address of its `state`, as
CompiledVisits has them.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="attr-defined, no-untyped-def, no-untyped-call, call-arg, var-annotated"

from typing import TYPE_CHECKING, Any

import numba
from numba import carray, types
from torch import Tensor

from patchclamp_server.cpu.atomics import floats_at, ints_at
from patchclamp_server.cpu.invariant.edits import add_to_rows
from patchclamp_server.cpu.invariant.reads import Read

if TYPE_CHECKING:
    from patchclamp_server.interventions.kinds.rules import Entries

_write: Any = numba.cfunc(types.void(types.int64, types.int64, types.int64), cache=True)


@_write
def _add(x_at, norms_at, state_at):
    """Sets x_r ← x_r + s v for each pair, and notes |x_r| before."""
    state = carray(ints_at(state_at), (9,))
    n, width, n_rows, k = state[0], state[1], state[2], state[3]
    x, vectors = carray(floats_at(x_at), (n_rows, width)), carray(floats_at(state[6]), (k, width))
    rows, which = carray(ints_at(state[4]), (n,)), carray(ints_at(state[5]), (n,))
    strength, opened = carray(floats_at(state[7]), (n,)), carray(floats_at(state[8]), (n,))
    add_to_rows(x, rows, which, vectors, strength, opened, carray(floats_at(norms_at), (n,)))


def add(entries: "Entries", vectors: Tensor, norms: Tensor) -> Read:
    """Makes the call that adds vectors [k, width] of entries without gates, and notes |h| in `norms` [E]."""
    rows, which, strength = entries.numbers
    # Rows of x are those that are edited: compiled code takes their number for the shape of x.
    numbers = [len(rows), vectors.shape[1], int(rows.max()) + 1, len(vectors)]
    arrays = [rows, which, vectors.numpy(), strength, entries.always.numpy()]
    return Read(_add, norms.numpy(), numbers, arrays)
