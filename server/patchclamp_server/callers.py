"""Every call has a caller, set by rpc/, by which the engine divides its capacity; without authentication it is one."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """`tenant` is a name of the policy file, "" where none is in use. `weight` is its share of a full engine."""

    tenant: str = ""
    weight: float = 1.0


ANYONE = Caller()
# This is set for the time of a call; asyncio.to_thread inherits it.
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYONE)
