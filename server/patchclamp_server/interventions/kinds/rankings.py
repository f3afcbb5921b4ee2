"""The readout top_neurons reads whole rows, and keeps the k largest: readouts that need whole rows begin here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import COUNT, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import count
from patchclamp_server.interventions.kinds.kind import ReadoutTable, Written
from patchclamp_server.interventions.kinds.rules import Entries, StepContext
from patchclamp_server.interventions.kinds.spec import ReadoutNumbers, ReadoutSpec, Where, check_neuron_site
from patchclamp_server.interventions.program import TopNeuronsReadout
from patchclamp_server.interventions.resolver import check_top_k

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class RowsRead(ABC):
    """A rule that reads whole rows in torch, and tells what it found once the step is over."""

    @abstractmethod
    def run(self, x: Tensor, context: StepContext) -> None: ...

    @abstractmethod
    def found(self, end: Tensor) -> list[tuple[Sequence[float], tuple[int, ...]]]:
        """Returns the values and ids of each pair in the last step, which left the residual stream at `end` [T,
        d_model]."""


class RankingRule(RowsRead):
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

    def found(self, end: Tensor) -> list[tuple[Sequence[float], tuple[int, ...]]]:
        assert self.values is not None
        assert self.ids is not None
        values, ids = self.values.float().cpu().tolist(), self.ids.cpu().tolist()
        lengths = self.lengths.tolist()
        return [(tuple(v[:n]), tuple(i[:n])) for v, i, n in zip(values, ids, lengths, strict=True)]


class TopNeuronsRule(RankingRule):
    """Reads the k neurons with the largest |a|, with their signed values."""

    def read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.topk(h.abs(), self.k, dim=1).indices
        return h.gather(1, ids), ids


def _k(readout: BoundReadout, layer: int) -> Written:
    return Written(count=readout.k)


TOP_NEURONS = ReadoutTable(EntryKind.TOP_NEURONS, _k, TopNeuronsRule)


def _decode_top_neurons(proto: "pb.TopNeuronsReadout", field: str) -> TopNeuronsReadout:
    return TopNeuronsReadout(count(proto.k, f"{field}.k", low=1))


def _bind_top_neurons(kind: TopNeuronsReadout, where: Where) -> ReadoutNumbers:
    check_neuron_site(where, "read")
    check_top_k(kind.k, where.width, f"{where.path}.k")
    return ReadoutNumbers(k=kind.k)


READOUTS = (
    ReadoutSpec(
        "top_neurons",
        TopNeuronsReadout,
        _decode_top_neurons,
        _bind_top_neurons,
        ("read_top_neurons",),
        TOP_NEURONS,
    ),
)
