"""Decides which edits of a program run as one, and in which order the others run."""

from patchclamp_server.interventions.bound import BoundEdit
from patchclamp_server.interventions.kinds import EDIT_TABLES
from patchclamp_server.model.sites import Site


def stages(edits: tuple[BoundEdit, ...]) -> list[dict[int, int]]:
    """Returns the stage of each edit at each layer. Edits of one stage and site commute, and stages run in order."""
    last: dict[tuple[Site, int], tuple[int, list[BoundEdit]]] = {}
    every: list[dict[int, int]] = []
    for edit in edits:
        own = {}
        for layer in edit.layers:
            stage, members = last.get((edit.site, layer), (0, []))
            if members and not all(_commute(edit, other, layer) for other in members):
                stage, members = stage + 1, []
            last[(edit.site, layer)] = (stage, [*members, edit])
            own[layer] = stage
        every.append(own)
    return every


def _commute(a: BoundEdit, b: BoundEdit, layer: int) -> bool:
    if a.kind is not b.kind or a.preserve_norm or b.preserve_norm:
        return False
    return EDIT_TABLES[a.kind].commute(a.payload[layer], b.payload[layer])
