"""top_neurons, logit_lens: readouts of whole rows, the k largest of what is made of them."""

import torch
from torch import Tensor

from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import COUNT, EntryFlag, EntryKind
from patchclamp_server.interventions.kinds.kind import ReadoutTable, Written
from patchclamp_server.interventions.kinds.rules import Entries, StepContext


class RankingRule:
    """Keeps the `k` largest of each row; subclasses say of what."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        self.entries = entries
        self.lengths = entries.host.ints[entries.entry, COUNT]  # [E] what each asks for
        self.k = int(self.lengths.max())
        self.values: Tensor | None = None  # [E, k]
        self.ids: Tensor | None = None  # [E, k]

    def run(self, x: Tensor, context: StepContext) -> None:
        self.values, self.ids = self.read(x.index_select(0, self.entries.rows))

    def read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def found(self) -> list[tuple[tuple[float, ...], tuple[int, ...]]]:
        """Values and ids of each pair, of the last step."""
        assert self.values is not None
        assert self.ids is not None
        values, ids = self.values.float().cpu().tolist(), self.ids.cpu().tolist()
        lengths = self.lengths.tolist()
        return [(tuple(v[:n]), tuple(i[:n])) for v, i, n in zip(values, ids, lengths, strict=True)]


class TopNeuronsRule(RankingRule):
    """The k neurons with the largest |a|, with their signed values."""

    def read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.topk(h.abs(), self.k, dim=1).indices
        return h.gather(1, ids), ids


class LogitLensRule(RankingRule):
    """log softmax of the final norm and unembedding applied to a residual state: the k most likely tokens."""

    def read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(self.entries.setting.unembed(h), dim=1)
        top = torch.topk(logprobs, self.k, dim=1)
        return top.values, top.indices


def _k(readout: BoundReadout, layer: int) -> Written:
    return Written(count=readout.k)


TOP_NEURONS = ReadoutTable(EntryKind.TOP_NEURONS, _k, TopNeuronsRule)
LOGIT_LENS = ReadoutTable(EntryKind.LOGIT_LENS, _k, LogitLensRule)
