"""The layout says where the items of all running watches are: the places that a step visits, and the ring's columns.

Places are numbered, and columns are in their order, so that each place fills neighbouring columns; the norms of places
come last. A watch finds its own columns by an index. One layout serves all watches until one starts or stops.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.interventions.head_readings import HeadReadings
from patchclamp_server.interventions.spans import Place
from patchclamp_server.model.arrays import IntArray
from patchclamp_server.model.attention.peaks import Peaks
from patchclamp_server.model.sites import NEURON_SITES, PREACTIVATION_SITES, Site, place_number
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.monitoring.arrays import Ints
from patchclamp_server.monitoring.looks import LOGISTIC, Gathered, Looks, Projected, looks_at
from patchclamp_server.monitoring.ring import Columns, Ring
from patchclamp_server.monitoring.watch import HEAD_KINDS, NEURON_KINDS, ItemKind, Watch
from patchclamp_server.sparsity.apply import Forced


@dataclass(eq=False)
class Layout:
    ring: Ring
    looks: Looks
    # These are the numbers of the places that a step visits.
    places: Mapping[Place, int]
    # By layer: the number of the place that sees the largest probabilities of its heads, [T, n_heads], and of the place
    # that sees the largest off the sink.
    heads: Mapping[int, int]
    heads_off_sink: Mapping[int, int]
    # These are the columns of each watch in the ring.
    columns: Sequence[Columns]
    n_layers: int
    n_heads: int
    # The kernels must not run past these places, by place_number, in one launch.
    breaks: frozenset[int] = field(init=False)
    # The gates and ups that are looked at.
    visited_preactivations: dict[tuple[Site, int], bool] = field(init=False)
    # These are the last peaks that were asked for, with what they depend on.
    _peaks: tuple[Peaks, HeadReadings | None, Ints] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.breaks = frozenset(place_number(site, layer) for site, layer in self.places)
        self.visited_preactivations = {place: True for place in self.places if place[0] in PREACTIVATION_SITES}
        self._layers = sorted(self.heads.keys() | self.heads_off_sink.keys())

    @property
    def looks_at_heads(self) -> bool:
        return bool(self._layers)

    def peaks(self, readings: HeadReadings | None, n_rows: int) -> Peaks | None:
        """Returns the peaks to fill in, for the rows of this step that watches or readouts read."""
        read = None if readings is None else readings.peaks
        if not self._layers:
            return read
        own = self.ring.step.index
        if self._peaks is not None:
            peaks, before, rows = self._peaks
            if before is readings and peaks.positions.shape[1] == n_rows and np.array_equal(rows, own):
                return peaks
        rows_by_layer: dict[int, IntArray] = dict.fromkeys(self._layers, own)
        for layer, asked in ({} if read is None else read.layers).items():
            mine = rows_by_layer.get(layer)
            rows_by_layer[layer] = asked.rows if mine is None else np.union1d(mine, asked.rows)
        ordered = dict(sorted(rows_by_layer.items()))
        off_sink = bool(self.heads_off_sink)
        peaks = Peaks(ordered, n_rows, self.n_heads, self.ring.device, off_sink=off_sink)
        self._peaks = peaks, readings, own
        return peaks

    def look_at_heads(self, peaks: Peaks) -> None:
        for layer, number in self.heads.items():
            self.looks.look(number, peaks.layers[layer].probabilities)
        for layer, number in self.heads_off_sink.items():
            off_sink = peaks.layers[layer].off_sink
            assert off_sink is not None
            self.looks.look(number, off_sink)


def layout_of(watches: Sequence[Watch], spec: DecoderSpec, device: torch.device, *, compiled: bool) -> Layout:
    """Lays out the items of the watches. `device` is that of the model."""
    owner = np.repeat(np.arange(len(watches)), [len(watch) for watch in watches])
    places: dict[tuple[Site | ItemKind, int], list[int]] = defaultdict(list)
    units = np.concatenate([watch.units.numpy() for watch in watches])
    kinds = np.concatenate([watch.kinds.numpy() for watch in watches])
    for number, place in enumerate(place for watch in watches for place in _places(watch)):
        places[place].append(number)
    ordered = sorted(places.items(), key=lambda entry: (entry[0][1], entry[0][0] in HEAD_KINDS))
    column_of = np.empty(len(owner), dtype=np.int64)
    column_of[np.concatenate([numbers for _, numbers in ordered])] = np.arange(len(owner))
    looked: list[Gathered | Projected] = []
    for (site, _), items in ordered:
        if isinstance(site, ItemKind):
            looked.append(Gathered(units[items], spec.n_heads, has_norm=False))
        elif site in NEURON_SITES:
            looked.append(Gathered(units[items], spec.sites[site]))
        else:
            rows = [torch.from_numpy(units[items][owner[items] == i]) for i in range(len(watches))]
            looked.append(_projected(watches, rows, torch.from_numpy(kinds[items])))
    norms = {place: len(owner) + i for i, place in enumerate(p for p, _ in ordered if isinstance(p[0], Site))}
    ring = Ring(len(owner) + len(norms), device, compiled=compiled)
    columns = [
        Columns.of(column_of[owner == i], np.array([norms[place] for place in watch.places], np.int64), watch.place_of)
        for i, watch in enumerate(watches)
    ]
    numbers = {place: number for number, (place, _) in enumerate(ordered)}
    return Layout(
        ring,
        looks_at(looked, ring),
        {(site, layer): number for (site, layer), number in numbers.items() if isinstance(site, Site)},
        {layer: number for (site, layer), number in numbers.items() if site is ItemKind.HEAD},
        {layer: number for (site, layer), number in numbers.items() if site is ItemKind.HEAD_OFF_SINK},
        columns,
        spec.n_layers,
        spec.n_heads,
    )


def _places(watch: Watch) -> Iterator[tuple[Site | ItemKind, int]]:
    """Yields the site and layer of each item; for a head, which is at no site, its kind and layer."""
    for kind, layer, place in zip(watch.kinds.tolist(), watch.layers.tolist(), watch.place_of.tolist(), strict=True):
        yield (ItemKind(kind), layer) if place < 0 else watch.places[place]


def _projected(watches: Sequence[Watch], rows: Sequence[Tensor], kinds: Tensor) -> Projected:
    """Joins the vectors of one place; `rows` are those of each watch, `kinds` those of all items."""
    own = [(watch, some) for watch, some in zip(watches, rows, strict=True) if len(some)]
    vectors, bias, jump = (
        torch.cat([getattr(watch, name)[some] for watch, some in own]) for name in ("vectors", "bias", "jump")
    )
    cut = torch.where(kinds == ItemKind.FEATURE, jump.clamp_min(0.0), torch.nan)
    return Projected(vectors, bias, torch.where(kinds == ItemKind.PROBABILITY, LOGISTIC, cut))


def forced_by_watches(watches: Sequence[Watch]) -> Forced:
    """Returns the neurons that sparse policies must keep, by layer."""
    named: dict[int, set[int]] = defaultdict(set)
    for watch in watches:
        neurons = torch.isin(watch.kinds, torch.tensor(list(NEURON_KINDS)))
        for layer, unit in zip(watch.layers[neurons].tolist(), watch.units[neurons].tolist(), strict=True):
            named[layer].add(unit)
    return {layer: torch.tensor(sorted(units), dtype=torch.int64) for layer, units in named.items()}
