"""Compiled edits of an activation x [T, width], within the compiled blocks of a step: the bits of compiled_edits.py.

Each is a C function of the address of x, that of the |h| which it notes, and the address of its `state`, as
CompiledVisits has them. A gate that is closed leaves its row alone.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="attr-defined, no-untyped-def, no-untyped-call, call-arg, var-annotated"

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numba
from numba import carray, types
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.cpu.atomics import floats_at, ints_at
from patchclamp_server.cpu.invariant import edits
from patchclamp_server.cpu.invariant.reads import Read

if TYPE_CHECKING:
    from patchclamp_server.interventions.kinds.rules import Entries, Units

_write: Any = numba.cfunc(types.void(types.int64, types.int64, types.int64), cache=True)
_compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy")

# Every state has: pairs, the width of x, rows of it, three numbers of its own; then the addresses of the pairs' rows,
# strengths, openness, [E] each, and gates [E] among all conditions, 0 without any, and that of all conditions.
_OWN = 11


@_compiled
def _openness(state):
    """Returns the openness of each pair, [E], as the conditions are now."""
    opened = carray(floats_at(state[8]), (state[0],))
    if state[9] != 0:
        gates, conditions = carray(ints_at(state[9]), (state[0],)), floats_at(state[10])
        for e in range(state[0]):
            opened[e] = conditions[gates[e]]
    return opened


@_write
def _add(x_at, norms_at, state_at):
    """Sets x_r ← x_r + s v for each pair, and notes |x_r| before."""
    state = carray(ints_at(state_at), (_OWN + 2,))
    n, width, n_rows, k = state[0], state[1], state[2], state[3]
    x, vectors = carray(floats_at(x_at), (n_rows, width)), carray(floats_at(state[_OWN + 1]), (k, width))
    rows, which = carray(ints_at(state[6]), (n,)), carray(ints_at(state[_OWN]), (n,))
    strength, norms = carray(floats_at(state[7]), (n,)), carray(floats_at(norms_at), (n,))
    edits.add_to_rows(x, rows, which, vectors, strength, _openness(state), norms)


@_write
def _edit_rows(x_at, norms_at, state_at):
    """Does edit_rows of cpu/invariant/edits.py."""
    state = carray(ints_at(state_at), (_OWN + 5,))
    n, width, n_rows, k, formula, preserve_norm = state[0], state[1], state[2], state[3], state[4], state[5]
    x, vectors = carray(floats_at(x_at), (n_rows, width)), carray(floats_at(state[_OWN + 1]), (k, width))
    rows, which = carray(ints_at(state[6]), (n,)), carray(ints_at(state[_OWN]), (n,))
    low, high = carray(floats_at(state[_OWN + 2]), (n,)), carray(floats_at(state[_OWN + 3]), (n,))
    strength, deltas = carray(floats_at(state[7]), (n,)), carray(floats_at(state[_OWN + 4]), (n,))
    norms = carray(floats_at(norms_at), (n,))
    opened = _openness(state)
    edits.edit_rows(formula, x, rows, which, vectors, low, high, strength, opened, preserve_norm != 0, deltas, norms)


@_write
def _edit_units(x_at, norms_at, state_at):
    """Does edit_units of cpu/invariant/edits.py."""
    state = carray(ints_at(state_at), (_OWN + 7,))
    n, width, n_rows, n_units, dim, bounded = state[0], state[1], state[2], state[3], state[4], state[5]
    x, rows = carray(floats_at(x_at), (n_rows, width)), carray(ints_at(state[6]), (n,))
    starts, units = carray(ints_at(state[_OWN]), (n + 1,)), carray(ints_at(state[_OWN + 1]), (n_units,))
    factor = carray(floats_at(state[_OWN + 2]), (n_units,))
    offset = carray(floats_at(state[_OWN + 3]), (n_units, dim))
    low = carray(floats_at(state[_OWN + 4]), (bounded * n_units,))
    high = carray(floats_at(state[_OWN + 5]), (bounded * n_units,))
    strength, deltas = carray(floats_at(state[7]), (n,)), carray(floats_at(state[_OWN + 6]), (n,))
    norms = carray(floats_at(norms_at), (n,))
    opened = _openness(state)
    edits.edit_units(x, rows, starts, units, dim, factor, offset, low, high, strength, opened, deltas, norms)


def add(entries: "Entries", vectors: Tensor, delta_norms: Tensor, opened: Tensor) -> Read:
    """Makes the call that adds vectors [k, width] of the entries; |delta|, `delta_norms` [E], is the same each time."""
    assert entries.notes is not None
    entries.notes.delta_norms.copy_(delta_norms)
    _, which, _ = entries.numbers
    return _call(_add, entries, opened, [len(vectors)], [which, vectors.numpy()])


def edit_rows(
    entries: "Entries",
    formula: int,
    vectors: Tensor,
    bounds: tuple[Tensor, Tensor],
    opened: Tensor,
    *,
    preserve_norm: bool,
) -> Read:
    """Makes the call that does what edit_rows of compiled_edits.py does."""
    assert entries.notes is not None
    _, which, _ = entries.numbers
    low, high = (bound.numpy() for bound in bounds)
    arrays = [which, vectors.numpy(), low, high, entries.notes.delta_norms.numpy()]
    return _call(_edit_rows, entries, opened, [len(vectors), formula, int(preserve_norm)], arrays)


def edit_units(
    entries: "Entries",
    units: "Units",
    factor: Tensor,
    offset: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    opened: Tensor,
) -> Read:
    """Makes the call that does what edit_units of compiled_edits.py does."""
    assert entries.notes is not None
    starts, unit = units.numbered
    low, high = (None, None) if bounds is None else (bound.numpy() for bound in bounds)
    arrays = [starts, unit, factor.numpy(), offset.numpy(), low, high, entries.notes.delta_norms.numpy()]
    numbers = [len(unit), offset.shape[1], int(bounds is not None)]
    return _call(_edit_units, entries, opened, numbers, arrays)


def _call(
    function: Any, entries: "Entries", opened: Tensor, numbers: list[int], arrays: Sequence[NDArray[Any] | None]
) -> Read:
    """`numbers`, three at most, and `arrays` are what the state has of its own."""
    notes = entries.notes
    assert notes is not None
    rows, _, strength = entries.numbers
    gates = None if entries.gate is None else entries.gate.numpy()
    # Rows of x are those that are edited: compiled code takes their number for the shape of x.
    first = [len(rows), entries.width, int(rows.max()) + 1, *numbers, *[0] * (3 - len(numbers))]
    common = [rows, strength, notes.gates.numpy(), gates, opened.numpy()]
    return Read(function, notes.norms.numpy(), first, [*common, *arrays])
