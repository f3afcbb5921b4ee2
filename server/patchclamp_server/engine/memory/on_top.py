"""What requests bring on top of the plan is held against the memory that is left, before it is made."""

from dataclasses import replace
from pathlib import Path

from patchclamp_server.engine.memory.available import available_memory, resident_memory
from patchclamp_server.errors import FailedPrecondition
from patchclamp_server.sizes import shown_size


def admit_sparse_weights(size: int, device: str = "cpu", root: Path = Path("/")) -> None:
    """Raises FailedPrecondition where the weights by neuron, of `size` bytes, do not fit into what is left: the system
    would end the server for them, and with it all that it serves."""
    left = available_memory(device, root)
    if not device.startswith("cuda"):
        left = replace(left, bytes=max(0, left.bytes - resident_memory(root)))
    if size > left.bytes:
        raise FailedPrecondition(
            "", f"sparse inference needs copies of all MLP weights, {shown_size(size)}, and {left}"
        )
