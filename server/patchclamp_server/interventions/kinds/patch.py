"""The edit `patch` puts rows of another run into this one: t(h) = m s_p + (1 - m) h at the token of position p.

s_p is the source row that is mapped to p, and m is 1 at the units that are patched (Vig et al. 2020; Meng et al. 2022,
causal tracing). Positions may count from the end of the prompt, so that rows find their tokens when the length of the
prompt is known: placing.py. An entry has one unit for the mask and one for each position, ascending.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.activation_rows import StoredActivations, TextRows
from patchclamp_server.errors import InvalidArgument, NotFound, about
from patchclamp_server.interventions.columns import COUNT, FIRST, OTHER, UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import LARGEST_COUNT, count, distinct
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, UnitColumns, Written
from patchclamp_server.interventions.kinds.rules import Entries, StepContext, TargetRule
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where
from patchclamp_server.interventions.program import EditKind
from patchclamp_server.interventions.resolver import check_indices
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.sites import Site

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb

# This bounds the numbers that one edit puts into the banks: 256 MiB in float32.
MAX_NUMBERS = 64 << 20


class Source(Protocol):
    """Rows of one text of `length` tokens at one site: those of the tokens at `positions` [n], ascending."""

    @property
    def positions(self) -> Tensor: ...

    @property
    def length(self) -> int: ...

    def take(self, layer: int, chosen: Tensor) -> Tensor:
        """Returns the rows with these numbers, [len(chosen), width]. Raises NotFound for a layer without rows."""
        ...


@dataclass(frozen=True, eq=False)
class SourceRows:
    """A Source in memory, with rows [n, width] by layer."""

    positions: Tensor
    length: int
    rows: Mapping[int, Tensor]

    def take(self, layer: int, chosen: Tensor) -> Tensor:
        if layer not in self.rows:
            raise NotFound("", f"there are no rows of layer {layer}")
        return self.rows[layer].index_select(0, chosen)


@dataclass(frozen=True, eq=False)
class _StoredRows:
    """A Source in an artifact, of which only the rows that are taken are read."""

    stored: StoredActivations
    site: Site
    text: TextRows

    @property
    def positions(self) -> Tensor:
        return self.text.positions

    @property
    def length(self) -> int:
        return self.text.length

    def take(self, layer: int, chosen: Tensor) -> Tensor:
        wanted, place = torch.unique(chosen, return_inverse=True)
        # Neighbours are read together.
        starts = torch.cat((torch.tensor([True]), wanted[1:] != wanted[:-1] + 1)).nonzero()[:, 0].tolist()
        parts = []
        for start, end in zip(starts, [*starts[1:], len(wanted)], strict=True):
            first = self.text.first + int(wanted[start])
            run = replace(self.text, first=first, end=first + end - start)
            parts.append(self.stored.values(self.site, layer, run))
        return torch.cat(parts).index_select(0, place)


@dataclass(frozen=True, eq=False)
class Patch(EditKind):
    """`source` is the run itself, or None where rows are those of a text of the artifact `activations`. `positions` are
    pairs of a position in the prompt and one in the source text, both negative from the end; none given: every
    position of the source, onto the same one. Without units and heads, whole rows are patched."""

    activations: str = ""
    text: int = 0
    source: Source | None = None
    source_layer: int | None = None
    positions: tuple[tuple[int, int], ...] = ()
    units: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()


class PatchRule(TargetRule):
    """Has the target t(h) = m s_p + (1 - m) h. Rows come only at positions that the entry has a source of, because the
    scope of the edit is no wider."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        host, first, counts = entries.host, entries.ints(FIRST), entries.ints(COUNT)
        k = len(first)
        self._masks = entries.bank(host.unit_ints[first, OTHER].astype(np.int64), entries.width) != 0
        # The units of all entries but their masks, one entry after the other.
        owner = np.repeat(np.arange(k), counts - 1)
        starts = np.cumsum(counts - 1) - (counts - 1)
        units = first[owner] + 1 + np.arange(len(owner)) - starts[owner]
        self._keys = entries.tensor(_keys(owner, host.unit_ints[units, UNIT].astype(np.int64)))
        self._bank_rows = entries.tensor(host.unit_ints[units, OTHER].astype(np.int64))
        which = np.arange(k) if entries.which is None else entries.which
        self._which = entries.tensor(_keys(which, np.zeros(len(which), dtype=np.int64)))

    def run(self, x: Tensor, context: StepContext) -> None:
        keys = self._which + context.positions.index_select(0, self.entries.rows)
        rows = self._bank_rows.index_select(0, torch.searchsorted(self._keys, keys))
        bank = self.entries.setting.tables.bank(self.entries.width)
        self._sources = bank.data.index_select(0, rows).float()
        super().run(x, context)

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        return torch.where(self.entries.each(self._masks), self._sources, h)


def _keys(entry: IntArray, position: IntArray) -> IntArray:
    """Numbers pairs of an entry and a position so that they ascend by both."""
    keys: IntArray = entry * (LARGEST_COUNT + 1) + position
    return keys


def _write(payload: Payload) -> Written:
    """Writes the payload (positions [n], rows [n, width], mask [width]); positions ascend and are not negative."""
    positions, rows, mask = payload

    def units(held: IntArray) -> UnitColumns:
        return UnitColumns({UNIT: np.concatenate(([-1], positions.numpy())), OTHER: held})

    return Written(torch.cat((mask[None], rows)), units)


PATCH = EditTable(EntryKind.PATCH, _write, PatchRule)


def _decode(proto: "pb.Patch", field: str) -> Patch:
    if not proto.activations:
        raise InvalidArgument(f"{field}.activations", "expected the id or tag of an activations artifact")
    if proto.subspace:
        raise InvalidArgument(f"{field}.subspace", "patches within a subspace are not served; expected units, or none")
    if proto.units and proto.heads:
        raise InvalidArgument(f"{field}.heads", "units are given as well; expected one of units, heads")
    positions = tuple((each.position, each.source) for each in proto.positions)
    seen: dict[int, int] = {}
    for i, (position, _) in enumerate(positions):
        if position in seen:
            message = f"{position} is already given at index {seen[position]}"
            raise InvalidArgument(f"{field}.positions[{i}].position", message)
        seen[position] = i
    return Patch(
        proto.activations,
        count(proto.text, f"{field}.text"),
        source_layer=proto.source_layer if proto.HasField("source_layer") else None,
        positions=positions,
        units=distinct(proto.units, f"{field}.units"),
        heads=distinct(proto.heads, f"{field}.heads"),
    )


def _bind(kind: Patch, where: Where) -> EditNumbers:
    path = where.path
    mask = _mask(kind, where)
    source = _stored(kind, where) if kind.source is None else kind.source
    positions, sources = _mapped(kind.positions, source, where)
    numbers = len(positions) * len(where.layers) * where.width
    if numbers > MAX_NUMBERS:
        most = MAX_NUMBERS // (len(where.layers) * where.width)
        field = f"{path}.positions" if kind.positions else f"{path}.activations"
        message = f"expected at most {most} positions for {len(where.layers)} layers, got {len(positions)}"
        raise InvalidArgument(field, message)
    payload = {}
    for layer in where.layers:
        with _refused_at(f"{path}.activations" if kind.source_layer is None else f"{path}.source_layer"):
            rows = source.take(layer if kind.source_layer is None else kind.source_layer, sources).float()
            if rows.shape[1] != where.width:
                message = f"width {rows.shape[1]} does not fit {where.site.value}, which has {where.width}"
                raise InvalidArgument("", message)
        payload[layer] = (positions, rows, mask)
    return EditNumbers(PATCH, payload)


def _stored(kind: Patch, where: Where) -> Source:
    if not kind.activations:
        raise InvalidArgument(f"{where.path}.activations", "an activations artifact is needed")
    stored = where.resolver.activations(kind.activations, f"{where.path}.activations")
    with _refused_at(f"{where.path}.text"):
        return _StoredRows(stored, where.site, stored.rows_of(kind.text))


@contextmanager
def _refused_at(path: str) -> Iterator[None]:
    """What a source lacks is a wrong argument: the source itself was found."""
    try:
        with about(path):
            yield
    except NotFound as error:
        raise InvalidArgument(path, error.message) from error


def _mask(kind: Patch, where: Where) -> Tensor:
    """Returns 1 at the units that are patched, [width]."""
    width, info = where.width, where.resolver.info
    if kind.heads:
        if where.site is not Site.ATTN_Z:
            raise InvalidArgument(f"{where.path}.heads", f"heads are patched at attn_z, not {where.site.value}")
        check_indices(kind.heads, info.n_heads, f"{where.path}.heads", "head")
        heads = torch.zeros(info.n_heads, info.head_dim)
        heads[list(kind.heads)] = 1.0
        return heads.view(-1)
    if not kind.units:
        return torch.ones(width)
    check_indices(kind.units, width, f"{where.path}.units", "unit")
    return torch.zeros(width).index_fill_(0, torch.tensor(kind.units), 1.0)


def _mapped(pairs: Sequence[tuple[int, int]], source: Source, where: Where) -> tuple[Tensor, Tensor]:
    """Returns positions [n] of the prompt, and the rows [n] of the source that go there."""
    own, context = source.positions.tolist(), where.resolver.info.context_length
    if not pairs:
        reached = [position for position in own if position < context]
        if not reached:
            raise InvalidArgument(f"{where.path}.positions", f"the source has no row of a position below {context}")
        return torch.tensor(reached, dtype=torch.int64), torch.arange(len(reached))
    row_of, rows = {position: i for i, position in enumerate(own)}, []
    for i, (position, wanted) in enumerate(pairs):
        path = f"{where.path}.positions[{i}]"
        lowest = -context if where.prompt_length is None else -where.prompt_length
        if not lowest <= position < context:
            of = "the context" if where.prompt_length is None else "the prompt, or of the context"
            message = f"expected a position of {of}, from {lowest} to {context - 1}, got {position}"
            raise InvalidArgument(f"{path}.position", message)
        row = row_of.get(wanted if wanted >= 0 else source.length + wanted)
        if row is None:
            message = f"the source has no row of position {wanted}; it has {_listed(own)} of {source.length} tokens"
            raise InvalidArgument(f"{path}.source", message)
        rows.append(row)
    return torch.tensor([position for position, _ in pairs]), torch.tensor(rows)


def _listed(positions: list[int]) -> str:
    shown = ", ".join(map(str, positions[:8]))
    return shown if len(positions) <= 8 else f"{shown}, ... ({len(positions)} positions)"


def _inline(kind: Patch) -> str:
    return ""


EDITS = (EditSpec("patch", Patch, _decode, _bind, ("patch",), _inline),)
