"""Random weights in the formats of files, and float32 matrices that such files are dequantised to."""

import numpy as np
import torch
from torch import Tensor

from patchclamp_server.cpu.stored import Format, Part, StoredMatrix

GROUP = 32
# Where the blocks of a format have their halves, which are scales and lows of all that is random otherwise.
HALVES = {
    Format.Q4_0: (0,),
    Format.Q4_1: (0, 2),
    Format.Q5_0: (0,),
    Format.Q5_1: (0, 2),
    Format.Q8_0: (0,),
    Format.Q2_K: (80, 82),
    Format.Q3_K: (108,),
    Format.Q4_K: (0, 2),
    Format.Q5_K: (0, 2),
    Format.Q6_K: (208,),
}


def random_part(format: Format, out: int, width: int, seed: int = 0) -> Part:
    """Random bytes whose halves are finite numbers, subnormal ones and 0 among them."""
    generator = np.random.default_rng([seed, format, out, width])
    if format.weights == 1:
        values = torch.from_numpy(generator.standard_normal((out, width)).astype(np.float32))
        dtype = {Format.F32: torch.float32, Format.F16: torch.float16, Format.BF16: torch.bfloat16}[format]
        return StoredMatrix.of(values.to(dtype)).parts[0]
    blocks = generator.integers(0, 256, (out * width // format.weights, format.size), dtype=np.uint8)
    for at in HALVES[format]:
        halves = generator.standard_normal(len(blocks)).astype(np.float16) * np.float16(0.01)
        halves[::7] = np.float16(6e-8)
        halves[3::11] = 0
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return Part.whole(format, blocks.reshape(-1), width)


def random_matrix(format: Format, out: int, width: int, seed: int = 0) -> StoredMatrix:
    return StoredMatrix((random_part(format, out, width, seed),))


def affine_4(out: int, width: int) -> Tensor:
    """Weights as GGML's Q4_1 holds them: half-precision scale and minimum, codes 0 to 15, both ends in use."""
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(0, 16, (out, width // GROUP, GROUP), generator=generator)
    codes[:, :, 3], codes[:, :, 7] = 0, 15
    scale = (torch.rand(out, width // GROUP, 1, generator=generator) * 0.02 + 1e-3).half().float()
    low = (-torch.rand(out, width // GROUP, 1, generator=generator)).half().float()
    return (codes * scale + low).view(out, width)


def symmetric_8(out: int, width: int) -> Tensor:
    """Weights as GGML's Q8_0 holds them: half-precision scale, codes -127 to 127, the largest in use."""
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(-127, 128, (out, width // GROUP, GROUP), generator=generator)
    codes[:, :, 5] = -127
    scale = (torch.rand(out, width // GROUP, 1, generator=generator) * 0.02 + 1e-4).half().float()
    return (codes * scale).view(out, width)


def stored(weight: Tensor) -> Tensor | StoredMatrix:
    """The blocks that `affine_4` and `symmetric_8` are made of; other weights as they are."""
    out, width = weight.shape
    if width % GROUP or weight.dtype != torch.float32:
        return weight
    groups = weight.view(out, width // GROUP, GROUP)
    least = groups.amin(2, keepdim=True).half()
    for format, low in ((Format.Q4_1, least), (Format.Q8_0, least * 0)):
        span = (groups - low.float()).abs().amax(2, keepdim=True)
        scale = (span / (15 if format is Format.Q4_1 else 127)).half()
        codes = ((groups - low.float()) / scale.float().clamp_min(1e-30)).round()
        if torch.equal(codes * scale.float() + low.float(), groups):
            fields = [scale.view(torch.uint8)]
            if format is Format.Q4_1:
                nibbles = codes.to(torch.uint8)
                fields += [low.view(torch.uint8), nibbles[:, :, :16] | nibbles[:, :, 16:] << 4]
            else:
                fields.append(codes.to(torch.int8).view(torch.uint8))
            return StoredMatrix((Part.whole(format, torch.cat(fields, dim=2).view(-1).numpy(), width),))
    return weight
