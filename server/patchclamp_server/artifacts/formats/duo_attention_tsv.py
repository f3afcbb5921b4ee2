"""full_attention_heads.tsv of DuoAttention (Xiao et al. 2024): a gate in [0, 1] for each layer and KV head, as
numpy.savetxt writes it. A line is a layer, and tabs stand between the gates.

A head set has scores of query heads. KV head g is shared by the n = n_heads / n_kv_heads query heads g·n to g·n + n - 1
(the order of repeat_interleave), and each gets its gate. Gates outside [0, 1] are clipped, as DuoAttention does when it
reads them. The threshold is 0.5, the one that its programs have by default. Export needs one score in [0, 1] for the
heads that share a KV head; ends of intervals and metadata have no place.
"""

import re
from pathlib import Path
from typing import Any

import torch

from patchclamp_server.artifacts.formats.base import (
    ALONE,
    Beside,
    CannotExpress,
    Decoded,
    MalformedFile,
    known_model,
    whole_file,
)
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.model.info import ModelInfo

GATE = re.compile(rb"[+-]?[0-9]{1,20}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?")
# With what stands after it; a gate of savetxt takes 25.
MAX_GATE_BYTES = 72
THRESHOLD = 0.5


def decode(source: bytes | Path, beside: Beside = ALONE) -> Decoded:
    """Returns "scores" [layers, heads] float32. Raises MalformedFile, which names the line that is wrong."""
    model = known_model(beside, "gates are of KV heads, whose query heads")
    data = whole_file(source, "gates", model.n_layers * model.n_kv_heads * MAX_GATE_BYTES)
    rows: list[list[float]] = []
    for number, line in enumerate(data.splitlines(), 1):
        if number > model.n_layers:
            raise MalformedFile(f"line {number}; {model.name} has {model.n_layers} layers")
        rows.append(_gates(number, line, model))
    if len(rows) < model.n_layers:
        raise MalformedFile(f"{len(rows)} lines; {model.name} has {model.n_layers} layers")
    gates = torch.tensor(rows, dtype=torch.float64)
    clipped = gates.clamp(0.0, 1.0)
    provenance: dict[str, Any] = {"method": "imported", "format": "duo_attention_tsv", "kv_heads": model.n_kv_heads}
    warnings = []
    if outside := int((gates != clipped).sum()):
        provenance["clipped"] = outside
        warnings.append(f"{outside} gates outside [0, 1] were clipped")
    shared = model.n_heads // model.n_kv_heads
    if shared > 1:
        warnings.append(f"each of the {model.n_kv_heads} gates of a layer is the score of {shared} query heads")
    return Decoded(
        {"scores": clipped.float().repeat_interleave(shared, dim=1)},
        provenance=provenance,
        evidence={"threshold": THRESHOLD},
        warnings=tuple(warnings),
    )


def encode(artifact: Artifact, model: ModelInfo | None = None) -> bytes:
    """Returns a line of gates for each layer. Raises CannotExpress, which names heads that no gate can stand for."""
    if artifact.info.kind is not ArtifactKind.HEAD_SET:
        raise CannotExpress(f"a file of gates holds a head_set, not a {artifact.info.kind.value}")
    if model is None:
        raise CannotExpress("gates are of KV heads, and this server does not know those of the model of the head set")
    scores, _, _ = artifact.head_scores()
    shared = model.n_heads // model.n_kv_heads
    groups = scores.view(model.n_layers, model.n_kv_heads, shared)
    if bool((groups != groups[:, :, :1]).any()):
        layer, kv_head, _ = (groups != groups[:, :, :1]).nonzero()[0].tolist()
        first, last = kv_head * shared, kv_head * shared + shared - 1
        raise CannotExpress(
            f"heads {first} to {last} of layer {layer} share a KV head, which has one gate, and their scores differ"
        )
    if bool(((groups < 0) | (groups > 1)).any()):
        layer, kv_head, _ = ((groups < 0) | (groups > 1)).nonzero()[0].tolist()
        score = float(groups[layer, kv_head, 0])
        raise CannotExpress(f"a gate is in [0, 1]; head {kv_head * shared} of layer {layer} has the score {score:g}")
    lines = ("\t".join(f"{gate:.18e}" for gate in row) for row in groups[:, :, 0].tolist())
    return "".join(f"{line}\n" for line in lines).encode("ascii")


def _gates(number: int, line: bytes, model: ModelInfo) -> list[float]:
    fields = line.split(b"\t")
    if len(fields) != model.n_kv_heads:
        raise MalformedFile(f"line {number} has {len(fields)} gates; {model.name} has {model.n_kv_heads} KV heads")
    for column, field in enumerate(fields):
        if GATE.fullmatch(field) is None:
            raise MalformedFile(f"line {number}, gate {column}: {field!r:.40} is not a number")
    gates = [float(field) for field in fields]
    if any(abs(gate) == float("inf") for gate in gates):
        raise MalformedFile(f"line {number} has a gate that is not finite")
    return gates
