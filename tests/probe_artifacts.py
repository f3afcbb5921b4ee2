"""Probe artifacts with made-up numbers, for the tiny model of one family."""

from typing import Any

import torch
from engine_runs import loaded
from programs import numbers, shapes
from torch import Tensor

from patchclamp_server.artifacts.store import ArtifactStore
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.model.sites import Site

FAMILY = "llama"
SHAPES = shapes(FAMILY)
LABELS = ["no", "yes", "maybe"]


def probe_tensors(
    method: str, layers: tuple[int, ...], site: Site, classes: int, *, calibrated: bool = True
) -> dict[str, Tensor]:
    """A probe whose scores are of the order of 1."""
    width, seed = SHAPES.sites[site], f"{method} {layers} {site.value} {classes}"
    found: dict[str, Tensor] = {}
    for layer in layers:
        found[f"layer.{layer}.mean"] = 0.1 * numbers(f"mean {seed}", width)
        found[f"layer.{layer}.scale"] = 1.0 + numbers(f"scale {seed}", width).abs()
        rows = numbers(f"rows {layer} {seed}", classes, width)
        name, factor = ("centres", 1.0) if method == "prototype" else ("weight", 2.0 * width**-0.5)
        found[f"layer.{layer}.{name}"] = factor * rows
    if method == "prototype":
        found["temperature"] = torch.tensor([width**0.5])
    else:
        found["bias"] = 0.3 * numbers(f"bias {seed}", classes)
    if calibrated and method != "ridge":
        found["calibration"] = torch.tensor([-0.8, 0.2] if len(layers) > 1 else [1.4, -0.3])
    return found


def put(
    store: ArtifactStore, method: str, layers: tuple[int, ...], site: Site, classes: int = 2, **options: Any
) -> str:
    said: dict[str, Any] = {"method": method, "site": site.value}
    if method != "ridge":
        said |= {"labels": LABELS[:classes], "target": "yes"}
    tensors = probe_tensors(method, layers, site, classes, **options)
    return store.put(ArtifactKind.PROBE, tensors, model_fingerprint=loaded(FAMILY).info.fingerprint, provenance=said).id
