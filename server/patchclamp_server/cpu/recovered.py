"""Finds the blocks again that a float32 matrix was made of, until models are loaded from their files as they are.

A model that comes from a GGUF file is a float32 matrix whose groups of 32 inputs hold few distinct values:
w = scale · code + low. `recovered` finds scale, low and codes, as Q4_1 or Q8_0 hold them, and proves them by
reconstruction to the bit; it leaves other matrices alone.
"""

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

_GROUP = 32


def recovered(weight: Tensor) -> StoredMatrix | None:
    """Returns the blocks of `weight` [out, in] float32, or None when it has none."""
    out, width = weight.shape
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or width % _GROUP or not out:
        return None
    groups = weight.reshape(out, width // _GROUP, _GROUP)
    tiny = torch.finfo(torch.float32).tiny

    low = groups.amin(2, keepdim=True).half().float()
    scale = ((groups.amax(2, keepdim=True) - low) / 15).half().float()
    codes = ((groups - low) / scale.clamp_min(tiny)).round()
    if bool((codes * scale + low == groups).all()) and bool(((codes >= 0) & (codes <= 15)).all()):
        nibbles = codes.to(torch.uint8)
        packed = nibbles[:, :, : _GROUP // 2] | (nibbles[:, :, _GROUP // 2 :] << 4)
        return _matrix(Format.Q4_1, width, [_bytes(scale.half()), _bytes(low.half()), packed])

    scale = (groups.abs().amax(2, keepdim=True) / 127).half().float()
    codes = (groups / scale.clamp_min(tiny)).round()
    if bool((codes * scale == groups).all()) and bool((codes.abs() <= 127).all()):
        return _matrix(Format.Q8_0, width, [_bytes(scale.half()), _bytes(codes.to(torch.int8))])
    return None


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _matrix(format: Format, width: int, fields: list[Tensor]) -> StoredMatrix:
    memory = np.ascontiguousarray(torch.cat(fields, dim=2).numpy()).reshape(-1)
    return StoredMatrix((Part.whole(format, memory, width),))
