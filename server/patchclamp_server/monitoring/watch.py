"""A watch is W items of five kinds as plain numbers, so that it can be an artifact.

    neuron     a                            the activation at mlp_post, or what it is made of, at mlp_gate or mlp_up
    direction  h · v, |v| = 1               at a site of the residual width
    feature    max(0, h · w + b), and 0 where that is not above the feature's jump
    probe      1 / (1 + exp(-(h · w + b))), the probability of its target, or h · w + b, its number
    head       the largest attention probability, off the sink: keys at position 0 are left out, and the
               probabilities of the others remain those of the whole softmax; or, where asked for, of all keys

All values are taken after all edits. An item fires at a token where its value is above its threshold, which is a
number, or a quantile of its own values, see scale.py.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp_server.errors import FailedPrecondition, InvalidArgument
from patchclamp_server.interventions.program import Phase
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.monitoring.tensors import checked

# Directions and features are watched at these sites of the residual width.
VECTOR_SITES = (Site.RESID_PRE, Site.RESID_MID, Site.RESID_POST, Site.ATTN_OUT, Site.MLP_OUT)
NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
MAX_BUCKETS = 32
DEFAULT_CALIBRATION_TOKENS, MAX_CALIBRATION_TOKENS = 1024, 4096
DEFAULT_WINDOW_TOKENS = 4096
# The length of a direction in float32 may differ from 1 by this.
UNIT_ROUNDING = 1e-3
MAX_WINDOW_TOKENS = MAX_REFERENCE_TOKENS = 2**24


class ItemKind(IntEnum):
    NEURON = 0
    DIRECTION = 1
    FEATURE = 2
    HEAD = 3
    HEAD_OFF_SINK = 4
    GATE_OF_NEURON = 5
    UP_OF_NEURON = 6
    PROBABILITY = 7
    NUMBER = 8


HEAD_KINDS = (ItemKind.HEAD, ItemKind.HEAD_OFF_SINK)
VECTOR_KINDS = (ItemKind.DIRECTION, ItemKind.FEATURE, ItemKind.PROBABILITY, ItemKind.NUMBER)
# Kinds of neurons by the site that they are watched at.
NEURON_KIND_OF = {
    Site.MLP_POST: ItemKind.NEURON,
    Site.MLP_GATE: ItemKind.GATE_OF_NEURON,
    Site.MLP_UP: ItemKind.UP_OF_NEURON,
}
NEURON_KINDS = {kind: site for site, kind in NEURON_KIND_OF.items()}
# Users know the kinds by these names; _NAME_OF_KIND says which kind has which.
KIND_NAMES = ("neuron", "direction", "feature", "head", "probe")
# Of each ItemKind, the place of its name in KIND_NAMES.
_NAME_OF_KIND = np.array([0, 1, 2, 3, 3, 0, 0, 4, 4], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Watch:
    """Has W items, D of them with a vector. `units` is the neuron, the head, or the row of `vectors`."""

    names: tuple[str, ...]  # [W]
    kinds: Tensor  # int64 [W], of ItemKind
    layers: Tensor  # int64 [W]
    units: Tensor  # int64 [W]
    thresholds: Tensor  # float64 [W]
    vectors: Tensor  # float32 [D, d_model]
    sites: tuple[Site, ...]  # [D]
    bias: Tensor  # float32 [D], 0 for directions
    jump: Tensor  # float32 [D], 0 for all but features
    # float64 [W]: the quantile that an item's threshold is, 0 where it is a number. Empty where all are numbers.
    quantiles: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The names of the kinds that occur, in the order of KIND_NAMES."""
        return tuple(KIND_NAMES[place] for place in np.unique(self._kind_places()).tolist())

    @property
    def kind_of(self) -> NDArray[np.int64]:
        """The index [W] of each item's kind in `kind_names`."""
        return np.unique(self._kind_places(), return_inverse=True)[1].astype(np.int64)

    @cached_property
    def places(self) -> tuple[tuple[Site, int], ...]:
        """The site and layer of its items, each once, in their order. Heads are at none."""
        return tuple(dict.fromkeys(place for place in self._sites_and_layers() if place is not None))

    @cached_property
    def place_of(self) -> NDArray[np.int64]:
        """The index [W] of each item's place in `places`; -1 for heads."""
        number = {place: number for number, place in enumerate(self.places)}
        found = [-1 if place is None else number[place] for place in self._sites_and_layers()]
        return np.array(found, dtype=np.int64)

    def _sites_and_layers(self) -> Iterator[tuple[Site, int] | None]:
        for kind, layer, unit in zip(self.kinds.tolist(), self.layers.tolist(), self.units.tolist(), strict=True):
            if kind in HEAD_KINDS:
                yield None
            else:
                yield NEURON_KINDS.get(kind) or self.sites[unit], layer

    def _kind_places(self) -> NDArray[np.int64]:
        places: NDArray[np.int64] = _NAME_OF_KIND[self.kinds.numpy()]
        return places

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name, none of them empty: without vectors, what belongs to them is left out."""
        texts = {"names": self.names, "sites": [site.value for site in self.sites]}
        tensors = {name: _as_bytes(json.dumps(list(text))) for name, text in texts.items()}
        for name in ("kinds", "layers", "units", "thresholds", "vectors", "bias", "jump", "quantiles"):
            tensor: Tensor = getattr(self, name)
            if tensor.numel():
                tensors[name] = tensor
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Watch":
        """Raises InvalidArgument for tensors that are not a watch of any model; see check_watch for one model."""
        names, sites = _strings(tensors, "names"), _strings(tensors, "sites")
        n = len(names)
        if not n or len(set(names)) != n:
            raise InvalidArgument("", "a watch has items, each with a name of its own")
        known = {site.value: site for site in VECTOR_SITES}
        if unknown := [site for site in sites if site not in known]:
            raise InvalidArgument("", f"sites must be of {', '.join(known)}, not {unknown[0]!r:.40}")
        numbers = {name: checked(tensors, name, torch.int64, [n]) for name in ("kinds", "layers", "units")}
        thresholds = checked(tensors, "thresholds", torch.float64, [n])
        quantiles = torch.empty(0)
        if "quantiles" in tensors:
            quantiles = checked(tensors, "quantiles", torch.float64, [n])
            if float(quantiles.min()) < 0.0 or float(quantiles.max()) >= 1.0:
                raise InvalidArgument("", "quantiles are above 0 and below 1, or 0 for a threshold that is a number")
        vectors, bias, jump = torch.empty(0, 0), torch.empty(0), torch.empty(0)
        if sites:
            vectors = checked(tensors, "vectors", torch.float32, [len(sites), None])
            bias, jump = (checked(tensors, name, torch.float32, [len(sites)]) for name in ("bias", "jump"))
        unexpected = tensors.keys() - {"names", "sites", *numbers, "thresholds", "quantiles"}
        if unexpected - {"vectors", "bias", "jump"} or (unexpected and not sites):
            raise InvalidArgument("", f"a watch has no tensors {', '.join(sorted(unexpected))}")
        kinds, units = numbers["kinds"], numbers["units"]
        if int(kinds.min()) < 0 or int(kinds.max()) >= len(ItemKind) or int(units.min()) < 0:
            raise InvalidArgument("", f"kinds are 0 to {len(ItemKind) - 1}, and no unit is negative")
        with_vector = torch.isin(kinds, torch.tensor(list(VECTOR_KINDS)))
        if int(numbers["layers"].min()) < 0 or bool((units[with_vector] >= len(sites)).any()):
            raise InvalidArgument("", "an item names a layer or a vector that there is not")
        return cls(tuple(names), kinds, numbers["layers"], units, thresholds, vectors,
                   tuple(known[site] for site in sites), bias, jump, quantiles)  # fmt: skip


def check_watch(watch: Watch, spec: DecoderSpec | ModelInfo) -> None:
    """Checks that a stored watch fits the model. Raises FailedPrecondition."""
    if int(watch.layers.max()) >= spec.n_layers:
        raise FailedPrecondition("watch", f"watches layer {int(watch.layers.max())}; the model has {spec.n_layers}")
    neurons, heads = (torch.isin(watch.kinds, torch.tensor(list(kinds))) for kinds in (NEURON_KINDS, HEAD_KINDS))
    for name, own, most in (("neuron", neurons, spec.d_ff), ("head", heads, spec.n_heads)):
        units = watch.units[own]
        if len(units) and int(units.max()) >= most:
            raise FailedPrecondition("watch", f"watches {name} {int(units.max())}; a layer of the model has {most}")
    if len(watch.sites) and watch.vectors.shape[1] != spec.d_model:
        raise FailedPrecondition("watch", f"has vectors of {watch.vectors.shape[1]}; the model has {spec.d_model}")
    for row in sorted(set(watch.units[watch.kinds == ItemKind.DIRECTION].tolist())):
        length = float(watch.vectors[row].norm())
        if abs(length - 1.0) > UNIT_ROUNDING:
            message = f"has a direction of length {length:.4g}, where values are those on unit vectors: create it again"
            raise FailedPrecondition("watch", message)
    for site, _ in watch.places:
        if site not in spec.sites:
            raise FailedPrecondition("watch", f"watches {site.value}, which {spec.architecture} has not")


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _strings(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    encoded = checked(tensors, name, torch.uint8, [None])
    try:
        texts = json.loads(bytes(encoded.tolist()))
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidArgument("", f"{name} must hold the bytes of a JSON list of strings")
    return texts


@dataclass(frozen=True)
class WatchOptions:
    """Tells how a watch runs. `name` is its label in Prometheus. `buckets` are the upper bounds of the histograms
    there; without any they are derived. `export_items` tells whether each item has its own series there. Raises
    InvalidArgument by the fields of StartWatchRequest."""

    name: str
    sampling_rate: float = 1.0
    phases: frozenset[Phase] = frozenset({Phase.GENERATED})
    window_tokens: int = DEFAULT_WINDOW_TOKENS
    buckets: tuple[float, ...] = ()
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    export_items: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise InvalidArgument("name", "expected 1 to 63 of [a-z0-9_-], starting with a letter")
        if not 0.0 < self.sampling_rate <= 1.0:
            raise InvalidArgument("sampling_rate", f"must be above 0 and at most 1, got {self.sampling_rate}")
        if not self.phases:
            raise InvalidArgument("phases", "at least one phase is needed")
        if not 1 <= self.window_tokens <= MAX_WINDOW_TOKENS:
            raise InvalidArgument("window_tokens", f"must be in [1, {MAX_WINDOW_TOKENS}], got {self.window_tokens}")
        if not 1 <= self.calibration_tokens <= MAX_CALIBRATION_TOKENS:
            message = f"must be in [1, {MAX_CALIBRATION_TOKENS}], got {self.calibration_tokens}"
            raise InvalidArgument("calibration_tokens", message)
        if len(self.buckets) > MAX_BUCKETS:
            raise InvalidArgument("buckets", f"at most {MAX_BUCKETS} upper bounds, got {len(self.buckets)}")
        if not all(math.isfinite(bound) for bound in self.buckets):
            raise InvalidArgument("buckets", "must be finite; that of infinity is always there")
        if any(a >= b for a, b in zip(self.buckets, self.buckets[1:], strict=False)):
            raise InvalidArgument("buckets", "must be ascending")
