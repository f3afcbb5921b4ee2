"""What may be stored: checks of tensors, metadata and tag names. Field paths name the argument of ArtifactStore.put."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from patchclamp_server.artifacts.types import ArtifactKind, Metadata
from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.program import Site

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_METADATA_BYTES = 256 * 1024
MAX_DEPTH = 32
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Leading zeros are refused, so that a layer has one name.
VECTOR_TENSOR = re.compile(r"layer\.(0|[1-9][0-9]{0,5})")
NEURON_TENSOR = re.compile(r"layer\.(0|[1-9][0-9]{0,5})\.(neurons|values)")


def check_tag(tag: str, path: str = "tag") -> None:
    """A tag is 1 to 128 letters, digits, '.', '_' and '-', and starts with a letter or digit: never a path."""
    if not TAG.fullmatch(tag):
        raise InvalidArgument(path, f"{tag!r} is not a tag name; accepted: {TAG.pattern}")


def layers_of(kind: ArtifactKind, names: Iterable[str]) -> tuple[int, ...]:
    """Layers that the tensor names speak of, ascending. InvalidArgument for a name the kind does not have."""
    pattern = VECTOR_TENSOR if kind is ArtifactKind.VECTOR else NEURON_TENSOR
    layers = set()
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            accepted = "layer.<l>" if kind is ArtifactKind.VECTOR else "layer.<l>.neurons and layer.<l>.values"
            raise InvalidArgument("tensors", f"{name!r} is not a tensor of a {kind.value}; accepted: {accepted}")
        layers.add(int(match[1]))
    if not layers:
        raise InvalidArgument("tensors", f"a {kind.value} needs at least one layer")
    return tuple(sorted(layers))


def check_tensors(kind: ArtifactKind, tensors: Mapping[str, torch.Tensor]) -> None:
    """Vector: "layer.<l>" [width], one width, finite. Neuron set: "layer.<l>.neurons" int64 [n], ≥ 0 and unique,
    optionally "layer.<l>.values" [n], finite. Everything else is InvalidArgument naming the tensor."""
    layers = layers_of(kind, tensors)
    if kind is ArtifactKind.VECTOR:
        _check_vector(layers, tensors)
    else:
        _check_neuron_set(layers, tensors)


def _check_vector(layers: tuple[int, ...], tensors: Mapping[str, torch.Tensor]) -> None:
    width = tensors[f"layer.{layers[0]}"].numel()
    for layer in layers:
        name = f"layer.{layer}"
        _check_floats(name, tensors[name])
        if tensors[name].numel() != width:
            message = f"{name} has width {tensors[name].numel()}, layer.{layers[0]} has {width}; widths must be equal"
            raise InvalidArgument("tensors", message)


def _check_neuron_set(layers: tuple[int, ...], tensors: Mapping[str, torch.Tensor]) -> None:
    for layer in layers:
        name = f"layer.{layer}.neurons"
        neurons = tensors.get(name)
        if neurons is None:
            raise InvalidArgument("tensors", f"layer.{layer}.values stands without {name}")
        if neurons.dtype != torch.int64 or neurons.ndim != 1 or neurons.numel() == 0:
            raise InvalidArgument("tensors", f"{name} must be int64 [n] with n >= 1, not {_describe(neurons)}")
        if int(neurons.min()) < 0:
            raise InvalidArgument("tensors", f"{name} holds the negative index {int(neurons.min())}")
        if len(set(neurons.tolist())) != neurons.numel():
            raise InvalidArgument("tensors", f"{name} names a neuron twice")
        values = tensors.get(f"layer.{layer}.values")
        if values is not None:
            _check_floats(f"layer.{layer}.values", values)
            if values.numel() != neurons.numel():
                message = f"layer.{layer}.values has {values.numel()} values for {neurons.numel()} neurons"
                raise InvalidArgument("tensors", message)


def _check_floats(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATS or tensor.ndim != 1 or tensor.numel() == 0:
        raise InvalidArgument("tensors", f"{name} must be floats [n] with n >= 1, not {_describe(tensor)}")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidArgument("tensors", f"{name} holds NaN or Inf")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def checked_metadata(metadata: Metadata) -> Metadata:
    """The metadata in its one canonical form, so that equal content has one id."""
    site = metadata.site
    if metadata.kind is ArtifactKind.VECTOR and site is None:
        raise InvalidArgument("site", "a vector needs the site it belongs to")
    if metadata.kind is ArtifactKind.NEURON_SET:
        if site not in (None, Site.MLP_POST):
            raise InvalidArgument("site", "neuron sets sit at mlp_post; leave the site empty")
        site = None
    if not metadata.model_fingerprint:
        raise InvalidArgument("model_fingerprint", "an artifact belongs to a model; the fingerprint is empty")
    fingerprint = _canonical(metadata.model_fingerprint, "model_fingerprint", 0)
    description = _canonical(metadata.description, "description", 0)
    provenance = _canonical(dict(metadata.provenance), "provenance", 0)
    evidence = _canonical(dict(metadata.evidence), "evidence", 0)
    sizes = {
        name: len(json.dumps(value, separators=(",", ":")))
        for name, value in (
            ("model_fingerprint", fingerprint),
            ("description", description),
            ("provenance", provenance),
            ("evidence", evidence),
        )
    }
    if sum(sizes.values()) > MAX_METADATA_BYTES:
        message = f"metadata of {sum(sizes.values())} bytes; at most {MAX_METADATA_BYTES} are stored"
        raise InvalidArgument(max(sizes, key=sizes.__getitem__), message)
    return Metadata(metadata.kind, fingerprint, site, description, provenance, evidence)


def _canonical(value: Any, path: str, depth: int) -> Any:
    """JSON with lists for tuples and 3 for 3.0: protobuf's Struct knows only doubles, and must not change the id."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(path, f"nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # A lone surrogate can be put into JSON but not into a protobuf message.
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise InvalidArgument(path, "text is not valid Unicode")
        return value
    if isinstance(value, int | float):
        # Rejects NaN, Inf and integers that no double can hold.
        if not -1.7e308 < value < 1.7e308:
            raise InvalidArgument(path, f"{value!r:.40} is not a finite number")
        integral = isinstance(value, int) or (math.fabs(value) < 2**53 and value.is_integer())
        return int(value) if integral else float(value)
    if isinstance(value, list | tuple):
        return [_canonical(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidArgument(path, f"the key {key!r} is not text")
        return {_canonical(k, path, depth): _canonical(v, f"{path}.{k}", depth + 1) for k, v in value.items()}
    raise InvalidArgument(path, f"{type(value).__name__} cannot be written as JSON")
