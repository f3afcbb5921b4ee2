"""16 programs, no two alike, for a batch whose requests are all edited in another way."""

import torch

from patchclamp_server.interventions.bind import bind
from patchclamp_server.interventions.bound import BoundProgram
from patchclamp_server.interventions.program import (
    AddVector,
    CapProjection,
    Comparison,
    Condition,
    Edit,
    EditKind,
    Gate,
    HeadEdit,
    NeuronEdit,
    NeuronOp,
    Phase,
    Program,
    ProjectOut,
    RotateTowards,
    Scope,
    TokenSelector,
    Vector,
)
from patchclamp_server.model.info import ModelInfo
from patchclamp_server.model.sites import Site

STREAMS = 16


def programs(info: ModelInfo) -> list[BoundProgram]:
    """16 programs, no two alike: eight kinds of edit at layers of their own, half on generated tokens only."""
    bound = []
    for i in range(STREAMS):
        generator = torch.Generator().manual_seed(i)
        vector = Vector(values=torch.randn(info.d_model, generator=generator))
        condition = Condition(Site.RESID_PRE, 2, vector, Comparison.ABOVE, 0.0)
        neurons = tuple(torch.randperm(info.d_ff, generator=generator)[:8].tolist())
        kinds: list[tuple[EditKind, Site, Gate | None]] = [
            (AddVector(vector), Site.RESID_POST, None),
            (ProjectOut(vector), Site.RESID_PRE, None),
            (CapProjection(vector, max=1.0), Site.RESID_POST, None),
            (RotateTowards(vector, 0.1), Site.RESID_MID, None),
            (NeuronEdit(neurons, op=NeuronOp.SET, values=(0.5,)), Site.MLP_POST, None),
            (NeuronEdit(neurons, op=NeuronOp.CLAMP, min=-0.5, max=0.5), Site.MLP_POST, None),
            (HeadEdit((i % info.n_heads,), scale=0.5), Site.ATTN_Z, None),
            (AddVector(vector), Site.RESID_POST, Gate(condition)),
        ]
        kind, site, gate = kinds[i % len(kinds)]
        first = 8 + i // len(kinds)
        scope = Scope((TokenSelector(phase=Phase.GENERATED),)) if i % 2 else Scope()
        edit = Edit(kind, site, layers=(first, first + 4), strength=0.2, scope=scope, gate=gate)
        bound.append(bind(Program(edits=(edit,)), info))
    return bound
