"""The code of Retrieval Head (Wu et al. 2024) publishes head scores as one JSON object,

    {"<layer>-<head>": [score of one run, ...], ...}

Layers and heads count from 0 and come in any order. Import takes the mean of each list. The file does not say how many
heads there are, so the shape goes to the last layer and head that it names. Every head of this shape must be there, as
in the published files: nothing is known of a missing one, and 0 would be a measurement. Export writes every head, with
a list of one. Ends of intervals have no place in this format and are left out, as is all metadata.
"""

import json
import math
import re
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from patchclamp_server.artifacts.formats.base import ALONE, Beside, CannotExpress, Decoded, MalformedFile
from patchclamp_server.artifacts.formats.json_object import json_object
from patchclamp_server.artifacts.tensors import MAX_HEAD_LAYERS, MAX_HEADS
from patchclamp_server.artifacts.types import Artifact, ArtifactKind
from patchclamp_server.model.info import ModelInfo

HEAD = re.compile(r"(0|[1-9][0-9]{0,5})-(0|[1-9][0-9]{0,5})")
# 1,024 heads with 600 runs each take 12 MB; parsed JSON takes many times its size in memory.
MAX_FILE_BYTES = 64 * 1024 * 1024
LARGEST = torch.finfo(torch.float32).max


def decode(source: bytes | Path, beside: Beside = ALONE) -> Decoded:
    """Returns "scores" [layers, heads] float32. Raises MalformedFile, which names the head that is wrong."""
    entries = json_object(source, "head scores", '{"<layer>-<head>": [score, ...]}', MAX_FILE_BYTES)
    means = {_head(name): _mean(name, runs) for name, runs in entries.items()}
    shape = 1 + max(layer for layer, _ in means), 1 + max(head for _, head in means)
    if missing := prod(shape) - len(means):
        layer, head = next(place for place in product(*map(range, shape)) if place not in means)
        raise MalformedFile(
            f"{missing} of {prod(shape)} heads are missing, the first is {layer}-{head}; a head whose score is 0 is "
            "written as [0]"
        )
    scores = torch.empty(shape)
    for (layer, head), mean in means.items():
        scores[layer, head] = mean
    runs = [len(runs) for runs in entries.values()]
    provenance = {"method": "imported", "format": "head_score_json", "runs": {"fewest": min(runs), "most": max(runs)}}
    return Decoded({"scores": scores}, provenance=provenance)


def encode(artifact: Artifact, model: ModelInfo | None = None) -> bytes:
    """Writes all heads, layer by layer, each with a list of its one score."""
    if artifact.info.kind is not ArtifactKind.HEAD_SET:
        raise CannotExpress(f"a file of head scores holds a head_set, not a {artifact.info.kind.value}")
    scores, _, _ = artifact.head_scores()
    named = {f"{layer}-{head}": [score] for layer, row in enumerate(scores.tolist()) for head, score in enumerate(row)}
    return json.dumps(named, allow_nan=False).encode("ascii")


def _head(name: str) -> tuple[int, int]:
    match = HEAD.fullmatch(name)
    if match is None:
        raise MalformedFile(f"{name!r:.80} is not a head; expected <layer>-<head>")
    layer, head = int(match[1]), int(match[2])
    if layer >= MAX_HEAD_LAYERS or head >= MAX_HEADS:
        raise MalformedFile(f"{name}: at most {MAX_HEAD_LAYERS} layers of {MAX_HEADS} heads are read")
    return layer, head


def _mean(name: str, runs: Any) -> float:
    if not isinstance(runs, list) or not runs:
        raise MalformedFile(f"{name}: expected a list of at least one score")
    for run in runs:
        # JSON allows numbers such as 10^400, which no float holds; they are refused too.
        if isinstance(run, bool) or not isinstance(run, int | float) or not -LARGEST <= run <= LARGEST:
            raise MalformedFile(f"{name}: {run!r:.40} is not a score")
    return math.fsum(runs) / len(runs)
