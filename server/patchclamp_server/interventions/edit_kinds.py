"""Kinds of edit by the names of the message Edit, and what of them a policy looks at."""

from patchclamp_server.interventions.program import (
    AddVector,
    CapProjection,
    Edit,
    EditKind,
    HeadEdit,
    LowRank,
    NeuronEdit,
    ProjectOut,
    ReplaceVector,
    RotateTowards,
    SetProjection,
)

NAMES: dict[type[EditKind], str] = {
    AddVector: "add",
    ProjectOut: "project_out",
    CapProjection: "cap_projection",
    SetProjection: "set_projection",
    ReplaceVector: "replace",
    RotateTowards: "rotate_towards",
    LowRank: "low_rank",
    NeuronEdit: "neurons",
    HeadEdit: "heads",
}


def kind_name(kind: EditKind) -> str:
    return NAMES[type(kind)]


def inline_numbers(edit: Edit) -> str:
    """The field of the edit in which a request brings vectors of its own; "" where there is none."""
    match edit.kind:
        case LowRank():
            return "low_rank"
        case HeadEdit(mean=mean):
            return "heads.mean" if mean is not None else ""
        case NeuronEdit():
            return ""
        case kind:
            return f"{kind_name(kind)}.vector.values" if kind.vector.values is not None else ""
