"""What an engine will hold, as the plan of its memory asks for it."""

import torch

from patchclamp_server.engine.config import EngineConfig
from patchclamp_server.engine.memory.available import resident_memory
from patchclamp_server.engine.memory.plan import PlanOptions
from patchclamp_server.model.attention.pools import KV_DTYPES

# What comes after the plan is made: compiled code, threads, and what gRPC and a tokenizer hold.
_LATER = 48 << 20
# Workspaces of cuBLAS, kernels, and the memory of captured graphs.
_CUDA_RUNTIME = 512 << 20


def plan_options(config: EngineConfig, dtype: torch.dtype, device: str) -> PlanOptions:
    """Returns the options of this process, which has imported what it runs on."""
    cuda = device.startswith("cuda")
    return PlanOptions(
        kv_block_size=config.kv_block_size,
        kv_dtype=dtype if config.kv_dtype == "model" else KV_DTYPES[config.kv_dtype],
        max_tokens_per_step=config.max_tokens_per_step,
        max_sequences=config.max_sequences,
        dtype=dtype,
        device=device,
        runtime=_CUDA_RUNTIME if cuda else resident_memory() + _LATER,
        # On a CPU in float32 matrices stay as they are stored.
        bytes_per_weight=None if not cuda and dtype == torch.float32 else dtype.itemsize,
    )
