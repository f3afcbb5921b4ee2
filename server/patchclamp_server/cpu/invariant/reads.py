"""Compiled reads of an activation x [T, width]: what readouts take of it, within the compiled blocks of a step.

Each is a C function of the address of x, a number and the address of its `state`, as CompiledVisits has them. Products
have the bits of operators.pair_dots.
"""

# What numba compiles has no types for mypy, and an intrinsic's first argument is not its caller's to give.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg, var-annotated, attr-defined"

from typing import Any

import numba
import numpy as np
from numba import carray, types
from numpy.typing import NDArray

from patchclamp_server.cpu.atomics import bytes_at, floats_at, ints_at
from patchclamp_server.cpu.invariant.tiles import dot

# Of a compiled visit: the address of its function, the number and the state that the function takes.
Call = tuple[int, int, int]

_read: Any = numba.cfunc(types.void(types.int64, types.int64, types.int64), cache=True)


@_read
def _products(x_at, number, state_at):
    """Sets out[target[e]] = x_rows[e] · v_which[e], and 0 of p = that + bias where p ≤ jump, for features."""
    state = carray(ints_at(state_at), (11,))
    n, width, n_rows, k = state[0], state[1], state[2], state[3]
    x, vectors = carray(floats_at(x_at), (n_rows, width)), carray(floats_at(state[6]), (k, width))
    rows, which, target = (carray(ints_at(state[4]), (n,)), carray(ints_at(state[5]), (n,)),
                           carray(ints_at(state[7]), (n,)))  # fmt: skip
    out = floats_at(number)
    features = 0 if state[8] == 0 else n
    is_feature = carray(bytes_at(state[8]), (features,))
    bias, jump = carray(floats_at(state[9]), (features,)), carray(floats_at(state[10]), (features,))
    for e in range(n):
        value = dot(x[rows[e]], 0, vectors[which[e]], 0, width)
        if features and is_feature[e]:
            value += bias[e]
            if value <= jump[e]:
                value = np.float32(0)
        out[target[e]] = value


@_read
def _gather(x_at, number, state_at):
    """Sets out[target[i] + k] = x[place[i] + k] for k < run, of flat x and out."""
    state = carray(ints_at(state_at), (4,))
    n, run = state[0], state[1]
    place, target = carray(ints_at(state[2]), (n,)), carray(ints_at(state[3]), (n,))
    x, out = floats_at(x_at), floats_at(number)
    for i in range(n):
        for k in range(run):
            out[target[i] + k] = x[place[i] + k]


class Read:
    """A call with the memory that it reads, which lives as long as this."""

    def __init__(self, function: Any, out: NDArray[np.float32], numbers: list[int], arrays: list[Any]) -> None:
        self._arrays = [None if own is None else np.ascontiguousarray(own) for own in arrays]
        addresses = [0 if own is None else own.ctypes.data for own in self._arrays]
        self._out, self._state = out, np.array(numbers + addresses, dtype=np.int64)
        self.call: Call = function.address, out.ctypes.data, self._state.ctypes.data


Ints = NDArray[np.int64]


def products(
    rows: Ints,
    which: Ints,
    vectors: NDArray[np.float32],
    out: NDArray[np.float32],
    target: Ints,
    features: tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]] | None,
) -> Read:
    """Makes the read of x_rows[e] · v_which[e] to out[target[e]], [E] each, of vectors [k, width]. `features` [E]:
    which are features, their bias, and the jump that they must be above."""
    # Rows of x are those that are read: compiled code takes their number for the shape of x.
    numbers = [len(rows), vectors.shape[1], int(rows.max()) + 1, len(vectors)]
    chosen, bias, jump = features or (None, None, None)
    flags = None if chosen is None else chosen.astype(np.uint8)
    return Read(_products, out, numbers, [rows, which, vectors, target, flags, bias, jump])


def gather(place: Ints, run: int, out: NDArray[np.float32], target: Ints) -> Read:
    """Makes the read of x[place[i] + k] to out[target[i] + k] for k < run; x and out are taken as flat."""
    return Read(_gather, out, [len(place), run], [place, target])
