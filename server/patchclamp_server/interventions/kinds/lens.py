"""The readout logit_lens: what states say of the next token, and what parts of the residual stream add to that.

    at a residual site       log softmax(unembed(norm(h)))
    of attn_out, mlp_out     W (g ⊙ (a - mean(a)) / d)            mean(a) where the final norm has a bias, else 0
    of neuron i, mlp_post    the same of a_i W_down[:, i], after the post-MLP norm held fixed where there is one

W is the unembedding, g the weight of the final norm and d its divisor for the residual stream at the end of the last
block, after all edits. Divisors held fixed make norms linear: with the embedding, what edits add to the residual stream
and the biases, all contributions sum to the logit before a soft cap, as those of attribution.py do.

Whole rows are read, by torch on every device.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.bound import BoundReadout
from patchclamp_server.interventions.columns import FIRST, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import count, distinct
from patchclamp_server.interventions.kinds.kind import ReadoutTable, Written
from patchclamp_server.interventions.kinds.latents import ROWS_AT_ONCE
from patchclamp_server.interventions.kinds.rankings import RowsRead
from patchclamp_server.interventions.kinds.rules import Entries, StepContext
from patchclamp_server.interventions.kinds.spec import ReadoutNumbers, ReadoutSpec, Where
from patchclamp_server.interventions.program import LogitLensReadout
from patchclamp_server.interventions.resolver import check_indices, check_top_k
from patchclamp_server.interventions.row_arithmetic import row_dots
from patchclamp_server.model.sites import RESIDUAL_SITES, Site

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb

MAX_TOKENS = 256
# Each is read by the whole vocabulary where the k largest are asked for.
MAX_NEURONS = 64


class Asked:
    """What is asked of V vectors, one for each pair of an entry and a row, or one for each neuron of the pair."""

    def __init__(self, entries: Entries) -> None:
        own: list[BoundReadout] = [_readout_of(entries, number) for number in entries.ints(FIRST).tolist()]
        which = range(len(own)) if entries.which is None else entries.which.tolist()
        self.by_pair = [own[i] for i in which]
        # Neurons belong to pairs where the site is theirs; else a pair has one vector.
        self.neurons = [neuron for readout in self.by_pair for neuron in readout.ids]
        counts = [len(readout.ids) or 1 for readout in self.by_pair]
        self.pair = np.repeat(np.arange(len(counts)), counts)  # [V]
        every = [self.by_pair[i] for i in self.pair.tolist()]
        self.k = max(readout.k for readout in every)
        self.top = entries.tensor(np.flatnonzero([readout.k > 0 for readout in every]))
        self.tokens = entries.tensor(np.array([t for readout in every for t in readout.tokens], dtype=np.int64))
        lengths = np.array([len(readout.tokens) for readout in every])
        self.vector_of_token = entries.tensor(np.repeat(np.arange(len(every)), lengths))
        self.counts = counts

    def answers(
        self, largest: tuple[Tensor, Tensor] | None, chosen: Tensor
    ) -> list[tuple[Sequence[float], tuple[int, ...]]]:
        """Returns the values and ids of each pair, given the `largest` of vectors `top`, [n, k] values and ids, and the
        values of `tokens`."""
        rows = iter(()) if largest is None else zip(*(part.cpu().tolist() for part in largest), strict=True)
        values, ends = chosen.cpu().tolist(), list(accumulate(self.counts))
        found: list[tuple[Sequence[float], tuple[int, ...]]] = []
        at = 0
        for readout, start, end in zip(self.by_pair, [0, *ends], ends, strict=False):
            if readout.k:
                own = [next(rows) for _ in range(start, end)]
                listed = tuple(v for of_vector, _ in own for v in of_vector[: readout.k])
                found.append((listed, tuple(i for _, ids in own for i in ids[: readout.k])))
            else:
                n = len(readout.tokens) * (end - start)
                found.append((tuple(values[at : at + n]), readout.tokens * (end - start)))
                at += n
        return found


class StateRule(RowsRead):
    """Reads residual states."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.asked = Asked(entries)
        self.read: tuple[tuple[Tensor, Tensor] | None, Tensor] | None = None

    def run(self, x: Tensor, context: StepContext) -> None:
        asked = self.asked
        logits = self.entries.setting.decoder.logits(x.index_select(0, self.entries.rows))
        logprobs = torch.log_softmax(logits, dim=1)
        largest = None
        if asked.k:
            top = torch.topk(logprobs.index_select(0, asked.top), asked.k, dim=1)
            largest = top.values, top.indices
        self.read = largest, logprobs[asked.vector_of_token, asked.tokens]

    def found(self, end: Tensor) -> list[tuple[Sequence[float], tuple[int, ...]]]:
        assert self.read is not None
        return self.asked.answers(*self.read)


class ContributionRule(RowsRead):
    """Keeps what is added to the residual stream, and reads it when it is known where the stream ends."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.decoder = entries.setting.decoder
        self.asked = Asked(entries)
        self.pair = entries.tensor(self.asked.pair)  # [V]
        self.kept: Tensor | None = None

    def run(self, x: Tensor, context: StepContext) -> None:
        self.kept = x.index_select(0, self.entries.rows)

    def found(self, end: Tensor) -> list[tuple[Sequence[float], tuple[int, ...]]]:
        asked, unembedding = self.asked, self.decoder.unembedding
        norm = self.decoder.final_norm
        divisor = norm.divisor(end.index_select(0, self.entries.rows).float())
        parts = norm.share(self._added(), divisor.index_select(0, self.pair))  # [V, d_model]
        largest = self._largest(parts.index_select(0, asked.top)) if asked.k else None
        weights = unembedding.rows(asked.tokens)
        return asked.answers(largest, row_dots(parts.index_select(0, asked.vector_of_token), weights))

    def _added(self) -> Tensor:
        """Returns the vectors [V, d_model] that are added to the residual stream, in float32."""
        assert self.kept is not None
        if self.entries.site is not Site.MLP_POST:
            return self.kept.float()
        norm = self.decoder.blocks[self.entries.layer].post_mlp_norm
        values = self.kept[self.pair, self._neurons].float()
        added = values[:, None] * self._columns
        if norm is None:
            return added
        whole = self.decoder.blocks[self.entries.layer].mlp_output(self.kept)
        return norm.share(added, norm.divisor(whole.float()).index_select(0, self.pair))

    @cached_property
    def _neurons(self) -> Tensor:
        return self.entries.tensor(np.array(self.asked.neurons, dtype=np.int64))  # [V]

    @cached_property
    def _columns(self) -> Tensor:
        distinct_ones, which = torch.unique(self._neurons, return_inverse=True)
        down = self.decoder.blocks[self.entries.layer].mlp_output
        return down.columns(distinct_ones).index_select(0, which)  # [V, d_model]

    def _largest(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        unembedding = self.decoder.unembedding
        values, ids = [], []
        for start in range(0, len(parts), ROWS_AT_ONCE):
            logits = unembedding(parts[start : start + ROWS_AT_ONCE].to(self.decoder.dtype)).float()
            if unembedding.bias is not None:
                logits = logits - unembedding.bias.float()
            top = torch.topk(logits, self.asked.k, dim=1)
            values.append(top.values)
            ids.append(top.indices)
        return torch.cat(values), torch.cat(ids)


def _readout_of(entries: Entries, number: int) -> BoundReadout:
    held = entries.setting.tables.objects[number]
    assert isinstance(held, BoundReadout)
    return held


def _rule(entries: Entries, flags: EntryFlag) -> RowsRead:
    return StateRule(entries) if entries.site in RESIDUAL_SITES else ContributionRule(entries)


def _held(readout: BoundReadout, layer: int) -> Written:
    return Written(held=readout)


LOGIT_LENS = ReadoutTable(EntryKind.LOGIT_LENS, _held, _rule)


def _decode(proto: "pb.LogitLensReadout", field: str) -> LogitLensReadout:
    if proto.token_ids and proto.k:
        raise InvalidArgument(f"{field}.token_ids", "k is given as well; expected one of k, token_ids")
    tokens = distinct(proto.token_ids, f"{field}.token_ids")
    k = 0 if tokens else count(proto.k, f"{field}.k", low=1)
    return LogitLensReadout(k, tokens, distinct(proto.neurons, f"{field}.neurons"))


def _bind(kind: LogitLensReadout, where: Where) -> ReadoutNumbers:
    info, path, site = where.resolver.info, where.path, where.site
    parts = (Site.ATTN_OUT, Site.MLP_OUT, Site.MLP_POST)
    if site not in (*RESIDUAL_SITES, *parts):
        named = ", ".join(each.value for each in (*RESIDUAL_SITES, *parts) if each in info.sites)
        raise InvalidArgument(f"{where.owner}.site", f"the logit lens reads {named}, not {site.value}")
    if site is Site.MLP_POST and not kind.neurons:
        raise InvalidArgument(f"{path}.neurons", "expected at least one: at mlp_post each neuron is read by itself")
    if site is not Site.MLP_POST and kind.neurons:
        raise InvalidArgument(f"{path}.neurons", f"neurons are read at mlp_post, not {site.value}")
    for name, given, most in (("neurons", kind.neurons, MAX_NEURONS), ("token_ids", kind.token_ids, MAX_TOKENS)):
        if len(given) > most:
            raise InvalidArgument(f"{path}.{name}", f"expected at most {most}, got {len(given)}")
    check_indices(kind.neurons, where.width, f"{path}.neurons", "neuron")
    if kind.token_ids:
        check_indices(kind.token_ids, info.vocab_size, f"{path}.token_ids", "token")
    else:
        check_top_k(kind.k, info.vocab_size, f"{path}.k")
    return ReadoutNumbers(ids=kind.neurons, k=kind.k, tokens=kind.token_ids)


READOUTS = (
    ReadoutSpec(
        "logit_lens",
        LogitLensReadout,
        _decode,
        _bind,
        ("read_logit_lens",),
        LOGIT_LENS,
        ids_are_tokens=True,
    ),
)
