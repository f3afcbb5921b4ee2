"""This table lists the tensors of each kind of artifact. Refusals name the tensor; their field is "tensors".

    vector            layer.<l> [width]                                            floats, one width
    neuron_set        layer.<l>.neurons [n], optionally layer.<l>.values [n]       int64 ≥ 0 and unique; floats
                      and layer.<l>.scores [n]
    sparsity_profile  names of the policy's own, any shape                         float32 or int64
    head_set          scores [n_layers, n_heads], optionally low, high alike       float32
    corpus            text [bytes], ends [documents], optionally labels alike      uint8; int64 (corpora.py)
    autoencoder       encoder, encoder_bias, decoder, decoder_bias, threshold      see autoencoder_spec.py
    watch             see monitoring/watch.py                                      uint8, int64, floats
    watch_reference   see monitoring/reference.py                                  float64, int64

Floats are finite. Packages above this one add the checks of their kinds to KINDS: monitoring/ adds those of watches.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from patchclamp_server.artifacts.autoencoder_spec import autoencoder_layers, check_autoencoder_tensors
from patchclamp_server.artifacts.corpora import check_corpus, corpus_layers
from patchclamp_server.artifacts.types import ArtifactKind
from patchclamp_server.errors import InvalidArgument

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Tensors: TypeAlias = Mapping[str, torch.Tensor]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Leading zeros are refused, so that a layer has one name.
VECTOR_TENSOR = re.compile(r"layer\.(0|[1-9][0-9]{0,5})")
NEURON_TENSOR = re.compile(r"layer\.(0|[1-9][0-9]{0,5})\.(neurons|values|scores)")
# What a neuron set may say of each of its neurons.
NEURON_NUMBERS = ("values", "scores")
PROFILE_TENSOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
PROFILE_DTYPES = (torch.float32, torch.int64)
MAX_PROFILE_TENSORS = 1024
MAX_PROFILE_DIMENSIONS = 8
MAX_PROFILE_BYTES = 1 << 30
HEAD_TENSORS = ("scores", "low", "high")
# No model comes near these bounds; a file that names a head far beyond must not make a tensor of that size.
MAX_HEAD_LAYERS, MAX_HEADS = 1024, 1024


@dataclass(frozen=True)
class KindChecks:
    """The checks of one kind. `layers` returns the layers of tensors of these shapes, ascending, and refuses names and
    shapes that the kind does not have; `check` refuses everything else."""

    layers: Callable[[Shapes], tuple[int, ...]]
    check: Callable[[Tensors], None]


def layers_of(kind: ArtifactKind, shapes: Shapes) -> tuple[int, ...]:
    """Returns the layers of tensors of these shapes, ascending; none for kinds whose tensors do not tell.

    Raises InvalidArgument for a name, or a number of dimensions, that the kind does not have.
    """
    return KINDS[kind].layers(shapes)


def width_of(kind: ArtifactKind, shapes: Shapes) -> int:
    """Returns the width of a vector or of what an autoencoder reads, the heads per layer of a head set, else 0.
    layers_of must accept the shapes."""
    if kind is ArtifactKind.AUTOENCODER:
        return shapes["encoder"][1]
    if kind is ArtifactKind.VECTOR:
        return next(iter(shapes.values()))[0]
    return shapes["scores"][1] if kind is ArtifactKind.HEAD_SET else 0


def check_tensors(kind: ArtifactKind, tensors: Tensors) -> None:
    """Raises InvalidArgument, which names the tensor that an artifact of this kind may not have."""
    layers_of(kind, shapes_of(tensors))
    KINDS[kind].check(tensors)


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _named_layers(kind: str, pattern: re.Pattern[str], accepted: str, shapes: Shapes) -> tuple[int, ...]:
    layers = set()
    for name, shape in shapes.items():
        match = pattern.fullmatch(name)
        if match is None:
            raise InvalidArgument("tensors", f"{name!r} is not a tensor of a {kind}; accepted: {accepted}")
        if len(shape) != 1:
            raise InvalidArgument("tensors", f"{name} must have one dimension, not the shape {list(shape)}")
        layers.add(int(match[1]))
    if not layers:
        raise InvalidArgument("tensors", f"a {kind} needs at least one layer")
    return tuple(sorted(layers))


def _vector_layers(shapes: Shapes) -> tuple[int, ...]:
    return _named_layers("vector", VECTOR_TENSOR, "layer.<l>", shapes)


def _check_vector(tensors: Tensors) -> None:
    layers = _vector_layers(shapes_of(tensors))
    width = tensors[f"layer.{layers[0]}"].numel()
    for layer in layers:
        name = f"layer.{layer}"
        _check_floats(name, tensors[name])
        if tensors[name].numel() != width:
            message = f"{name} has width {tensors[name].numel()}, layer.{layers[0]} has {width}; widths must be equal"
            raise InvalidArgument("tensors", message)


def _neuron_set_layers(shapes: Shapes) -> tuple[int, ...]:
    return _named_layers(
        "neuron_set", NEURON_TENSOR, "layer.<l>.neurons, layer.<l>.values and layer.<l>.scores", shapes
    )


def _check_neuron_set(tensors: Tensors) -> None:
    for layer in _neuron_set_layers(shapes_of(tensors)):
        name = f"layer.{layer}.neurons"
        neurons = tensors.get(name)
        if neurons is None:
            given = next(f"layer.{layer}.{kind}" for kind in NEURON_NUMBERS if f"layer.{layer}.{kind}" in tensors)
            raise InvalidArgument("tensors", f"{given} stands without {name}")
        if neurons.dtype != torch.int64 or neurons.numel() == 0:
            raise InvalidArgument("tensors", f"{name} must be int64 [n] with n >= 1, not {_describe(neurons)}")
        if int(neurons.min()) < 0:
            raise InvalidArgument("tensors", f"{name} holds the negative index {int(neurons.min())}")
        if len(set(neurons.tolist())) != neurons.numel():
            raise InvalidArgument("tensors", f"{name} names a neuron twice")
        for kind in NEURON_NUMBERS:
            numbers = tensors.get(f"layer.{layer}.{kind}")
            if numbers is not None:
                _check_floats(f"layer.{layer}.{kind}", numbers)
                if numbers.numel() != neurons.numel():
                    message = f"layer.{layer}.{kind} has {numbers.numel()} {kind} for {neurons.numel()} neurons"
                    raise InvalidArgument("tensors", message)


def _profile_layers(shapes: Shapes) -> tuple[int, ...]:
    if not 1 <= len(shapes) <= MAX_PROFILE_TENSORS:
        raise InvalidArgument(
            "tensors", f"a sparsity_profile has 1 to {MAX_PROFILE_TENSORS} tensors, not {len(shapes)}"
        )
    for name, shape in shapes.items():
        if PROFILE_TENSOR.fullmatch(name) is None:
            message = f"{name!r:.200} is not a name of a tensor; accepted: {PROFILE_TENSOR.pattern}"
            raise InvalidArgument("tensors", message)
        if len(shape) > MAX_PROFILE_DIMENSIONS:
            message = f"{name} has {len(shape)} dimensions; at most {MAX_PROFILE_DIMENSIONS} are stored"
            raise InvalidArgument("tensors", message)
    return ()


def _check_profile(tensors: Tensors) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MAX_PROFILE_BYTES:
        raise InvalidArgument("tensors", f"{size} bytes; a sparsity_profile has at most {MAX_PROFILE_BYTES}")
    for name, tensor in tensors.items():
        if tensor.dtype not in PROFILE_DTYPES or tensor.numel() == 0:
            message = f"{name} must be float32 or int64 with at least one number, not {_describe(tensor)}"
            raise InvalidArgument("tensors", message)
        _check_finite(name, tensor)


def _head_set_layers(shapes: Shapes) -> tuple[int, ...]:
    for name in shapes:
        if name not in HEAD_TENSORS:
            message = f"{name!r:.200} is not a tensor of a head_set; accepted: {', '.join(HEAD_TENSORS)}"
            raise InvalidArgument("tensors", message)
    if "scores" not in shapes:
        raise InvalidArgument("tensors", "a head_set needs scores")
    shape = shapes["scores"]
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_HEAD_LAYERS or not 1 <= shape[1] <= MAX_HEADS:
        message = f"scores must be [n_layers, n_heads], at most [{MAX_HEAD_LAYERS}, {MAX_HEADS}], not {list(shape)}"
        raise InvalidArgument("tensors", message)
    for name, other in shapes.items():
        if other != shape:
            raise InvalidArgument("tensors", f"{name} has the shape {list(other)}, scores has {list(shape)}")
    return tuple(range(shape[0]))


def _check_head_set(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise InvalidArgument("tensors", f"{name} must be float32, not {_describe(tensor)}")
        _check_finite(name, tensor)
    if "low" in tensors and "high" in tensors and bool((tensors["low"] > tensors["high"]).any()):
        layer, head = (tensors["low"] > tensors["high"]).nonzero()[0].tolist()
        raise InvalidArgument("tensors", f"low is above high for head {head} of layer {layer}")


KINDS: dict[ArtifactKind, KindChecks] = {
    ArtifactKind.VECTOR: KindChecks(_vector_layers, _check_vector),
    ArtifactKind.NEURON_SET: KindChecks(_neuron_set_layers, _check_neuron_set),
    ArtifactKind.SPARSITY_PROFILE: KindChecks(_profile_layers, _check_profile),
    ArtifactKind.HEAD_SET: KindChecks(_head_set_layers, _check_head_set),
    ArtifactKind.CORPUS: KindChecks(corpus_layers, check_corpus),
    ArtifactKind.AUTOENCODER: KindChecks(autoencoder_layers, check_autoencoder_tensors),
}


def _check_floats(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATS or tensor.numel() == 0:
        raise InvalidArgument("tensors", f"{name} must be floats [n] with n >= 1, not {_describe(tensor)}")
    _check_finite(name, tensor)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidArgument("tensors", f"{name} holds NaN or Inf")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
