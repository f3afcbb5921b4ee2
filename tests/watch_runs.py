"""Watches in a real engine on a tiny model, and what plain transformers says they must see."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from engine_runs import Bench, Job, loaded
from numpy.typing import NDArray
from oracle import _Pass
from patience import PATIENCE_SECONDS
from programs import numbers, shapes
from tiny_models import LAYERS, tiny_model
from torch import Tensor

from patchclamp_server.artifacts.head_sets import Head, HeadSelection
from patchclamp_server.interventions.program import HeadReadout, Phase, Program, Readout, Vector
from patchclamp_server.model.sites import NEURON_SITES, Site
from patchclamp_server.monitoring.activations import Activations
from patchclamp_server.monitoring.bind import bind_watch
from patchclamp_server.monitoring.items import (
    Encoder,
    WatchedDirection,
    WatchedFeatures,
    WatchedHeads,
    WatchedNeurons,
    WatchItem,
)
from patchclamp_server.monitoring.watch import NEURON_KINDS, VECTOR_SITES, ItemKind, Watch, WatchOptions

BOTH = frozenset(Phase)
EVERYTHING = -1e30


def neurons_watch(family: str = "llama", layer: int = 1, neurons: tuple[int, ...] = (3, 0, 17)) -> Watch:
    return bind_watch(
        [WatchItem("n", WatchedNeurons(layer, neurons), threshold=0.0)], loaded(family).info, None, max_items=100
    )


def watch_of_everything(family: str) -> Watch:
    """Every kind of item, at every site and several layers, in no order."""
    s = shapes(family)
    width = s.sites[Site.RESID_POST]
    items = [
        WatchItem("last", WatchedNeurons(LAYERS - 1, (5, 2, s.d_ff - 1)), threshold=0.1),
        WatchItem("heads", WatchedHeads(HeadSelection((Head(2, 1), Head(0, 3), Head(0, 0)))), threshold=0.3),
        WatchItem("all keys", WatchedHeads(HeadSelection((Head(1, 1), Head(0, 3))), include_sink=True), threshold=0.3),
        WatchItem("first", WatchedNeurons(0, (0,))),
    ]
    for site in NEURON_SITES:
        if site in s.sites:
            items.append(WatchItem(site.value, WatchedNeurons(1, (s.d_ff - 1, 0, 5), site=site), threshold=0.0))
    for site in VECTOR_SITES:
        if site in s.sites:
            vector = Vector(values=numbers(f"{family} watched {site.value}", width))
            items.append(WatchItem(site.value, WatchedDirection(vector, site, (2, 0)), threshold=-1.0))
    encoder, bias = numbers(f"{family} encoder", 3, width), torch.tensor([0.5, 0.0, -0.5])
    columns = Encoder("encoder_width_by_features", encoder.t())
    items.append(
        WatchItem("sae", WatchedFeatures(Encoder("encoder_features_by_width", encoder), 1, Site.MLP_OUT, bias))
    )
    items.append(WatchItem("jump", WatchedFeatures(columns, 0, bias=bias, jump=torch.tensor([0.0, 2.0, 4.0]))))
    return bind_watch(items, loaded(family).info, None, max_items=100)


@dataclass
class _Recorded(_Pass):
    """One pass of the oracle that keeps the activations at all sites, after the edits, and all attention."""

    sites: dict[tuple[Site, int], Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)

    def visit(self, site: Site, layer: int, activation: Tensor) -> Tensor:
        edited = super().visit(site, layer, activation)
        self.sites[site, layer] = edited.reshape(len(self.tokens), -1).clone()
        return edited

    def look(self, layer: int, weights: Tensor) -> None:
        self.attention[layer] = weights.clone()


def expected_values(family: str, watch: Watch, job: Job, tokens: Sequence[int]) -> NDArray[np.float64]:
    """[T, W] of `tokens`, by the definition of each kind."""
    asked = job.program or Program()
    # A readout of heads makes the oracle look at attention.
    reading = Program(asked.edits, (Readout(HeadReadout(), Site.ATTN_Z, all_layers=True),))
    seen = _Recorded(tiny_model(family), reading, tokens, len(job.prompt), job.roles, {}, {}).run()
    columns = []
    for kind, layer, unit in zip(watch.kinds.tolist(), watch.layers.tolist(), watch.units.tolist(), strict=True):
        if kind in NEURON_KINDS:
            column = seen.sites[NEURON_KINDS[kind], layer][:, unit].double()
        elif kind == ItemKind.HEAD:
            column = seen.attention[layer][unit].max(dim=1).values.double()
        elif kind == ItemKind.HEAD_OFF_SINK:
            # The first token sees no key but its own.
            off_sink = torch.nn.functional.pad(seen.attention[layer][unit][:, 1:], (0, 1))
            column = off_sink.max(dim=1).values.double()
        else:
            column = seen.sites[watch.sites[unit], layer].double() @ watch.vectors[unit].double()
            if kind == ItemKind.FEATURE:
                column = (column + watch.bias[unit].double()).clamp_min(0.0)
                column = torch.where(column > watch.jump[unit].double(), column, 0.0)
        columns.append(column)
    values: NDArray[np.float64] = torch.stack(columns, dim=1).numpy()
    return values


@dataclass(eq=False)
class Followed:
    """Every value of a running watch, by sequence and position: [W], NaN where no event came."""

    watch: Watch
    values: dict[tuple[int, int], NDArray[np.float64]] = field(default_factory=dict)
    generated: dict[tuple[int, int], bool] = field(default_factory=dict)
    token_ids: dict[tuple[int, int], int] = field(default_factory=dict)
    ended: bool = False

    def __call__(self, found: Activations | None) -> None:
        if found is None:
            self.ended = True
            return
        assert not found.dropped
        arrays = (found.items, found.values, found.token_ids, found.positions, found.sequences, found.generated)
        for item, value, token, position, sequence, generated in zip(*(a.tolist() for a in arrays), strict=True):
            row = self.values.setdefault((sequence, position), np.full(len(self.watch), np.nan))
            assert np.isnan(row[item]), f"token {position} of sequence {sequence} was seen twice"
            row[item] = value
            self.generated[sequence, position] = generated
            self.token_ids[sequence, position] = token

    def of(self, sequence: int) -> dict[int, NDArray[np.float64]]:
        """By position."""
        return {position: row for (own, position), row in sorted(self.values.items()) if own == sequence}


def follow(bench: Bench, watch: Watch, name: str = "seen", **options: object) -> Followed:
    """Starts a watch of every token and follows it."""
    bench.engine.monitor.start("sha256:w", watch, WatchOptions(name, **{"phases": BOTH, **options}))  # type: ignore[arg-type]
    followed = Followed(watch)
    bench.engine.monitor.subscribe(name, (), EVERYTHING, followed)
    return followed


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does."""
    import threading
    import time

    deadline = time.monotonic() + PATIENCE_SECONDS
    waiter = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        waiter.wait(0.002)
