"""The readouts top_neurons and logit_lens read whole rows, and keep the k largest of what is made of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import COUNT, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import count
from patchclamp_server.interventions.kinds.kind import ReadoutTable, Written
from patchclamp_server.interventions.kinds.rules import Entries, StepContext
from patchclamp_server.interventions.kinds.spec import ReadoutNumbers, ReadoutSpec, Where, check_neuron_site
from patchclamp_server.interventions.program import LogitLensReadout, TopNeuronsReadout
from patchclamp_server.interventions.resolver import check_top_k
from patchclamp_server.model.sites import RESIDUAL_SITES

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class RowsRead(ABC):
    """A rule that reads whole rows in torch, and tells what it found once the step is over."""

    @abstractmethod
    def run(self, x: Tensor, context: StepContext) -> None: ...

    @abstractmethod
    def found(self) -> list[tuple[Sequence[float], tuple[int, ...]]]:
        """Returns the values and ids of each pair in the last step."""


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

    def found(self) -> list[tuple[Sequence[float], tuple[int, ...]]]:
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


class LogitLensRule(RankingRule):
    """Reads the k most likely tokens by log softmax(unembed(norm(h))) of a residual state."""

    def read(self, h: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(self.entries.setting.decoder.logits(h), dim=1)
        top = torch.topk(logprobs, self.k, dim=1)
        return top.values, top.indices


def _k(readout: BoundReadout, layer: int) -> Written:
    return Written(count=readout.k)


TOP_NEURONS = ReadoutTable(EntryKind.TOP_NEURONS, _k, TopNeuronsRule)
LOGIT_LENS = ReadoutTable(EntryKind.LOGIT_LENS, _k, LogitLensRule)


def _decode_top_neurons(proto: "pb.TopNeuronsReadout", field: str) -> TopNeuronsReadout:
    return TopNeuronsReadout(count(proto.k, f"{field}.k", low=1))


def _bind_top_neurons(kind: TopNeuronsReadout, where: Where) -> ReadoutNumbers:
    check_neuron_site(where, "read")
    check_top_k(kind.k, where.width, f"{where.path}.k")
    return ReadoutNumbers(k=kind.k)


def _decode_lens(proto: "pb.LogitLensReadout", field: str) -> LogitLensReadout:
    return LogitLensReadout(count(proto.k, f"{field}.k", low=1))


def _bind_lens(kind: LogitLensReadout, where: Where) -> ReadoutNumbers:
    if where.site not in RESIDUAL_SITES:
        raise InvalidArgument(f"{where.owner}.site", f"the logit lens reads a residual site, not {where.site.value}")
    check_top_k(kind.k, where.resolver.info.vocab_size, f"{where.path}.k")
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
    ReadoutSpec(
        "logit_lens",
        LogitLensReadout,
        _decode_lens,
        _bind_lens,
        ("read_logit_lens",),
        LOGIT_LENS,
        ids_are_tokens=True,
    ),
)
