"""Decides what an exception in the engine means, for the requests that it hit and for the device."""

import torch

from patchclamp_server.errors import EngineFailure, RequestError, ResourceExhausted

# Some allocators raise a plain RuntimeError: torch's for the CPU, cuBLAS, Triton's launcher.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# After an error of a kernel every later call of the context fails with it, until the process ends.
DEVICE_LOST = ("CUDA error", "Triton Error [CUDA]")


def fault_of(error: Exception) -> RequestError:
    """Returns the error that clients get for an exception that was not raised for them."""
    if isinstance(error, RequestError):
        return error
    if is_out_of_memory(error):
        return ResourceExhausted("", "the server ran out of memory; a smaller request or a later one may fit")
    return EngineFailure("", f"{type(error).__name__}: {error}")


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def is_device_lost(error: Exception) -> bool:
    """Whether the device cannot be used any more by this process."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in DEVICE_LOST)
