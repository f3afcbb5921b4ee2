"""A second run of a broken sequence's step finds where values left the range of the dtype.

A step itself only says which rows are not finite in the end, because checking every site of every step would cost more
than the edits. A run without the edits shows whether they are the cause.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp_server.errors import FailedPrecondition, InvalidArgument, RequestError
from patchclamp_server.model.decoder import SiteHooks
from patchclamp_server.model.sites import Site

# These are the largest numbers as people write them.
_LARGEST = {torch.float16: "65,504", torch.bfloat16: "3.4e38", torch.float32: "3.4e38"}


def range_of(dtype: torch.dtype) -> tuple[str, str, str]:
    """Returns the name of a dtype, its largest number, and what to do about it."""
    if dtype is torch.float16:
        advice = "bfloat16 and float32 hold more (--dtype of the server)"
    else:
        advice = "none holds more: the weights may be broken"
    return str(dtype).removeprefix("torch."), _LARGEST[dtype], advice


def finite_rows(x: Tensor) -> Tensor:
    """Returns [T] bool. It sums in float32, which the values of a narrower dtype do not overflow."""
    return torch.isfinite(x.sum(dim=1, dtype=torch.float32))


@dataclass(frozen=True)
class Place:
    site: Site
    layer: int

    def __str__(self) -> str:
        return f"{self.site.value} of layer {self.layer}"


class FiniteProbe:
    """Implements SiteHooks: it remembers the first place at which something is not finite, after `edits` have run."""

    visited = None

    def __init__(self, edits: SiteHooks | None = None) -> None:
        self._edits = edits
        self.first: Place | None = None

    def visit(self, site: Site, layer: int, x: Tensor) -> None:
        if self._edits is not None:
            self._edits.visit(site, layer, x)
        if self.first is None and not bool(torch.isfinite(x).all()):
            self.first = Place(site, layer)


@dataclass(frozen=True)
class Overflow:
    """`edited` is the place with the edits of the request, `plain` the one without any; None means nowhere."""

    edited: Place | None
    plain: Place | None
    has_edits: bool


def refusal(found: Overflow | None, dtype: torch.dtype, position: int) -> RequestError:
    """Returns the error for the client. `found` is None if the place could not be looked for."""
    name, largest, advice = range_of(dtype)
    limit = f"passes {largest}, the largest number of {name}, at position {position}"
    if found is not None and found.has_edits and found.plain is None:
        where = found.edited or "the residual stream"
        reason = f"{where} {limit} with these edits and not without: an edit is too strong"
        return InvalidArgument("program.edits", f"{reason}; {advice}" if dtype is torch.float16 else reason)
    place = None if found is None else found.plain
    whose = "" if place is None else ", with edits or without"
    return FailedPrecondition("model", f"{place or 'the residual stream'} {limit}{whose}; {advice}")


def logits_refusal(dtype: torch.dtype, position: int) -> RequestError:
    name, largest, advice = range_of(dtype)
    limit = f"the logits after position {position} are not finite in {name}, whose largest number is {largest}"
    return FailedPrecondition("model", f"{limit}; {advice}")
