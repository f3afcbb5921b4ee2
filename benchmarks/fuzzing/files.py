"""Random files of artifacts: safetensors of odd tensors, JSON of odd values, right files that were damaged."""

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from google.protobuf.message import Message
from random_requests import corrupted
from safetensors.torch import save
from seed_requests import HEADS, LAYERS, NEURONS, WIDTH, upload

from patchclamp.v1 import artifact_pb2

NAMES = (
    "layer.0",
    "layer.1",
    "layer.99",
    "layer.-1",
    "layer.x",
    "layer.0.neurons",
    "scores",
    "items",
    "",
    "é",
    "../up",
)
SIZES = (0, 1, HEADS, WIDTH - 1, WIDTH, NEURONS)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
VALUES = (0.0, 1.0, -1.0, 1e38, float("nan"), float("inf"))
KINDS = artifact_pb2.ArtifactKind.keys()
FORMATS = artifact_pb2.ArtifactFormat.keys()
SITES = ("SITE_UNSPECIFIED", "SITE_RESID_POST", "SITE_MLP_POST", "SITE_MLP_GATE", "SITE_ATTN_Z")


def random_upload(random: Random, tag: str) -> Sequence[Message]:
    """The messages of an upload whose file and header need not fit each other."""
    data = random.choice((_safetensors, _scores, _header))(random)
    if random.randrange(3) == 0:
        data = corrupted(random, data)
    kind, file_format = random.choice(KINDS), random.choice(FORMATS)
    return upload(kind, tag, data, format=file_format, site=random.choice(SITES))


def _safetensors(random: Random) -> bytes:
    tensors = {}
    for name in random.sample(NAMES, random.randint(0, 3)):
        shape = random.choices(SIZES, k=random.randint(0, 2))
        tensors[name] = torch.full(shape, random.choice(VALUES)).to(random.choice(DTYPES))
    data: bytes = save(tensors)
    return data


def _scores(random: Random) -> bytes:
    """As published head scores: "layer-head" → scores."""
    values: tuple[Any, ...] = ([0.5], [], 0.5, None, "a", [1e400], {"b": 1})
    heads = [f"{random.randint(-1, LAYERS)}-{random.randint(0, HEADS)}" for _ in range(random.randrange(12))]
    return json.dumps({head: random.choice(values) for head in [*heads, *random.sample(NAMES, 1)]}).encode()


def _header(random: Random) -> bytes:
    """The start of a safetensors or a GGUF file that promises more than there is."""
    size = random.choice((0, 8, 2**31, 2**63, 2**64 - 1))
    if random.randint(0, 1):
        return struct.pack("<Q", size) + b'{"layer.0":{"dtype":"F32","shape":[32],"data_offsets":[0,128]}}'
    return b"GGUF" + struct.pack("<IQQ", random.choice((1, 2, 3, 9)), size, random.choice((0, 1, size)))
