"""The device and the dtype that are asked for are tried before a model is loaded for them."""

import torch
import torch.nn.functional as F

from patchclamp_server.model.errors import ModelSourceError

ACCEPTED = "cpu, cuda, or one of several as cuda:0"


def check_device(device: str, dtype: torch.dtype) -> None:
    """Raises ModelSourceError where the device does not exist or cannot compute in the dtype."""
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ModelSourceError(f"{device!r} is no device; a device is {ACCEPTED}") from error
    if parsed.type not in ("cpu", "cuda"):
        raise ModelSourceError(f"device {device} is not supported; a device is {ACCEPTED}")
    if parsed.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelSourceError(
                f"device {device}: there is no CUDA here (torch {torch.__version__}: no GPU, no driver, or a build of "
                "torch for CPUs); --device cpu serves without"
            )
        n = torch.cuda.device_count()
        if parsed.index is not None and parsed.index >= n:
            raise ModelSourceError(f"device {device}: there are {n}, from cuda:0 to cuda:{n - 1}")
    name = str(dtype).removeprefix("torch.")
    try:
        x = torch.ones(2, 2, dtype=dtype, device=parsed)
        F.rms_norm(x @ x, (2,))
    except RuntimeError as error:
        raise ModelSourceError(f"device {device} cannot compute in {name}: {error}; --dtype float32 may") from error
