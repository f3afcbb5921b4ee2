"""Sets tell which neurons are active for which row of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_kernels.runtime import check_tensor


@dataclass(frozen=True, eq=False)
class NeuronSets:
    """Holds S sets of at most K neurons, and the set of each of B rows. Rows of one set share the reads of its weights.

    An entry of `index` outside of [0, d_ff) is padding and may stand anywhere; a neuron stands at most once in a set
    (a second time, it counts twice). A row whose `which` is outside of [0, S), say -1, has no set: it is left alone,
    in tensors that are given bit for bit, so that the dense rows of a batch may have been written there already.
    """

    index: Tensor  # int32 [S, K]
    which: Tensor  # int32 [B]

    def check(self, x: Tensor) -> None:
        check_tensor("sets.index", self.index, shape=(None, None), dtypes=(torch.int32,), device=x.device)
        check_tensor("sets.which", self.which, shape=(x.shape[0],), dtypes=(torch.int32,), device=x.device)

    def of_rows(self, neurons: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns, for references, the neuron of each row and slot [B, K] (0 in padding), where it is one, and rows
        with a set [B]."""
        sets, slots = self.index.shape
        has_set = (self.which >= 0) & (self.which < sets)
        if sets == 0:
            index = self.index.new_full((len(self.which), slots), -1)
        else:
            index = self.index[torch.where(has_set, self.which, 0).long()]
        active = (index >= 0) & (index < neurons) & has_set[:, None]
        return torch.where(active, index, 0).long(), active, has_set
