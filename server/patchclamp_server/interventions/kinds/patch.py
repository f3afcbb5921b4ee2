"""The edit `patch` puts rows of another run into this one, at the token of position p.

    units      t(h) = m s_p + (1 - m) h        m is 1 at the units that are patched
    subspace   t(h) = h + R^T R (s_p - h)      R [rank, width] of a subspace artifact (Geiger et al. 2024, interchange)

s_p is the source row that is mapped to p (Vig et al. 2020; Meng et al. 2022, causal tracing). Positions may count from
the end of the prompt, so that rows find their tokens when the length of the prompt is known: placing.py. An entry has
one unit for each position, ascending, and before them one for the mask, which stands at -1, or one for each row of R,
which stand at -1 - rank to -2.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.artifacts.activation_rows import StoredActivations, TextRows
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.cpu.invariant import operators as invariant
from patchclamp_server.errors import InvalidArgument, NotFound, about
from patchclamp_server.interventions.banks import ZERO_ROW
from patchclamp_server.interventions.columns import COUNT, FIRST, MASK, OTHER, UNIT, EntryFlag, EntryKind
from patchclamp_server.interventions.field_checks import LARGEST_COUNT, count, distinct
from patchclamp_server.interventions.kinds.kind import EditTable, Payload, UnitColumns, Written
from patchclamp_server.interventions.kinds.rules import Entries, Grid, StepContext, TargetRule
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
    position of the source, onto the same one. The subspace is an artifact, or `rotation` [rank, width] itself. Without
    units, heads and either of these, whole rows are patched."""

    activations: str = ""
    text: int = 0
    source: Source | None = None
    source_layer: int | None = None
    positions: tuple[tuple[int, int], ...] = ()
    units: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    subspace: str = ""
    rotation: Tensor | None = None


class PatchRule(TargetRule):
    """Has the target t(h) = m s_p + (1 - m) h, or h + R^T R (s_p - h). Rows come only at positions that the entry has a
    source of, because the scope of the edit is no wider."""

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        host, first, counts = entries.host, entries.ints(FIRST), entries.ints(COUNT)
        k = len(first)
        # The rows of R stand at -1 - rank and on.
        ranks = np.maximum(MASK - host.unit_ints[first, UNIT].astype(np.int64), 0)
        heads = np.where(ranks > 0, ranks, 1)
        mask = np.where(ranks > 0, ZERO_ROW, host.unit_ints[first, OTHER])
        self._masks = entries.bank(mask.astype(np.int64), entries.width) != 0
        self._subspaces = _Subspaces(entries, first, ranks) if ranks.any() else None
        # The units of all entries but their masks or subspaces, one entry after the other.
        places = counts - heads
        owner = np.repeat(np.arange(k), places)
        starts = np.cumsum(places) - places
        units = first[owner] + heads[owner] + np.arange(len(owner)) - starts[owner]
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
        patched = torch.where(self.entries.each(self._masks), self._sources, h)
        return patched if self._subspaces is None else self._subspaces.target(h, self._sources, patched)


class _Subspaces:
    """The subspaces of those of k entries that have one; zeros pad their rows to the largest rank."""

    def __init__(self, entries: Entries, first: IntArray, ranks: IntArray) -> None:
        rank = np.arange(int(ranks.max()))
        padding = rank >= ranks[:, None]  # [k, most]
        number = np.where(padding, 0, first[:, None] + rank)
        rows = np.where(padding, ZERO_ROW, entries.host.unit_ints[number, OTHER]).astype(np.int64)
        self._rotation = entries.bank(rows.reshape(-1), entries.width).view(*padding.shape, entries.width)
        self._bias = torch.zeros(padding.shape, device=self._rotation.device)
        self._owner = entries.tensor(np.arange(len(first))) if entries.index is None else entries.index
        self._has = entries.each(entries.tensor(ranks > 0))[:, None]
        self._grid = Grid(entries)

    def target(self, h: Tensor, sources: Tensor, others: Tensor) -> Tensor:
        """Returns h + R^T R (s - h), and `others` of entries without a subspace."""
        moved = sources - h
        if invariant.holds_for(h):
            own = invariant.low_rank(h, moved, self._owner, self._rotation, self._bias, self._rotation)
        else:
            inner = torch.bmm(self._grid.spread(moved), self._rotation.transpose(1, 2))
            own = h + self._grid.collect(torch.bmm(inner, self._rotation))
        return torch.where(self._has, own, others)


def _keys(entry: IntArray, position: IntArray) -> IntArray:
    """Numbers pairs of an entry and a position so that they ascend by both."""
    keys: IntArray = entry * (LARGEST_COUNT + 1) + position
    return keys


def _write(payload: Payload) -> Written:
    """Writes the payload (positions [n], rows [n, width], mask [width] or R [rank, width]); positions ascend and are
    not negative."""
    positions, rows, patched = payload
    before = np.array([MASK]) if patched.dim() == 1 else np.arange(MASK - len(patched), MASK)

    def units(held: IntArray) -> UnitColumns:
        return UnitColumns({UNIT: np.concatenate((before, positions.numpy())), OTHER: held})

    return Written(torch.cat((patched.view(-1, rows.shape[1]), rows)), units)


PATCH = EditTable(EntryKind.PATCH, _write, PatchRule)


def _decode(proto: "pb.Patch", field: str) -> Patch:
    if not proto.activations:
        raise InvalidArgument(f"{field}.activations", "expected the id or tag of an activations artifact")
    given = [name for name in ("units", "heads", "subspace") if getattr(proto, name)]
    if len(given) > 1:
        raise InvalidArgument(
            f"{field}.{given[-1]}", f"{given[0]} are given as well; expected one of units, heads, subspace"
        )
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
        subspace=proto.subspace,
    )


def _bind(kind: Patch, where: Where) -> EditNumbers:
    path = where.path
    patched = _patched(kind, where)
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
        payload[layer] = (positions, rows, patched[layer])
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


def _patched(kind: Patch, where: Where) -> dict[int, Tensor]:
    """Returns by layer the mask [width], or the rows [rank, width] of the subspace."""
    if kind.rotation is not None:
        return dict.fromkeys(where.layers, kind.rotation.float())
    if not kind.subspace:
        return dict.fromkeys(where.layers, _mask(kind, where))
    path = f"{where.path}.subspace"
    artifact = where.resolver.artifact_at(kind.subspace, ArtifactKind.SUBSPACE, where.layers, where.width, path)
    return {layer: artifact.subspace(layer).rotation.float() for layer in where.layers}


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
