"""A sparse MLP computes only the active neurons: y = W_down[:, S] (act(W_gate[S] x) · W_up[S] x).

The weights of a neuron lie side by side, so that those of the others are not read; there is no product with a mask. Two
kinds of sets have one interface: `SparseMlp` takes a set with every call (it changes per token), `compact` fixes one
(it stays for a sequence). Neurons are computed first and summed after, so that edits can be made in between.

A set is an ascending index [K] int64 of distinct neurons and holds for all rows of a call; rows with other sets need
other calls. Rows are computed one by one: none depends on its neighbours. Products accumulate in float32, are the same
bits on any number of threads, and take nothing from the weights of inactive neurons, NaN or not. A set of all neurons
takes the dense path, bit by bit.

It is made for one or two rows on a CPU and works for more. benchmarks/sparse measures the speed.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.activations import neurons_of
from patchclamp_server.cpu.linear import Linear
from patchclamp_server.cpu.sparse.input_rows import input_rows
from patchclamp_server.cpu.sparse.kernels import strictly_ascending
from patchclamp_server.cpu.sparse.output_rows import Floats, Index, as_floats, output_rows


class SparseMlp:
    """The MLP of one block. Raises ValueError for a set that is not ascending, has a neuron twice or an unknown one.

    Beside the projections it keeps a neuron-major copy of an output projection that is not `input_major`.
    """

    def __init__(self, mlp_input: Linear, mlp_output: Linear, activation: str, *, gated: bool) -> None:
        """`mlp_input` has the gate rows first where the MLP is gated; `activation` is that of DecoderSpec."""
        self.mlp_input = mlp_input
        self.mlp_output = mlp_output
        self.activation = activation
        self.gated = gated
        self._inputs = output_rows(mlp_input)
        self._outputs = input_rows(mlp_output)
        rows, self.d_model = mlp_input.shape
        self.d_ff = rows // 2 if gated else rows
        self._gate = self._inputs.leading(self.d_ff)
        self._input_bias = _bias(mlp_input)
        self._output_bias = _bias(mlp_output)

    @property
    def compact_bytes(self) -> int:
        """The bytes that `compact` copies of a set of all neurons."""
        return self._outputs.bytes_to_take

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        """Returns y [T, d_model] of x [T, d_model]."""
        return self.output(self.neurons(x, index), index)

    def gate(self, x: Tensor) -> Tensor:
        """Returns the pre-activations of all gates [T, d_ff] float32, for sets chosen by them. Gated MLPs only."""
        assert self.gated
        gate = torch.from_numpy(self._gate(as_floats(x)))
        return gate if self.mlp_input.bias is None else gate.add_(self.mlp_input.bias[: self.d_ff])

    def neurons(self, x: Tensor, index: Tensor, gate: Tensor | None = None) -> Tensor:
        """Returns activations [T, K] in the dtype of x; with `gate` (what `gate` returned), only up rows are read."""
        active = self._check(index)
        if len(active) == self.d_ff:
            return self.dense_neurons(x)
        return self._neurons_of(self._preactivations(x, active, gate), x.dtype)

    def preactivations(self, x: Tensor, index: Tensor, gate: Tensor | None = None) -> Tensor:
        """Returns what `neurons` activates, in x's dtype: [T, K], or if gated [T, 2 K] with gates first."""
        return torch.from_numpy(self._preactivations(x, self._check(index), gate)).to(x.dtype)

    def _preactivations(self, x: Tensor, active: Index, gate: Tensor | None) -> Floats:
        if gate is None:
            wanted = np.concatenate((active, active + self.d_ff)) if self.gated else active
            return self._biased(self._inputs.dot(as_floats(x), wanted), wanted)
        ups = active + self.d_ff
        z = np.empty((len(x), 2 * len(active)), dtype=np.float32)
        z[:, : len(active)] = gate.numpy()[:, active]
        z[:, len(active) :] = self._biased(self._inputs.dot(as_floats(x), ups), ups)
        return z

    def output(self, h: Tensor, index: Tensor) -> Tensor:
        """Returns y [T, d_model] of the activations [T, K] of the neurons of `index`."""
        active = self._check(index)
        if len(active) == self.d_ff:
            return self.mlp_output(h)
        return self._sum(h, lambda rows: self._outputs.sum(rows, active))

    def compact(self, index: Tensor) -> "CompactMlp":
        """Returns the MLP of these neurons alone."""
        return CompactMlp(self, index)

    def warm_up(self) -> None:
        """Compiles what is compiled at run time, for the formats of this MLP only."""
        x, index = torch.zeros(1, self.d_model), torch.tensor([0], dtype=torch.int64)
        gate = self.gate(x) if self.gated else None
        self.output(self.neurons(x, index, gate), index)
        self.neurons(x, index)
        self.compact(index)(x)

    def dense_neurons(self, x: Tensor) -> Tensor:
        """Returns the activations of all neurons [T, d_ff], as the decoder computes them."""
        return neurons_of(self.mlp_input(x), self.activation, gated=self.gated)

    def _check(self, index: Tensor) -> Index:
        active: Index = np.ascontiguousarray(index.numpy())
        if active.dtype != np.int64 or active.ndim != 1 or not strictly_ascending(active, self.d_ff):
            raise ValueError(f"index: ascending int64 neurons below {self.d_ff}, none twice, are accepted")
        return active

    def _biased(self, z: Floats, wanted: Index) -> Floats:
        """Adds their biases to products with the rows `wanted` of the input projection."""
        return z if self._input_bias is None else z + self._input_bias[wanted]

    def _neurons_of(self, z: Floats, dtype: torch.dtype) -> Tensor:
        return neurons_of(torch.from_numpy(z), self.activation, gated=self.gated).to(dtype)

    def _sum(self, h: Tensor, product: Callable[[Floats], Floats]) -> Tensor:
        y = product(as_floats(h))
        return torch.from_numpy(y if self._output_bias is None else y + self._output_bias).to(h.dtype)


class CompactMlp:
    """An MLP with a fixed set. It copies codes of the output projection; other rows are read where they are."""

    def __init__(self, mlp: SparseMlp, index: Tensor) -> None:
        active = mlp._check(index).copy()
        self.index = torch.from_numpy(active)
        self._mlp = mlp
        self._keeps_all = len(active) == mlp.d_ff
        if self._keeps_all:
            return
        self._wanted = np.concatenate((active, active + mlp.d_ff)) if mlp.gated else active
        self._inputs = mlp._inputs.take(self._wanted)
        self._outputs = mlp._outputs.take(active)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns y [T, d_model] of x [T, d_model]."""
        return self.output(self.neurons(x))

    def neurons(self, x: Tensor) -> Tensor:
        """Returns activations [T, K] in the dtype of x."""
        if self._keeps_all:
            return self._mlp.dense_neurons(x)
        return self._mlp._neurons_of(self._preactivations(x), x.dtype)

    def preactivations(self, x: Tensor) -> Tensor:
        """Returns what SparseMlp.preactivations does. It must not be called for a set of all neurons."""
        return torch.from_numpy(self._preactivations(x)).to(x.dtype)

    def _preactivations(self, x: Tensor) -> Floats:
        return self._mlp._biased(self._inputs(as_floats(x)), self._wanted)

    def output(self, h: Tensor) -> Tensor:
        """Returns y [T, d_model] of activations [T, K]."""
        return self._mlp.mlp_output(h) if self._keeps_all else self._mlp._sum(h, self._outputs)


def _bias(linear: Linear) -> Floats | None:
    return None if linear.bias is None else as_floats(linear.bias)
