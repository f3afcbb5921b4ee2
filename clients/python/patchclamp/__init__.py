"""Client of Patchclamp: generate text while you steer activations and clamp neurons, for every request separately.

from patchclamp import Client
from patchclamp.programs import add, generated

with Client() as client:
    stream = client.generate("I feel", program=[add("joyful", layers=range(10, 15), scope=generated())])
    for piece in stream.text:
        print(piece, end="", flush=True)
    print(stream.result().receipt)
"""

from patchclamp.aio import AsyncClient
from patchclamp.client import Client
from patchclamp.errors import FieldViolation, PatchclampError
from patchclamp.programs import Program
from patchclamp.retry import Retry

__all__ = ["AsyncClient", "Client", "FieldViolation", "PatchclampError", "Program", "Retry"]
