"""The edit rotate_towards has the target t(h) = |h| (cos θ ĥ + sin θ w) with θ = min(radians, angle(h, v)) and w the
normalised part of v orthogonal to h."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchclamp_server.errors import InvalidArgument
from patchclamp_server.interventions.columns import LOW, EntryFlag, EntryKind
from patchclamp_server.interventions.compiled_edits import ROTATE as ROTATE_FORMULA
from patchclamp_server.interventions.field_checks import finite
from patchclamp_server.interventions.kinds.kind import EditTable, one_vector
from patchclamp_server.interventions.kinds.rules import Entries, TargetRule
from patchclamp_server.interventions.kinds.spec import EditNumbers, EditSpec, Where
from patchclamp_server.interventions.kinds.vectors import inline_vector, payload_of, safe_strengths, vector_in
from patchclamp_server.interventions.program import RotateTowards
from patchclamp_server.interventions.row_arithmetic import row_dots, row_norms, turns
from patchclamp_server.interventions.safe_strengths import Application

if TYPE_CHECKING:
    # The engine also runs where the messages are not installed.
    from patchclamp.v1 import program_pb2 as pb


class RotateRule(TargetRule):
    """Turns h towards v by at most the angle in LOW."""

    formula = ROTATE_FORMULA

    def __init__(self, entries: Entries, flags: EntryFlag) -> None:
        super().__init__(entries, preserve_norm=bool(flags & EntryFlag.PRESERVE_NORM))
        self.vectors = entries.vectors()
        radians = entries.floats(LOW)
        self.bounds = radians, radians

    def target(self, h: Tensor, norms: Tensor) -> Tensor:
        unit = self.entries.each(self.vectors)
        direction = h / norms[:, None]
        cosine = row_dots(direction, unit)
        across = unit - cosine[:, None] * direction
        sine = row_norms(across)
        cosine, share = turns(sine, cosine, self.bounds[0])
        turned = cosine[:, None] * direction + (share / sine)[:, None] * across
        # A row along v has no plane to turn in.
        return torch.where((sine > 1e-6)[:, None], turned * norms[:, None], h)


ROTATE = EditTable(EntryKind.ROTATE, one_vector, RotateRule)


def _decode(proto: "pb.RotateTowards", field: str) -> RotateTowards:
    return RotateTowards(vector_in(proto, field), finite(proto.radians, f"{field}.radians", low=0.0, high=math.pi))


def _bind(kind: RotateTowards, where: Where) -> EditNumbers:
    if not 0.0 <= kind.radians <= math.pi:
        raise InvalidArgument(f"{where.path}.radians", f"must be in [0, pi], got {kind.radians}")
    payload = payload_of(kind.vector, where, unit=True)
    safe = safe_strengths(kind.vector, where, Application.ROTATE_TOWARDS) if kind.radians else {}
    # Angles become strengths: a part of the way turns by about that part of the angle.
    return EditNumbers(
        ROTATE,
        payload,
        (kind.radians, 0.0),
        safe={layer: found.times(1 / kind.radians) for layer, found in safe.items()},
    )


EDITS = (
    EditSpec("rotate_towards", RotateTowards, _decode, _bind, ("rotate_towards",), inline_vector("rotate_towards")),
)
