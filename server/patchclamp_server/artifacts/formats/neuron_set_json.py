"""Neuron sets as a JSON object of lists, the form in which most published code keeps them:

    {"<layer>": [neuron, ...], ...}

Layers and neurons are counted from 0; layers may stand in any order. An empty list is a layer without neurons and is
left out. Values, scores and metadata have no place in this format: a set that is exported loses them.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from patchclamp_server.artifacts.formats.base import ALONE, Beside, CannotExpress, Decoded, MalformedFile
from patchclamp_server.artifacts.formats.json_object import json_object
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.model.info import ModelInfo

LAYER = re.compile(r"0|[1-9][0-9]{0,5}")
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_NEURON = 2**31 - 1


def decode(source: bytes | Path, beside: Beside = ALONE) -> Decoded:
    """Returns "layer.<l>.neurons" [n] int64. MalformedFile names the layer that is wrong."""
    entries = json_object(source, "neurons", '{"<layer>": [neuron, ...]}', MAX_FILE_BYTES)
    lists = {_layer(name): _neurons(name, neurons) for name, neurons in entries.items()}
    tensors = {f"layer.{layer}.neurons": torch.tensor(neurons) for layer, neurons in sorted(lists.items()) if neurons}
    if not tensors:
        raise MalformedFile("no layer has a neuron")
    return Decoded(tensors, provenance={"method": "imported", "format": "neuron_set_json"})


def encode(artifact: Artifact, model: ModelInfo | None = None) -> bytes:
    """Returns the lists of all layers, each in the order of the set."""
    if artifact.info.kind is not ArtifactKind.NEURON_SET:
        raise CannotExpress(f"a file of neurons holds a neuron_set, not a {artifact.info.kind.value}")
    lists = {str(layer): artifact.neurons(layer)[0].tolist() for layer in artifact.info.layers}
    return json.dumps(lists).encode("ascii")


def _layer(name: str) -> int:
    if LAYER.fullmatch(name) is None:
        raise MalformedFile(f"{name!r:.80} is not a layer; expected a whole number")
    return int(name)


def _neurons(name: str, neurons: Any) -> list[int]:
    if not isinstance(neurons, list):
        raise MalformedFile(f"layer {name}: expected a list of neurons")
    for neuron in neurons:
        if isinstance(neuron, bool) or not isinstance(neuron, int) or not 0 <= neuron <= MAX_NEURON:
            raise MalformedFile(f"layer {name}: {neuron!r:.40} is not a neuron")
    return neurons
