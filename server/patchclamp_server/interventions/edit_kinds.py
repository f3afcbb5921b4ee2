"""Kinds of edit by the names of the message Edit, and what of them a policy looks at."""

from patchclamp_server.interventions.kinds import EDIT_OF
from patchclamp_server.interventions.program import Edit, EditKind

NAMES: dict[type[EditKind], str] = {kind: spec.name for kind, spec in EDIT_OF.items()}


def kind_name(kind: EditKind) -> str:
    return NAMES[type(kind)]


def inline_numbers(edit: Edit) -> str:
    """The field of the edit in which a request brings vectors of its own; "" where there is none."""
    return EDIT_OF[type(edit.kind)].inline(edit.kind)
