"""Who a call belongs to. rpc/ sets it, the engine shares out its capacity by it; without authentication all are one."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """`tenant`: a name of the policy file, "" where none is in use. `weight`: its share of a full engine."""

    tenant: str = ""
    weight: float = 1.0


ANYONE = Caller()
# Set for the time of a call; asyncio.to_thread takes them along.
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYONE)
