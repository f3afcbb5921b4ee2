"""Fits a plan into the memory that there is: the KV cache gets what is left, and what does not fit is refused."""

from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp_server.engine.memory.available import Available
from patchclamp_server.engine.memory.plan import MemoryPlan, PlanOptions, block_bytes, plan
from patchclamp_server.model.errors import ModelSourceError
from patchclamp_server.model.spec import DecoderSpec
from patchclamp_server.model.stored_tensors import StoredTensor
from patchclamp_server.sizes import shown_size

# A cache that is sized to fit holds at least so many tokens: fewer serve nobody, and the model does not fit.
LEAST_TOKENS = 256


@dataclass(frozen=True)
class KvSize:
    """The KV cache has `tokens`; where they are not `given`, that is the most, and fewer are taken where more do not
    fit. With a bound on memory (`--memory`) it has as many as fit, unless tokens are given."""

    tokens: int
    given: bool


def fit(
    spec: DecoderSpec,
    tensors: Sequence[StoredTensor],
    size: KvSize,
    options: PlanOptions,
    available: Available,
    memory: int | None = None,
) -> MemoryPlan:
    """Returns the plan that fits into `memory` bytes, or into what is available. Raises ModelSourceError, with the
    numbers, where none does."""
    if memory is not None and memory > available.bytes:
        raise ModelSourceError(f"--memory asks for {shown_size(memory)}, and {available}")
    room = available.bytes if memory is None else memory
    bound = str(available) if memory is None else f"--memory is {shown_size(memory)}"
    least = plan(spec, tensors, 0, options)
    most = options.kv_block_size * max(0, (room - least.total) // block_bytes(spec, options))
    if size.given:
        fitting = f"at most --kv-cache-tokens {most} fit" if most else "no KV cache fits"
        asked = plan(spec, tensors, size.tokens, options)
        if asked.total > room:
            raise ModelSourceError(f"the model with --kv-cache-tokens {size.tokens} takes {asked}; {bound}; {fitting}")
        return asked
    if most < LEAST_TOKENS:
        wanted = plan(spec, tensors, LEAST_TOKENS, options)
        raise ModelSourceError(f"the model with the least KV cache takes {wanted}; {bound}")
    return plan(spec, tensors, most if memory is not None else min(most, size.tokens), options)
