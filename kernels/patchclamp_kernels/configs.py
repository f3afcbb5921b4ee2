"""Each class of GPU has a table of launch configurations, made offline by tune.py, over the defaults of each op.

Nothing is tuned while serving: a wrapper asks the table once for its op and bucket of shapes, and launches.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources

import torch

# Word of the device's name -> file in tables/.
GPU_CLASSES = {"H100": "h100", "H200": "h200", "A100": "a100", "A10": "a10", "A10G": "a10", "L4": "l4"}


@dataclass(frozen=True)
class Config:
    """`blocks` are the kernel's constexpr sizes by name."""

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


def config_for(op: str, bucket: str, default: Config, device: torch.device) -> Config:
    """Returns the tuned configuration of an op for a bucket of shapes on this GPU, or the op's own default."""
    if device.type != "cuda":
        return default
    entry = table(gpu_class(device.index or 0)).get(op, {}).get(bucket)
    return default if entry is None else entry


@cache
def gpu_class(index: int) -> str:
    """Returns the name of the table for a device; "" when there is none."""
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(index))
    return next((file for word, file in GPU_CLASSES.items() if word in words), "")


@cache
def table(name: str) -> dict[str, dict[str, Config]]:
    """Returns the tuned configurations by op and bucket."""
    file = resources.files(__package__) / "tables" / f"{name}.json"
    if not name or not file.is_file():
        return {}
    return load(file.read_text())


def load(text: str) -> dict[str, dict[str, Config]]:
    """Reads the text of a table file."""
    raw = json.loads(text)
    return {op: {bucket: Config(**entry) for bucket, entry in buckets.items()} for op, buckets in raw.items()}


def dump(tuned: dict[str, dict[str, Config]]) -> str:
    """Returns the text of a table file."""
    plain = {
        op: {bucket: asdict(config) for bucket, config in sorted(buckets.items())} for op, buckets in tuned.items()
    }
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"
