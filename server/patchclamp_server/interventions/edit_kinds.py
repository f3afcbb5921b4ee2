"""Names the kinds of edit as the message Edit does, and finds what a policy checks in them."""

from patchclamp_server.interventions.kinds import EDIT_OF
from patchclamp_server.interventions.program import Edit, EditKind

NAMES: dict[type[EditKind], str] = {kind: spec.name for kind, spec in EDIT_OF.items()}


def kind_name(kind: EditKind) -> str:
    return NAMES[type(kind)]


def inline_numbers(edit: Edit) -> str:
    """Returns the field of the edit in which a request brings vectors of its own, or "" where it brings none."""
    return EDIT_OF[type(edit.kind)].inline(edit.kind)
