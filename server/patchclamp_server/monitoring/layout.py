"""Where the items of all running watches are: which places a step stops at for them, and the columns of the ring.

Columns are in the order of the places, so that each place fills in neighbours; a watch finds its own by an index. One
layout serves all watches until one starts or stops.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.engine.peaks import Peaks
from patchclamp_server.interventions.head_readings import HeadReadings
from patchclamp_server.interventions.layout import place_number
from patchclamp_server.interventions.plan import Place
from patchclamp_server.interventions.program import Site
from patchclamp_server.interventions.scopes import IntArray
from patchclamp_server.monitoring.reference import Ints
from patchclamp_server.monitoring.ring import Gather, Look, Neurons, Project, Ring
from patchclamp_server.monitoring.watch import ItemKind, Watch
from patchclamp_server.sparsity.apply import Forced


@dataclass(eq=False)
class Layout:
    ring: Ring
    neurons: Neurons
    looks: Mapping[Place, Look]
    # By layer: what looks at the largest probabilities of its heads, [T, n_heads].
    heads: Mapping[int, Gather]
    # Of each watch, its items' columns in the ring.
    columns: Sequence[Ints]
    n_heads: int
    # Numbers of the places, of which a launch of the kernels must not run past one.
    breaks: frozenset[int] = field(init=False)
    # The last peaks that were asked for, with what they depend on.
    _peaks: tuple[Peaks, HeadReadings | None, Ints] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.breaks = frozenset(place_number(site, layer) for site, layer in self.looks)

    def peaks(self, readings: HeadReadings | None, n_rows: int) -> Peaks | None:
        """Of the rows of the step, together with those that requests read."""
        read = None if readings is None else readings.peaks
        if not self.heads:
            return read
        own = self.ring.step.index
        if self._peaks is not None:
            peaks, before, rows = self._peaks
            if before is readings and peaks.positions.shape[1] == n_rows and np.array_equal(rows, own):
                return peaks
        rows_by_layer: dict[int, IntArray] = dict.fromkeys(self.heads, own)
        for layer, asked in ({} if read is None else read.layers).items():
            rows_by_layer[layer] = np.union1d(rows_by_layer[layer], asked.rows) if layer in self.heads else asked.rows
        peaks = Peaks(dict(sorted(rows_by_layer.items())), n_rows, self.n_heads, self.ring.device)
        self._peaks = peaks, readings, own
        return peaks

    def look_at_heads(self, peaks: Peaks) -> None:
        for layer, look in self.heads.items():
            look.run(peaks.layers[layer].probabilities)


def layout_of(watches: Sequence[Watch], n_heads: int, device: torch.device, *, compiled: bool) -> Layout:
    """`device`: of the model."""
    owner = np.repeat(np.arange(len(watches)), [len(watch) for watch in watches])
    places: dict[tuple[Site | None, int], list[int]] = defaultdict(list)
    units = np.concatenate([watch.units.numpy() for watch in watches])
    kinds = np.concatenate([watch.kinds.numpy() for watch in watches])
    for number, place in enumerate(place for watch in watches for place in _places(watch)):
        places[place].append(number)
    # Neurons come first, layer after layer.
    ordered = sorted(places.items(), key=lambda entry: (entry[0][0] is not Site.MLP_POST, entry[0][1]))
    column_of = np.empty(len(owner), dtype=np.int64)
    column_of[np.concatenate([numbers for _, numbers in ordered])] = np.arange(len(owner))
    ring = Ring(len(owner), device, compiled=compiled)
    neurons = Neurons(ring, {layer: units[own] for (site, layer), own in ordered if site is Site.MLP_POST})
    looks: dict[Place, Look] = {(Site.MLP_POST, layer): look for layer, look in neurons.looks.items()}
    heads: dict[int, Gather] = {}
    for (site, layer), numbers in ordered:
        first = int(column_of[numbers[0]])
        if site is None:
            heads[layer] = Gather(ring, first, units[numbers])
        elif site is not Site.MLP_POST:
            rows = [torch.from_numpy(units[numbers][owner[numbers] == i]) for i in range(len(watches))]
            feature = torch.from_numpy(kinds[numbers] == ItemKind.FEATURE)
            looks[site, layer] = _projection(ring, first, watches, rows, feature)
    return Layout(ring, neurons, looks, heads, [column_of[owner == i] for i in range(len(watches))], n_heads)


def _places(watch: Watch) -> Iterator[tuple[Site | None, int]]:
    """Site and layer of each item; no site for a head."""
    for kind, layer, unit in zip(watch.kinds.tolist(), watch.layers.tolist(), watch.units.tolist(), strict=True):
        if kind == ItemKind.HEAD:
            yield None, layer
        else:
            yield (Site.MLP_POST if kind == ItemKind.NEURON else watch.sites[unit]), layer


def _projection(ring: Ring, first: int, watches: Sequence[Watch], rows: Sequence[Tensor], feature: Tensor) -> Project:
    """`rows`: of the vectors of each watch."""
    own = [(watch, some) for watch, some in zip(watches, rows, strict=True) if len(some)]
    vectors, bias, jump = (
        torch.cat([getattr(watch, name)[some] for watch, some in own]) for name in ("vectors", "bias", "jump")
    )
    return Project(ring, first, vectors, bias, torch.where(feature, jump.clamp_min(0.0), torch.nan))


def forced_by_watches(watches: Sequence[Watch]) -> Forced:
    """Neurons that sparse policies must keep, by layer."""
    named: dict[int, set[int]] = defaultdict(set)
    for watch in watches:
        neurons = watch.kinds == ItemKind.NEURON
        for layer, unit in zip(watch.layers[neurons].tolist(), watch.units[neurons].tolist(), strict=True):
            named[layer].add(unit)
    return {layer: torch.tensor(sorted(units), dtype=torch.int64) for layer, units in named.items()}
